"""An output directory as a thing to check and measure: its files, its inputs, its shapes.

What is done with it is in assess.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bitnet_export import manifest, op
from bitnet_export.compress import PlainModel
from bitnet_export.errors import InputError
from bitnet_export.targets.session import native_library

if TYPE_CHECKING:
    import onnx

    from bitnet_export.load import LoadedModel
    from bitnet_export.options import BenchOptions, VerifyOptions
    from bitnet_export.verify.feeds import Case, Sizes

INPUTS = f"{manifest.INTERMEDIATE}/inputs.npz"


@dataclass
class Subject:
    """A directory with its manifest, and the torch module where there still is one."""

    directory: Path
    record: manifest.Manifest
    module: Any = None
    example_inputs: dict[str, Any] | None = None
    threads: int | None = None
    seed: int = 0
    plain: PlainModel | None = None

    @property
    def baseline(self) -> Path:
        """The full-precision ONNX."""
        return self.directory / manifest.BASELINE

    @property
    def ternary(self) -> Path:
        """The ONNX with one TernaryMatMul a layer."""
        return self.directory / manifest.TERNARY

    @property
    def model(self) -> Path:
        """What is deployed, decompressed where it is at rest."""
        if self.plain is None:
            self.plain = PlainModel(self.directory / manifest.MODEL)
        return self.plain.path

    @property
    def native(self) -> Path | None:
        """The native library the model runs with here, as load_session would choose it."""
        return native_library() if self.record.target == "onnx" else None

    @property
    def fuse(self) -> bool:
        """Whether ONNX Runtime may fuse int4 weights into its own kernel, which is less exact than
        the TensorRT-RTX that the model is for."""
        return self.record.target != "trt-rtx"

    def examples(self) -> dict[str, Any]:
        """Example inputs by name, from memory or from the directory."""
        if self.example_inputs is not None:
            return self.example_inputs
        with np.load(self.directory / INPUTS) as arrays:
            return {name: arrays[name] for name in arrays.files}

    def cases(self, shapes: Sequence[Sizes]) -> list[Case]:
        """The inputs to run, the same ones whenever the directory is checked."""
        from bitnet_export.verify.feeds import make_cases

        return make_cases(shapes, self.examples(), self.record.dynamic_axes, seed=self.seed)

    def refused(self, cases: Sequence[Case]) -> dict[str, str]:
        """The labels, with reasons, of cases that a file made elsewhere breaks on as it was."""
        from bitnet_export.verify.original import refused_cases

        if self.record.model["kind"] != "onnx" or not self.baseline.is_file():
            return {}
        return refused_cases(self.baseline, cases, self.threads)


def input_arrays(loaded: LoadedModel) -> dict[str, np.ndarray]:
    """The example inputs as arrays, to be kept in the directory."""
    from bitnet_export.verify.feeds import as_arrays

    return as_arrays(loaded.example_inputs)


def named_axes(loaded: LoadedModel) -> dict[str, dict[int, str]] | None:
    """dynamic_axes as load.save takes them."""
    return loaded.dynamic_axes or None


def describe_graph(
    model: onnx.ModelProto, loaded: LoadedModel
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The manifest's inputs (dtype, shape with axis names) and output names."""
    from onnx import helper

    inputs: dict[str, dict[str, Any]] = {}
    for value in model.graph.input:
        tensor = value.type.tensor_type
        named = loaded.dynamic_axes.get(value.name, {})
        shape = [
            d.dim_value or named.get(axis) or d.dim_param for axis, d in enumerate(tensor.shape.dim)
        ]
        dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.elem_type)).name
        inputs[value.name] = {"dtype": dtype, "shape": shape}
    return inputs, [value.name for value in model.graph.output]


def ternary_layer_names(model: onnx.ModelProto) -> list[str]:
    """The layer path of every TernaryMatMul."""
    from bitnet_export.verify.layers import layer_name

    return [layer_name(n) for n in model.graph.node if n.op_type == op.OP_TYPE]


def open_directory(options: VerifyOptions | BenchOptions) -> Subject:
    """Check the manifest of a directory and open it. Raises InputError saying what is wrong."""
    record = manifest.check_manifest(options.directory)
    threads = getattr(options, "threads", None)
    subject = Subject(
        options.directory,
        record,
        threads=threads if isinstance(threads, int) else None,
        seed=options.seed,
    )
    if not (options.directory / INPUTS).is_file():
        raise no_intermediate(subject)
    return subject


def shapes_of(subject: Subject) -> list[Sizes]:
    """The axis sizes an opened directory is compared at."""
    from bitnet_export.verify.feeds import derive_shapes

    record = subject.record
    return derive_shapes(subject.examples(), record.dynamic_axes, None, record.opt_sizes or None)


def no_intermediate(subject: Subject) -> InputError:
    """For a directory without the full-precision model that something needs."""
    return InputError(
        "holds no full-precision model to compare with: it was written with --no-keep-intermediate "
        f"or {manifest.INTERMEDIATE}/ was deleted",
        where=str(subject.directory),
        fix=f"export again and keep {manifest.INTERMEDIATE}/, which has the inputs, too",
    )
