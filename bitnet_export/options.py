"""What a caller may ask of a pipeline run: frozen dataclasses, and the Progress it reports to.

The command line fills them from flags, Python callers directly. Only types and defaults live
here: checking values against a model is the stages' work, reading flags is cli's. Imports
nothing heavy, so that the command line can start without torch.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

TARGETS = ("onnx", "ort", "trt", "trt-rtx")
DTYPES = ("fp32", "fp16")
ORT_KERNELS = ("auto", "2bit", "int8")
ACTIVATION_SCALES = ("row", "tensor")
EMBEDDINGS = ("keep", "int8", "int4")
CALIBRATIONS = ("none", "scale", "trits")
CHECKPOINTS = ("state-dict", "hf-bitnet", "huggingface")
QUANTIZERS = ("twn", "absmean", "threshold", "lsq")
GRANULARITIES = ("tensor", "channel", "group")
GROUP_SIZES = (32, 64, 128)
CONVOLUTIONS = ("all", "matmul", "none")
PARALLEL = ("ddp", "fsdp")
DEVICES = ("cpu", "cuda")


class Progress(Protocol):
    """Where a run tells how far it is. The command line draws it on stderr."""

    def stage(self, name: str, detail: str = "") -> None:
        """A stage begins ("export", "passes"); the one before it is done."""

    def update(self, done: int, total: int, detail: str = "") -> None:
        """``done`` of ``total`` steps of the current stage; detail, e.g. "loss 0.031".

        total 0: how many there are is not known, detail is what happens now.
        """

    def note(self, text: str) -> None:
        """Something worth a line: a choice made for the user and why."""

    def warn(self, text: str) -> None:
        """Something the user should act on; also kept in the report by whoever raises it."""

    def close(self) -> None:
        """The run ended, well or not: leave the terminal clean."""


class SilentProgress:
    """A Progress that says nothing: the default of the Python API."""

    def stage(self, name: str, detail: str = "") -> None:
        pass

    def update(self, done: int, total: int, detail: str = "") -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def warn(self, text: str) -> None:
        pass

    def close(self) -> None:
        pass


class _Forgiving:
    """A path may be given as text, and where several are taken one alone or a list."""

    def __post_init__(self) -> None:
        for item in fields(self):  # type: ignore[arg-type]
            value, kind = getattr(self, item.name), str(item.type)
            if kind.startswith("Path") and isinstance(value, str | os.PathLike):
                object.__setattr__(self, item.name, Path(value))
            elif kind.startswith("tuple") and isinstance(value, str | int | list):
                several = tuple(value) if isinstance(value, list) else (value,)
                object.__setattr__(self, item.name, several)


@dataclass(frozen=True)
class TernaryOptions(_Forgiving):
    """How weights become ternary: a recipe, and over it fields of ternary.TernaryConfig.

    recipe: a name of ternary.recipes.RECIPES, None: the loaded model picks one. The others have
    the names of TernaryConfig's fields; None leaves them to the recipe. exclude and include are
    fnmatch patterns on module paths; exclude None means the default set (head, embeddings, ...).
    """

    recipe: str | None = None
    quantizer: str | None = None
    threshold: float | None = None
    granularity: str | None = None
    group_size: int | None = None
    activation_bits: int | None = None
    exclude: tuple[str, ...] | None = None
    include: tuple[str, ...] | None = None
    keep_head: bool | None = None
    convolutions: str | None = None

    def as_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for TernaryConfig: what was set, the recipe left out."""
        return {k: v for k, v in vars(self).items() if v is not None and k != "recipe"}


@dataclass(frozen=True)
class GateOptions:
    """What must hold for the verdict "pass". None: not gated (parity always is), whatever limits
    an earlier run of the same directory was given.

    min_speedup and min_compression are ratios over full precision (2.0 = twice), max_quality_loss
    is a fraction (0.05 = 5 %), atol replaces the stated tolerance of every parity pair.
    """

    min_speedup: float | None = None
    min_compression: float | None = None
    max_quality_loss: float | None = None
    atol: float | None = None


@dataclass(frozen=True)
class ModelOptions(_Forgiving):
    """Which model, and what load() needs to know to read it.

    factory: "package.module:function" that builds the module for a state_dict.
    input_specs: "name:1x128:int64" or with named dynamic axes "ids:batchxseq".
    data: npz or safetensors with example inputs by name.
    """

    model: Path
    factory: str | None = None
    input_specs: tuple[str, ...] = ()
    data: Path | None = None
    trust_pickle: bool = False


