"""What to make ternary and how: TernaryConfig and the LayerStatus rows it leads to.

Plain data, no torch. The maths is in quantizers.py; which modules qualify is decided in sites.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase

from bitnet_export.errors import UsageError

QUANTIZERS = ("twn", "absmean", "threshold", "lsq")
GRANULARITIES = ("tensor", "channel", "group")
GROUP_SIZES = (32, 64, 128)
CONVOLUTIONS = ("all", "matmul", "none")

# Output heads, embeddings and expert routers: few weights or few uses, and the layers whose
# rounding shows most in the output. Patterns match the whole module path, any depth.
DEFAULT_EXCLUDE = (
    "lm_head",
    "*.lm_head",
    "embed_out",
    "*.embed_out",
    "classifier",
    "*.classifier",
    "classifier.*",
    "*.classifier.*",
    "score",
    "*.score",
    "head",
    "*.head",
    "qa_outputs",
    "*.qa_outputs",
    "cls.predictions*",
    "*router*",
    "*.gate",
)


@dataclass(frozen=True)
class TernaryConfig:
    """How weights become ternary.

    quantizer: "twn" (arXiv:1605.04711), "absmean" (BitNet b1.58, arXiv:2402.17764), "threshold"
        (fixed |w| > threshold, one learned alpha per layer) or "lsq" (learned step,
        arXiv:1902.08153).
    threshold: absolute, in the weights' own unit; used by "threshold" only.
    granularity: what shares one scale: "tensor", "channel" (an output row) or "group" (group_size
        32, 64 or 128 elements of a row). "threshold" always has one scale per layer.
    activation_bits: 8 (int8 per row, absmax) or 0 (activations stay float).
    exclude, include: fnmatch patterns on module paths; exclude wins.
    keep_head: also keep the last linear layer if no other layer is as wide on its input side: an
        output head whatever it is called.
    min_k: layers with fewer inputs, and convolutions that read fewer channels, stay float: nothing
        to save, much to lose.
    convolutions: "all" without groups, "matmul" only those that run as TernaryMatMul (kernel 1, or
        kernel equal to stride, unpadded), or "none".
    """

    quantizer: str = "twn"
    threshold: float = 0.1
    granularity: str = "channel"
    group_size: int = 0
    activation_bits: int = 8
    exclude: tuple[str, ...] = DEFAULT_EXCLUDE
    include: tuple[str, ...] = ("*",)
    keep_head: bool = True
    min_k: int = 16
    convolutions: str = "all"

    def __post_init__(self) -> None:
        _check_choice("quantizer", self.quantizer, QUANTIZERS)
        _check_choice("granularity", self.granularity, GRANULARITIES)
        _check_choice("activation_bits", self.activation_bits, (8, 0))
        _check_choice("convolutions", self.convolutions, CONVOLUTIONS)
        if self.granularity == "group":
            _check_choice("group_size", self.group_size, GROUP_SIZES)
            if self.quantizer == "threshold":
                raise UsageError(
                    'quantizer "threshold" has one scale per layer, not per group',
                    fix='use granularity "tensor", or the quantizer "twn" with groups',
                )
        elif self.group_size:
            raise UsageError(
                f"group_size={self.group_size} with granularity {self.granularity!r}",
                fix='pass granularity="group", or leave group_size out',
            )
        if not self.threshold > 0:
            raise UsageError(f"threshold must be positive, got {self.threshold}")

    def excluded_by(self, path: str) -> str | None:
        """The reason a module path is left out, or None if it is in."""
        for pattern in self.exclude:
            if fnmatchcase(path, pattern):
                return f"excluded by the pattern {pattern!r}"
        if not any(fnmatchcase(path, pattern) for pattern in self.include):
            return "matches no include pattern"
        return None


@dataclass(frozen=True)
class LayerStatus:
    """One row of the report's layer table. status: "ternary" or "kept" (in floating point)."""

    name: str
    status: str
    reason: str
    parameters: int = 0


def _check_choice(name: str, value: object, choices: tuple[object, ...]) -> None:
    if value not in choices:
        raise UsageError(
            f"{name} must be one of {', '.join(map(str, choices))}, got {value!r}",
            where="TernaryConfig",
        )
