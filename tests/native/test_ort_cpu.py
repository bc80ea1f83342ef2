"""The ONNX Runtime CPU library against op.py, on every instruction path this processor has.

The paths it lacks are run by the emulated ctest suite (plugins/tests/cpu). Numbers are exact with
int8 activations: integer sums, then float32 operations in one order.
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from bitnet_export import op, packing
from bitnet_export.native import find_library, search_library

from .conftest import Unavailable

Array = npt.NDArray[Any]
# Instruction paths, and the processor flag each needs.
PATHS = {"portable": "", "avx2": "avx2", "avxvnni": "avx_vnni", "avx512vnni": "avx512_vnni"}
OPSET = 20


def paths_here() -> list[str]:
    """The paths this processor can run, as Linux lists its abilities."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split() if cpuinfo.is_file() else ())
    return [path for path, flag in PATHS.items() if not flag or flag in flags]


@pytest.fixture(scope="session")
def library(unavailable: Unavailable) -> Path:
    """The library that would be shipped."""
    if search_library("ort_cpu").chosen is None:
        unavailable("the ONNX Runtime CPU library is not built: run make native")
    return find_library("ort_cpu").path


class Layer:
    """A random layer: its operands, its one-node model and its reference."""

    def __init__(self, attributes: op.TernaryAttributes, *, seed: int = 0, **options: Any) -> None:
        self.attributes = attributes
        self.half = options.get("half", False)
        random = np.random.default_rng(seed)
        k, n = attributes.K, attributes.N
        self.packed: Array = packing.pack(random.integers(-1, 2, (n, k)))
        shapes = attributes.scale_shapes()
        shape = shapes[-1 if options.get("channel", True) else 0]
        self.scale: Array = random.uniform(0.01, 1, shape).astype(np.float32)
        self.bias: Array | None = None
        if options.get("bias", True):
            self.bias = random.standard_normal(n).astype(np.float32)

    @property
    def dtype(self) -> type[np.floating[Any]]:
        return np.float16 if self.half else np.float32

    def operands(self) -> dict[str, Array]:
        given = {"packed": self.packed, "scale": self.scale, "bias": self.bias}
        return {name: value for name, value in given.items() if value is not None}

    def model(self, *, body: bool = False, constant: bool = True, shape: Any = ("b", "s")) -> bytes:
        """shape: X's leading dimensions, None for a model that does not say."""
        at, operands = self.attributes, self.operands()
        element = TensorProto.FLOAT16 if self.half else TensorProto.FLOAT
        node = helper.make_node(
            op.OP_TYPE, ["X", *operands], ["Y"], "layer.0", domain=op.DOMAIN, **at.as_dict()
        )
        x_shape, y_shape = ([*shape, at.K], [*shape, at.N]) if shape is not None else (None, None)
        inputs = [helper.make_tensor_value_info("X", element, x_shape)]
        tensors = [numpy_helper.from_array(value, name) for name, value in operands.items()]
        if not constant:
            inputs += [helper.make_tensor_value_info(t.name, t.data_type, t.dims) for t in tensors]
        outputs = [helper.make_tensor_value_info("Y", element, y_shape)]
        graph = helper.make_graph([node], "g", inputs, outputs, tensors if constant else [])
        imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(op.DOMAIN, 1)]
        functions = [op.function_body(OPSET)] if body else []
        model = helper.make_model(graph, opset_imports=imports, functions=functions, ir_version=10)
        return model.SerializeToString()

    def activations(self, *leading: int, seed: int = 1) -> Array:
        x = np.random.default_rng(seed).standard_normal((*leading, self.attributes.K))
        return x.astype(self.dtype)

    def reference(self, x: Array) -> Array:
        return op.reference_ternary_matmul(
            x, self.packed, self.scale, self.bias, attributes=self.attributes
        )


def open_session(model: bytes, library: Path | None, **options: Any) -> ort.InferenceSession:
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    settings.intra_op_num_threads = options.pop("threads", 1)
    for name, value in options.items():
        setattr(settings, name, value)
    if library:
        settings.register_custom_ops_library(str(library))
    return ort.InferenceSession(model, settings, providers=["CPUExecutionProvider"])


def check(layer: Layer, got: Array, x: Array) -> None:
    want = layer.reference(x)
    assert got.dtype == want.dtype
    assert got.shape == want.shape
    at = layer.attributes
    if at.activation_bits and at.groups < 8:  # NumPy adds fewer than 8 numbers in order
        np.testing.assert_array_equal(got, want)
        return
    # Another order of float32 additions; one rounding to float16 may then differ too.
    terms = np.abs(x.astype(np.float64)).max(initial=1.0) * np.sqrt(at.K) * layer.scale.max()
    atol = 1e-6 * terms + (np.abs(want).max(initial=0) * 1e-3 if layer.half else 0)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=atol)


