"""Recipes: for each kind of model what becomes ternary, how, and how it is fine-tuned. Data.

A recipe sets fields of TernaryConfig and FinetuneConfig by their names, and how embedding tables
are stored; whatever the user says explicitly wins. To tune one, edit its entry in RECIPES:
nothing outside this file looks at a recipe's name. What the values do is in config.py, distill.py
and docs/recipes.md.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bitnet_export.errors import UsageError
from bitnet_export.ternary.config import TernaryConfig

if TYPE_CHECKING:
    import onnx
    from torch import Tensor, nn

    from bitnet_export.ternary.distill import FinetuneConfig

_EMBEDDING_NAMES = ("hidden", "embed", "pool")
_CAUSAL_CLASSES = ("forcausallm", "lmheadmodel")


@dataclass(frozen=True)
class Traits:
    """What choosing a recipe needs to know of a model.

    class_name: the model's class, or the first of a Hugging Face config's architectures.
    bitnet: it has Hugging Face BitNet layers. convolutions: it has any. table_rows: rows of its
    largest embedding table, 0 for none. output: the name of its main output ("" if it has none),
    output_width: that output's last dimension, None where it is not known.
    """

    class_name: str = ""
    bitnet: bool = False
    convolutions: bool = False
    table_rows: int = 0
    output: str = ""
    output_width: int | None = None


@dataclass(frozen=True)
class Recipe:
    """One way to make a kind of model ternary.

    ternary: fields of TernaryConfig it sets. finetune: fields of FinetuneConfig it sets.
    embeddings: "keep", "int8" or "int4". calibration: what an export with data and without
    training does. source: the paper or measurement behind it.
    suits: Traits -> the reason why the recipe fits such a model, or "" if it does not.
    """

    name: str
    summary: str
    source: str
    suits: Callable[[Traits], str] = field(repr=False, compare=False)
    ternary: Mapping[str, Any] = field(default_factory=dict)
    finetune: Mapping[str, Any] = field(default_factory=dict)
    embeddings: str = "int8"
    calibration: str = "trits"

    def config(self, **explicit: Any) -> TernaryConfig:
        """The recipe's TernaryConfig; explicit fields that are not None win over it.

        A granularity given without a group size leaves the recipe's group size out, too.
        """
        given = {name: value for name, value in explicit.items() if value is not None}
        if given.get("granularity", "group") != "group":
            given.setdefault("group_size", 0)
        return TernaryConfig(**{**self.ternary, **given})

    def finetune_config(self, **explicit: Any) -> FinetuneConfig:
        """The recipe's FinetuneConfig; explicit fields that are not None win over it."""
        from bitnet_export.ternary.distill import FinetuneConfig

        given = {name: value for name, value in explicit.items() if value is not None}
        return FinetuneConfig(**{**self.finetune, **given})


def _is_bitnet(traits: Traits) -> str:
    return "the model has BitNet layers" if traits.bitnet else ""


def _is_vision(traits: Traits) -> str:
    return "the model has convolutions" if traits.convolutions else ""


def _is_decoder(traits: Traits) -> str:
    name = traits.class_name
    if name.lower().endswith(_CAUSAL_CLASSES):
        return f"{name} predicts the next token"
    if "MaskedLM" in name or not traits.table_rows or traits.output_width != traits.table_rows:
        return ""
    return f"its output is as wide as its vocabulary ({traits.table_rows})"


def _is_embedding(traits: Traits) -> str:
    named = any(word in traits.output.lower() for word in _EMBEDDING_NAMES)
    return f"its main output is {traits.output}" if traits.table_rows and named else ""


def _is_anything(traits: Traits) -> str:
    return "no other recipe fits: it serves encoders, classifiers and plain networks"