@dataclass(frozen=True)
class ExportOptions(ModelOptions):
    """One run from a model to a verified deployment directory.

    output: the directory; None means out/<model name>-<target>.
    min_shapes, opt_shapes, max_shapes: "ids:1x16", one per input, for the TensorRT profile and,
    opt, for the choice of the ONNX Runtime kernel and the shapes that are measured.
    calibration: how trits and scales are chosen from data ("none", "scale", "trits"), None: "trits"
    where there is data. sensitivity: measure what each layer alone costs. keep_budget: a fraction
    of the layers' float32 bytes that may be spent on keeping sensitive layers at int8.
    metric: "package.module:function"; metric_data: the file it reads, default data.
    threads: ONNX Runtime threads for verify and bench, None for its own default.
    kv_cache: a decoder's cache becomes inputs and outputs (load/kv_cache.py).
    finetune_steps: 0 leaves fine-tuning out. embeddings: None leaves them to the recipe.
    compute_capabilities: "7.5", of the cards trt-rtx builds for, one engine each, or with
    portable_engine one for all. embed_plugin: trt engines carry the plugin library. triton: a
    directory that gets a Triton Inference Server model repository. compress: model.onnx is kept
    as model.onnx.zst, which load_session decodes; targets onnx and ort.
    """

    target: str = "ort"
    output: Path | None = None
    kv_cache: bool = False
    ternary: TernaryOptions = field(default_factory=TernaryOptions)
    dtype: str = "fp32"
    opset: int | None = None
    ort_kernel: str = "auto"
    activation_scale: str = "row"
    embeddings: str | None = None
    skip_passes: tuple[str, ...] = ()
    min_shapes: tuple[str, ...] = ()
    opt_shapes: tuple[str, ...] = ()
    max_shapes: tuple[str, ...] = ()
    metric: str | None = None
    metric_data: Path | None = None
    per_layer: bool = False
    threads: int | None = None
    gates: GateOptions = field(default_factory=GateOptions)
    verify: bool = True
    bench: bool = True
    overwrite: bool = False
    keep_intermediate: bool = True
    compress: bool = False
    engine: bool = True
    compute_capabilities: tuple[str, ...] = ()
    portable_engine: bool = False
    embed_plugin: bool = False
    triton: Path | None = None
    seed: int = 0
    calibration: str | None = None
    sensitivity: bool = False
    keep_budget: float | None = None
    finetune_steps: int = 0

    @property
    def directory(self) -> Path:
        """output, or its default: out/<file stem or directory name>-<target>."""
        if self.output is not None:
            return self.output
        path = self.model.resolve()
        return Path("out") / f"{path.name if path.is_dir() else path.stem}-{self.target}"


@dataclass(frozen=True)
class FinetuneOptions(ModelOptions):
    """One label-free fine-tuning run; data is required: npz, safetensors or a directory of text.

    output: the ternary model file to write (a torch.export program), None: <model name>-ternary.pt.
    steps, batch_size, temperature: None leaves them to the recipe. lr None: the recipe's, or chosen
    by the number of parameters. labels: the name of the array in data that holds
    labels, None for pure distillation. eval_data: held-out data, None: the last tenth of data.
    checkpoint_dir: where to keep checkpoints, None: none kept. resume: go on from the newest one
    there. tokenizer: directory of a Hugging Face tokenizer, for data that is text.
    patience: evaluations without a new best before it stops, 0: never. accumulate: parts a batch is
    worked off in. recompute: save memory by computing activations twice. device: "cpu" or "cuda".
    parallel: how processes that torchrun or accelerate started share the work.
    """

    output: Path | None = None
    ternary: TernaryOptions = field(default_factory=TernaryOptions)
    steps: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    temperature: float | None = None
    labels: str | None = None
    eval_data: Path | None = None
    eval_every: int = 50
    checkpoint_dir: Path | None = None
    resume: bool = False
    patience: int = 0
    accumulate: int = 1
    recompute: bool = False
    parallel: str = "ddp"
    device: str = "cpu"
    tokenizer: Path | None = None
    max_length: int = 128
    bf16: bool = False
    threads: int | None = None
    overwrite: bool = False
    seed: int = 0

    @property
    def file(self) -> Path:
        """output, or its default: <file stem or directory name>-ternary.pt."""
        if self.output is not None:
            return self.output
        path = self.model.resolve()
        return Path(f"{path.name if path.is_dir() else path.stem}-ternary.pt")


@dataclass(frozen=True)
class ConvertOptions(ModelOptions):
    """A ternary model written as another checkpoint.

    to: "state-dict", "hf-bitnet" (packed) or "huggingface" (plain weights). output: the file or
    directory, None: beside the working directory, by the model's name. base: the Hugging Face
    directory that a file of finetune goes back to, None: the one that finetune recorded.
    """

    to: str = "state-dict"
    output: Path | None = None
    base: Path | None = None
    overwrite: bool = False

    @property
    def path(self) -> Path:
        """output, or its default: <name>-weights.safetensors, <name>-hf-bitnet, ..."""
        if self.output is not None:
            return self.output
        model = self.model.resolve()
        name = model.name if model.is_dir() else model.stem
        end = "weights.safetensors" if self.to == "state-dict" else self.to
        return Path(f"{name}-{end}")


@dataclass(frozen=True)
class VerifyOptions(_Forgiving):
    """Check a directory that an export wrote, again and on this machine.

    reference: the full-precision model (anything load() takes) for the quality comparison, with
    its factory, input_specs and trust_pickle as in ModelOptions; None: the one the export kept in
    the directory. data: inputs to judge quality on, None: the report's own random ones.
    """

    directory: Path
    reference: Path | None = None
    factory: str | None = None
    input_specs: tuple[str, ...] = ()
    data: Path | None = None
    trust_pickle: bool = False
    metric: str | None = None
    metric_data: Path | None = None
    per_layer: bool = False
    threads: int | None = None
    gates: GateOptions = field(default_factory=GateOptions)
    seed: int = 0


@dataclass(frozen=True)
class BenchOptions(_Forgiving):
    """Measure a directory that an export wrote, against full precision where it is there.

    baseline: a full-precision ONNX file; None: the one the export kept in the directory.
    shapes: "batch=1,sequence=16"; empty: those of the manifest. threads: one measurement each.
    samples: timed runs for each side and shape.
    """

    directory: Path
    baseline: Path | None = None
    shapes: tuple[str, ...] = ()
    threads: tuple[int, ...] = ()
    samples: int = 50
    gates: GateOptions = field(default_factory=GateOptions)
    seed: int = 0