@pytest.fixture(params=paths_here())
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each path that runs here, forced."""
    monkeypatch.setenv("BITNET_CPU_PATH", request.param)
    return str(request.param)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Layer, tuple[int, ...]]:
    groups = draw(st.integers(0, 9))
    size = draw(st.integers(1, 80 if groups else 400))
    k, n = size * max(groups, 1), draw(st.integers(1, 80))
    at = op.TernaryAttributes(k, n, size if groups else 0, draw(st.sampled_from((8, 8, 0))))
    options = {name: draw(st.booleans()) for name in ("half", "channel", "bias")}
    leading = draw(st.lists(st.integers(1, 6), min_size=2, max_size=2))
    return Layer(at, seed=draw(st.integers(0, 99)), **options), tuple(leading)


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(case=layers())
def test_any_layer(path: str, library: Path, case: tuple[Layer, tuple[int, ...]]) -> None:
    layer, leading = case
    x = layer.activations(*leading)
    check(layer, open_session(layer.model(), library).run(None, {"X": x})[0], x)


@pytest.mark.parametrize("m", [1, 2, 3, 5, 8, 17, 33])
@pytest.mark.parametrize(("k", "n"), [(384, 1152), (1536, 384), (65, 63), (100, 1)])
def test_shapes_of_a_model(path: str, library: Path, m: int, k: int, n: int) -> None:
    layer = Layer(op.TernaryAttributes(k, n))
    x = layer.activations(1, m)
    check(layer, open_session(layer.model(), library).run(None, {"X": x})[0], x)


@pytest.mark.parametrize("bits", [8, 0])
def test_not_a_number(path: str, library: Path, bits: int) -> None:
    layer = Layer(op.TernaryAttributes(70, 20, activation_bits=bits))
    x = layer.activations(1, 4)
    x[0, 1, 3], x[0, 2, 69] = np.nan, -np.inf
    y = open_session(layer.model(), library).run(None, {"X": x})[0]
    assert np.isnan(y[0, 1]).all()
    assert not np.isfinite(y[0, 2]).any()
    assert np.isfinite(y[0, [0, 3]]).all()


@pytest.mark.parametrize("name", PATHS)
def test_a_path_runs_or_is_refused(
    name: str, library: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BITNET_CPU_PATH", name)
    layer = Layer(op.TernaryAttributes(100, 33))
    if name in paths_here():
        x = layer.activations(1, 3)
        check(layer, open_session(layer.model(), library).run(None, {"X": x})[0], x)
    else:
        with pytest.raises(Exception, match=r"BITNET_CPU_PATH names .* cannot run"):
            open_session(layer.model(), library)


def test_the_op_wins_over_the_function_body(library: Path, tmp_path: Path) -> None:
    layer = Layer(op.TernaryAttributes(192, 70))
    model, x = layer.model(body=True), layer.activations(2, 5)
    kept = {"optimized_model_filepath": str(tmp_path / "native.onnx")}
    native = open_session(model, library, **kept).run(None, {"X": x})[0]
    nodes = onnx.load(tmp_path / "native.onnx").graph.node
    assert [node.op_type for node in nodes] == [op.OP_TYPE]
    kept = {"optimized_model_filepath": str(tmp_path / "body.onnx")}
    body = open_session(model, None, **kept).run(None, {"X": x})[0]
    assert op.OP_TYPE not in {node.op_type for node in onnx.load(tmp_path / "body.onnx").graph.node}
    np.testing.assert_array_equal(native, body)


def test_weights_that_are_not_constant(library: Path) -> None:
    layer = Layer(op.TernaryAttributes(100, 33))
    x = layer.activations(1, 3)
    session = open_session(layer.model(constant=False), library)
    check(layer, session.run(None, {"X": x, **layer.operands()})[0], x)


@pytest.mark.parametrize("shape", [None, (None, None), (2, 7), ("b", 7)])
def test_what_is_known_of_the_shape(library: Path, shape: Any) -> None:
    layer = Layer(op.TernaryAttributes(48, 9))
    session, x = open_session(layer.model(shape=shape), library), layer.activations(2, 7)
    check(layer, session.run(None, {"X": x})[0], x)


def test_no_rows(library: Path) -> None:
    layer = Layer(op.TernaryAttributes(48, 9))
    y = open_session(layer.model(), library).run(None, {"X": layer.activations(0, 7)})[0]
    assert y.shape == (0, 7, 9)


@pytest.mark.parametrize("m", [1, 7, 200])
def test_threads_change_nothing(library: Path, m: int) -> None:
    layer = Layer(op.TernaryAttributes(512, 700))
    model, x = layer.model(), layer.activations(1, m)
    alone, four = (open_session(model, library, threads=t) for t in (1, 4))
    want = alone.run(None, {"X": x})[0]
    check(layer, want, x)
    results: list[Array] = []
    runs = [
        threading.Thread(target=lambda: results.append(four.run(None, {"X": x})[0]))
        for _ in range(4)
    ]
    for run in runs:
        run.start()
    for run in runs:
        run.join()
    assert len(results) == 4
    for got in results:
        np.testing.assert_array_equal(got, want)