# In the order they are tried; the last one suits every model.
_ALL = (
    Recipe(
        name="bitnet-b1.58",
        summary="Models trained as BitNet: their own arithmetic, absmean and one scale a layer.",
        source="arXiv:2402.17764",
        suits=_is_bitnet,
        ternary={"quantizer": "absmean", "granularity": "tensor", "activation_bits": 8},
    ),
    Recipe(
        name="decoder",
        summary="Language models that predict the next token.",
        source="arXiv:1605.04711, arXiv:2510.13998",
        suits=_is_decoder,
        ternary={"quantizer": "twn", "granularity": "channel", "activation_bits": 8},
        # SmolLM2-135M after 300 steps: perplexity 238, at 8e-4 264, at 1e-4 693 (docs/accuracy.md).
        finetune={"objective": "logits", "temperature": 1.0, "large_lr": 1.6e-3},
    ),
    Recipe(
        name="vision",
        summary="Convolutional networks and vision transformers.",
        source="arXiv:1605.04711; docs/accuracy.md, digits",
        suits=_is_vision,
        ternary={"quantizer": "twn", "granularity": "channel", "activation_bits": 8},
        finetune={"temperature": 2.0},
    ),
    Recipe(
        name="embedding",
        summary="Encoders whose vectors are compared: sentence and text embeddings.",
        source="arXiv:1605.04711; docs/accuracy.md, MiniLM",
        suits=_is_embedding,
        ternary={"quantizer": "twn", "granularity": "channel", "activation_bits": 8},
        # Many small steps: at equal sentences 16 a step do better than 32 (docs/decisions.md).
        finetune={
            "objective": "embedding",
            "cosine_weight": 5.0,
            "steps": 480,
            "batch_size": 16,
        },
        # It halves the layers' errors, yet similarities rank worse than without (docs/accuracy.md).
        calibration="none",
    ),
    Recipe(
        name="encoder",
        summary="Encoders with a head, classifiers, plain networks: what fits nothing else.",
        source="arXiv:1605.04711; docs/accuracy.md",
        suits=_is_anything,
        ternary={"quantizer": "twn", "granularity": "channel", "activation_bits": 8},
        finetune={"temperature": 2.0},
    ),
)
RECIPES: dict[str, Recipe] = {recipe.name: recipe for recipe in _ALL}


def find(name: str) -> Recipe:
    """The recipe of that name. Raises UsageError for an unknown one."""
    if name not in RECIPES:
        raise UsageError(
            f"{name!r} is no recipe", where="--recipe", fix=f"choose from {', '.join(RECIPES)}"
        )
    return RECIPES[name]


def choose(traits: Traits) -> tuple[Recipe, str]:
    """The first recipe that suits, and why it does."""
    for recipe in _ALL:
        if reason := recipe.suits(traits):
            return recipe, reason
    raise AssertionError("the last recipe suits everything")


def traits_of(
    module: nn.Module,
    example_inputs: Mapping[str, Tensor] | None = None,
    hf_config: Any = None,
    output_names: Sequence[str] | None = None,
) -> Traits:
    """Look at a module, and at its output where example inputs let it be called once.

    output_names: names that the file gives outputs the module returns without any.
    """
    from torch import nn

    from bitnet_export.load.hf_bitnet import BitNetLinear, is_hf_bitnet

    classes = getattr(hf_config, "architectures", None) or [type(module).__name__]
    tables = [m.num_embeddings for m in module.modules() if isinstance(m, nn.Embedding)]
    name, width = (
        _main_output(module, example_inputs, output_names) if example_inputs else ("", None)
    )
    return Traits(
        class_name=classes[0],
        bitnet=any(isinstance(m, BitNetLinear) or is_hf_bitnet(m) for m in module.modules()),
        convolutions=any(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules()),
        table_rows=max(tables, default=0),
        output=name,
        output_width=width,
    )


def traits_of_onnx(model: onnx.ModelProto) -> Traits:
    """The same for an ONNX graph: operators, tables that Gather reads, the first output."""
    graph = model.graph
    shapes = {tensor.name: tuple(tensor.dims) for tensor in graph.initializer}
    read = [shapes.get(n.input[0], ()) for n in graph.node if n.op_type == "Gather"]
    width = None
    if graph.output and graph.output[0].type.tensor_type.shape.dim:
        width = graph.output[0].type.tensor_type.shape.dim[-1].dim_value or None
    return Traits(
        convolutions=any(n.op_type == "Conv" for n in graph.node),
        table_rows=max((shape[0] for shape in read if len(shape) == 2), default=0),
        output=graph.output[0].name if graph.output else "",
        output_width=width,
    )


def _main_output(
    module: nn.Module, example_inputs: Mapping[str, Tensor], output_names: Sequence[str] | None
) -> tuple[str, int | None]:
    """(name, last dimension) of what the module returns."""
    import torch
    from torch import Tensor

    from bitnet_export.ternary.calling import call
    from bitnet_export.ternary.losses import primary_output

    try:
        with torch.no_grad():
            outputs = call(module, example_inputs)
        if output_names and not isinstance(outputs, Mapping):
            values = [outputs] if isinstance(outputs, Tensor) else list(outputs)
            outputs = dict(zip(output_names, values, strict=False))
        name, tensor = primary_output(outputs)
    except Exception:
        # The export, which runs the model next, says what is wrong and how to mend it; a model
        # that only returns class numbers is one to export, too.
        return "", None
    return name, tensor.shape[-1] if tensor.dim() else None
