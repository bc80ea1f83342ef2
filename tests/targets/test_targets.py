"""Targets: which passes they plan, which kernel ort picks and why, and what they refuse."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper

from bitnet_export import onnx_io, op
from bitnet_export.errors import MissingRequirement, UsageError
from bitnet_export.options import ExportOptions
from bitnet_export.targets import target_for
from bitnet_export.targets.ort import TWO_BIT_ROWS, check_onnxruntime, choose_kernel, rows_per_run
from tests.passes.graphs import (
    model,
    node,
    ops,
    reference,
    run,
    ternary_case,
    ternary_layer,
    ternary_model,
    value,
    x_of,
)


def options(tmp_path, **changes):
    return ExportOptions(model=tmp_path / "m.onnx", **changes)


def lower(tmp_path, made, target="ort", sizes=None, **changes):
    lowered = target_for(target).lower(
        made, options(tmp_path, target=target, **changes), sizes or {}
    )
    onnx_io.check_model(lowered.model, target)
    return lowered


# --- the kernel ------------------------------------------------------------------------------


def sequence_model():
    """ids [batch, sequence] -> embedding -> TernaryMatMul: rows = batch x sequence."""
    case, constants = ternary_case(64, 8), {"table": x_of(20, 64)}
    nodes = [
        node("Gather", ["table", "ids"], ["h"]),
        ternary_layer("fc", "h", "y", case, constants),
    ]
    ids = value("ids", ["batch", "sequence"], "int64")
    return model(nodes, [ids], [value("y", ["batch", "sequence", 8])], constants)


def patch_model():
    """image [batch, 8, 8] -> 16 patches of 4 each -> ternary: rows = 16 x batch, by Reshape."""
    case, constants = ternary_case(4, 8), {"shape": np.array([-1, 4])}
    nodes = [
        node("Reshape", ["image", "shape"], ["rows"]),
        ternary_layer("patch", "rows", "p", case, constants),
        node("Relu", ["p"], ["y"]),
    ]
    return model(nodes, [value("image", ["batch", 8, 8])], [value("y", ["patches", 8])], constants)


@pytest.mark.parametrize(
    ("made", "sizes", "rows"),
    [
        (sequence_model(), {"batch": 1, "sequence": 16}, 16),
        (sequence_model(), {"batch": 4, "sequence": 1}, 4),
        (patch_model(), {"batch": 1}, 16),
        (patch_model(), {"batch": 3}, 48),
        (ternary_model(ternary_case(64, 4)), {"batch": 1}, 1),
        (ternary_model(ternary_case(64, 4), (7, None)), {}, 7),
        (ternary_model(ternary_case(64, 4), (None,)), {}, 1),
        (sequence_model(), {"batch": 1}, None),
    ],
    ids=["sequence", "batch", "patches", "patches x batch", "mlp", "static", "vector", "unknown"],
)
def test_rows_per_run(made, sizes, rows):
    before = made.SerializeToString()
    assert rows_per_run(made, sizes) == rows
    assert made.SerializeToString() == before


def test_rows_of_an_input_without_a_shape_are_unknown():
    made = ternary_model(ternary_case(64, 4))
    made.graph.input[0].type.tensor_type.ClearField("shape")
    assert rows_per_run(made, {"batch": 1}) is None


@pytest.mark.parametrize(
    ("rows", "choice"),
    [(1, "2bit"), (TWO_BIT_ROWS, "2bit"), (TWO_BIT_ROWS + 1, "int8"), (512, "int8")],
)
def test_auto_goes_by_rows_and_says_so(rows, choice):
    decision = choose_kernel(ternary_model(ternary_case(64, 4)), "auto", {"batch": rows})
    assert decision.choice == choice
    assert f"{rows} row" in decision.reason
    assert f"batch={rows}" in decision.reason


def test_auto_without_rows():
    decision = choose_kernel(sequence_model(), "auto", {"batch": 1})
    assert decision.choice == "int8"
    assert "could not be inferred" in decision.reason


@pytest.mark.parametrize("kernel", ["2bit", "int8"])
def test_what_was_asked_for(kernel):
    decision = choose_kernel(sequence_model(), kernel, {})
    assert (decision.choice, decision.reason) == (kernel, f"asked for with --ort-kernel {kernel}")


# --- ort -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "changes", "operator", "kinds"),
    [
        (dict(), dict(ort_kernel="int8"), "MatMulIntegerToFloat", ("int8",)),
        (dict(), dict(ort_kernel="2bit"), "MatMulNBits", ("2bit",)),
        (
            dict(),
            dict(ort_kernel="int8", activation_scale="tensor"),
            "DynamicQuantizeMatMul",
            ("int8-tensor",),
        ),
        (
            dict(scale="group", group_size=32),
            dict(ort_kernel="int8"),
            "MatMulNBits",
            ("2bit",),
        ),
        (dict(bits=0), dict(ort_kernel="int8"), "MatMulNBits", ("2bit",)),
    ],
    ids=["int8", "2bit", "tensor", "group", "float"],
)
def test_ort_lowers_everything(tmp_path, case, changes, operator, kinds):
    made = ternary_case(64, 8, **case)
    lowered = lower(tmp_path, ternary_model(made), sizes={"batch": 3}, embeddings="keep", **changes)
    assert ops(lowered.model).count(operator) == 1
    assert op.OP_TYPE not in ops(lowered.model)
    assert not lowered.model.functions
    assert lowered.parity_kinds == kinds
    assert lowered.requires == {"onnxruntime": "1.28"}
    (decision,) = lowered.decisions
    assert decision.choice == ("2bit" if "2bit" in kinds else "int8")
    x = x_of(3, 64)
    want = reference(x, made)
    np.testing.assert_allclose(run(lowered.model, x=x)["y"], want, atol=0.03 * np.abs(want).max())


def test_layers_without_an_int8_form_run_as_2bit_beside_the_others(tmp_path):
    constants = {}
    nodes = [
        ternary_layer("a", "x", "h", ternary_case(64, 64), constants),
        ternary_layer("b", "h", "y", ternary_case(64, 8, scale="group", group_size=32), constants),
    ]
    made = model(nodes, [value("x", ["batch", 64])], [value("y", ["batch", 8])], constants)
    lowered = lower(tmp_path, made, sizes={"batch": 64}, embeddings="keep")
    assert lowered.decisions[0].choice == "int8"
    assert lowered.parity_kinds == ("int8", "2bit")
    assert {"MatMulIntegerToFloat", "MatMulNBits"} <= set(ops(lowered.model))
    (result,) = [r for r in lowered.passes if r.name == "lower-int8"]
    assert [s.where for s in result.skipped] == ["b"]


@pytest.mark.parametrize(
    ("embeddings", "skip", "kind"),
    [
        ("int8", (), "embeddings-int8"),
        ("int4", (), "embeddings-int4"),
        ("keep", (), None),
        ("int8", ("quantize-embeddings",), None),
    ],
)
@pytest.mark.parametrize("target", ["ort", "onnx"])
def test_embeddings_are_in_the_tolerance(tmp_path, target, embeddings, skip, kind):
    lowered = lower(tmp_path, sequence_model(), target, embeddings=embeddings, skip_passes=skip)
    found = [k for k in lowered.parity_kinds if k.startswith("embeddings")]
    assert found == ([kind] if kind else [])


def test_float16_is_refused_with_a_remedy(tmp_path):
    with pytest.raises(UsageError, match="--dtype fp16: ONNX Runtime's CPU kernels") as caught:
        lower(tmp_path, sequence_model(), dtype="fp16")
    assert "--target onnx" in caught.value.fix


@pytest.mark.parametrize("version", ["1.23.0", "1.27.2"])
def test_an_old_onnxruntime_is_refused(tmp_path, monkeypatch, version):
    monkeypatch.setattr(onnxruntime, "__version__", version)
    with pytest.raises(MissingRequirement, match=f"needs ONNX Runtime 1.28 .* {version} is inst"):
        lower(tmp_path, sequence_model())


def test_no_onnxruntime_is_refused(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingRequirement, match="is not installed") as caught:
        check_onnxruntime()
    assert "bitnet-export[ort]" in caught.value.fix


# --- onnx ------------------------------------------------------------------------------------


def test_onnx_keeps_the_op_with_its_body(tmp_path):
    case = ternary_case(64, 8)
    lowered = lower(tmp_path, ternary_model(case), "onnx")
    assert ops(lowered.model) == [op.OP_TYPE]
    assert [f.domain for f in lowered.model.functions] == [op.DOMAIN]
    assert not lowered.requires
    x = x_of(3, 64)
    np.testing.assert_allclose(run(lowered.model, x=x)["y"], reference(x, case), atol=1e-5)


def test_onnx_in_half_precision(tmp_path):
    lowered = lower(tmp_path, sequence_model(), "onnx", dtype="fp16", embeddings="keep")
    assert next(r.name for r in lowered.passes) == "to-fp16"
    assert "fp16" in lowered.parity_kinds
    tables = [t for t in lowered.model.graph.initializer if list(t.dims) == [20, 64]]
    assert [t.data_type for t in tables] == [onnx.TensorProto.FLOAT16]


def test_an_unknown_target():
    with pytest.raises(UsageError, match="--target: 'cuda' is no target") as caught:
        target_for("cuda")
    assert "ort" in caught.value.fix


def test_outputs_keep_their_order_and_names(tmp_path):
    constants = {}
    nodes = [
        ternary_layer(n, "x", n, ternary_case(64, 8, seed=i), constants)
        for i, n in enumerate("qkv")
    ]
    made = model(
        nodes, [value("x", ["batch", 64])], [value(n, ["batch", 8]) for n in "vqk"], constants
    )
    for target in ("ort", "onnx"):
        lowered = lower(tmp_path, made, target, sizes={"batch": 8})
        assert [o.name for o in lowered.model.graph.output] == ["v", "q", "k"]
        assert helper.printable_graph(lowered.model.graph)
