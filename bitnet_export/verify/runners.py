"""Implementations of a model as Polygraphy runners: an ONNX file, a torch module, saved results.

What is compared with what, and
how close it must be, is parity.py's business; timing is speed.py's.
"""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import RunResults
from polygraphy.logger import G_LOGGER

from bitnet_export import onnx_io
from bitnet_export.errors import InputError, StageError
from bitnet_export.load.data import as_dtype
from bitnet_export.targets.session import CPU, open_session

if TYPE_CHECKING:
    import torch


# Bytes of an ONNX file from which it is run frugally where it runs a few times only. Twenty times
# as much would be in memory once its 2-bit weights are unpacked (docs/decisions.md).
FRUGAL_BYTES = 100_000_000


def run_frugally(path: Path) -> bool:
    """Whether unpacking the weights of an ONNX file for good would take gigabytes."""
    files = (path, onnx_io.data_file(path))
    return sum(file.stat().st_size for file in files if file.is_file()) > FRUGAL_BYTES


# ONNX Runtime's names of the types that numpy has, too.
_DTYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(double)": "float64",
    "tensor(bool)": "bool",
} | {
    f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)
}


def run_session(
    session: Any, feeds: dict[str, np.ndarray], outputs: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """Outputs by name, all or those asked for; feeds the graph does not take are left out (an
    exporter may drop one), the others are given in its dtypes. Raises InputError for values that do
    not fit them."""
    wanted = {i.name: i.type for i in session.get_inputs()}
    given = {name: array for name, array in feeds.items() if name in wanted}
    for name, array in given.items():
        dtype = _DTYPES.get(wanted[name])
        if dtype is not None:
            given[name] = as_dtype(np.asarray(array), dtype, name, "feeds")
    names = [o.name for o in session.get_outputs()] if outputs is None else list(outputs)
    return dict(zip(names, session.run(names, given), strict=True))


def onnx_runner(
    path: Path | str,
    name: str,
    *,
    threads: int | None = None,
    provider: str = CPU,
    native: Path | None = None,
    fuse: bool = True,
    frugal: bool = False,
) -> BaseRunner:
    """A Polygraphy runner on an ONNX file. The session is made when the runner is activated.

    native: a library of custom operators to run it with. fuse, frugal: as open_session's."""

    def open_it() -> Any:
        return open_session(
            path, threads=threads, provider=provider, native=native, fuse=fuse, frugal=frugal
        )

    return OnnxrtRunner(open_it, name=name)


class TorchRunner(BaseRunner):
    """A torch module as a Polygraphy runner.

    module: in eval mode; called with the feeds in order of example_inputs. output_names: the
    names of the ONNX outputs, to which the flattened tensors of the module's result are matched
    in order, as torch.onnx.export does.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        example_inputs: dict[str, torch.Tensor],
        output_names: Sequence[str],
        name: str = "torch",
    ) -> None:
        super().__init__(name=name, prefix="torch-runner")
        self._module = module
        self._dtypes = {key: value.dtype for key, value in example_inputs.items()}
        self._ranks = {key: value.ndim for key, value in example_inputs.items()}
        self._output_names = tuple(output_names)

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names, dtypes and ranks; every dimension counts as dynamic."""
        metadata = TensorMetadata()
        for name, dtype in self._dtypes.items():
            metadata.add(name, dtype=dtype, shape=(None,) * self._ranks[name])
        return metadata

    def infer_impl(self, feed_dict: dict[str, Any]) -> OrderedDict[str, np.ndarray]:
        """Run the module without gradients."""
        import torch

        arguments = [torch.as_tensor(feed_dict[name]) for name in self._dtypes]
        start = time.perf_counter()
        with torch.no_grad():
            result = self._module(*arguments)
        self.inference_time = time.perf_counter() - start
        leaves = [t for t in torch.utils._pytree.tree_leaves(result) if torch.is_tensor(t)]
        if len(leaves) != len(self._output_names):
            raise StageError(
                f"the module returns {len(leaves)} tensors, the graph has outputs "
                f"{list(self._output_names)}",
                where=self.name,
            )
        arrays = (leaf.detach().cpu().numpy() for leaf in leaves)
        return OrderedDict(zip(self._output_names, arrays, strict=True))


def feed_function(session: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """session -> run(feeds) -> outputs by name: what the quality metrics call."""
    return lambda feeds: run_session(session, feeds)


def save_results(results: RunResults, path: Path) -> None:
    """Keep what a run put out, to compare it on another machine."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results.save(os.fspath(path))


def load_results(path: Path) -> RunResults:
    """Results that save_results or ``polygraphy run --save-outputs`` wrote. Raises InputError."""
    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            return RunResults.load(os.fspath(path))
    except Exception as error:
        raise InputError(
            f"holds no saved Polygraphy results ({error})",
            where=str(path),
            fix="write it with save_results or polygraphy run --save-outputs",
        ) from error
