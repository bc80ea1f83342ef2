"""Parity: what agrees passes with its stated tolerance, and everything else fails with a reason."""

import numpy as np
import pytest
import torch
from polygraphy.comparator import IterationResult

from bitnet_export import op, packing
from bitnet_export.errors import InputError, MissingRequirement, StageError
from bitnet_export.targets.session import open_session
from bitnet_export.verify.feeds import Case, derive_shapes, make_cases
from bitnet_export.verify.parity import Pair, compare_arrays, compare_case, run_parity
from bitnet_export.verify.runners import TorchRunner, load_results, onnx_runner, run_session
from bitnet_export.verify.tolerances import DEEP_LAYERS, TOLERANCES, tolerance_for
from tests.verify import models

torch.set_num_threads(1)


@pytest.fixture
def files(tmp_path):
    return {form: models.write(tmp_path / f"{form}.onnx", form) for form in models.FORMS}


def cases():
    example = models.example()
    return make_cases(derive_shapes(example, models.AXES), example, models.AXES)


def test_a_session_is_fed_in_its_own_dtypes(tmp_path):
    session = open_session(models.write(tmp_path / "m.onnx", "float"), threads=1)
    x = np.round(models.example()["x"] * 3)
    (expected,) = run_session(session, {"x": x}).values()
    for dtype in (np.float64, np.int8):
        (y,) = run_session(session, {"x": x.astype(dtype), "label": np.zeros(2)}).values()
        np.testing.assert_allclose(y, expected, rtol=1e-6)
    with pytest.raises(InputError, match="no float32, which the model takes"):
        run_session(session, {"x": x.astype(str)})


class Reference(torch.nn.Module):
    """The same two layers by the NumPy oracle."""

    def forward(self, x):
        layers = models.weights()
        y = x.numpy()
        for name in models.LAYERS:
            w, scale, bias = layers[name]
            at = op.TernaryAttributes(K=w.shape[1], N=w.shape[0])
            y = op.reference_ternary_matmul(y, packing.pack(w), scale, bias, attributes=at)
            y = np.maximum(y, 0) if name == "first" else y
        return torch.from_numpy(y)


def runner(path, name):
    return onnx_runner(path, name, threads=1)


def parity(files, pairs, **options):
    example = {"x": torch.zeros(2, models.K)}
    made = {"torch": TorchRunner(Reference().eval(), example, ["y"])}
    made |= {form: runner(path, form) for form, path in files.items()}
    return run_parity(made, pairs, cases(), **options)


def test_chain_of_three_agrees(files):
    pairs = [Pair("torch", "ternary", ("function",), 2), Pair("ternary", "nbits", ("2bit",), 2)]
    pairs.append(Pair("ternary", "unpacked", ("int8-tensor",), 2))
    rows = parity(files, pairs)
    assert [r for r in rows if not r.passed] == []
    assert {r.shape for r in rows} == {"batch=2", "batch=1", "batch=3"}
    assert {r.pair for r in rows} == {p.label for p in pairs}
    for row in rows:
        assert row.tolerance == pytest.approx(row.relative_tolerance * row.output_scale)
        assert 0 <= row.max_abs <= row.tolerance
        assert row.cosine >= row.min_cosine
        assert row.basis


def test_another_model_fails(tmp_path, files):
    wrong = models.write(tmp_path / "wrong.onnx", "ternary", seed=1)
    rows = parity({**files, "wrong": wrong}, [Pair("ternary", "wrong", ("2bit",), 2)])
    assert rows
    assert not any(r.passed for r in rows)
    assert all("exceeds" in r.reason for r in rows)


def test_one_wrong_row_of_weights_fails(tmp_path, files):
    """A single trit can hide behind noise here; test_exact.py finds it."""

    def negate(name, w, scale, bias):
        if name == "second":
            w = np.where(np.arange(len(w))[:, None] == 3, -w, w)
        return w, scale, bias

    wrong = models.write(tmp_path / "wrong.onnx", "ternary", edit=negate)
    rows = parity({**files, "wrong": wrong}, [Pair("torch", "wrong", ("function",), 2)])
    assert not any(r.passed for r in rows)


def test_nan_on_both_sides_fails(tmp_path):
    def poison(name, w, scale, bias):
        return w, scale, np.where(np.arange(bias.size) == 3, np.nan, bias).astype(np.float32)

    path = models.write(tmp_path / "nan.onnx", "ternary", edit=poison)
    made = {"a": runner(path, "a"), "b": runner(path, "b")}
    rows = run_parity(made, [Pair("a", "b", ("exact",), 2)], cases())
    assert len(rows) == 3
    for row in rows:
        assert not row.passed
        assert row.max_abs is None
        assert "NaN" in row.reason


def test_a_run_that_fails_is_a_failed_row_and_others_still_count(files):
    class Refuses(Reference):
        def forward(self, x):
            if x.shape[0] == 3:
                raise RuntimeError("no batch of three")
            return super().forward(x)

    example = {"x": torch.zeros(2, models.K)}
    made = {"torch": TorchRunner(Refuses(), example, ["y"]), "f": runner(files["ternary"], "f")}
    rows = run_parity(made, [Pair("torch", "f", ("function",), 2)], cases())
    assert [r.passed for r in rows] == [True, True, False]
    assert "no batch of three" in rows[2].reason
    assert rows[2].shape == "batch=3"


@pytest.mark.parametrize(
    ("reference", "other", "reason"),
    [
        (np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32), "shape"),
        (np.zeros(3, np.float32), np.zeros(3, np.float64), "dtype"),
        (np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), "empty"),
        (np.float32([1, np.inf]), np.float32([1, np.inf]), "infinite"),
        (np.float32([1, 2]), np.float32([1, np.nan]), "other side"),
        (np.int64([1, 2]), np.int64([1, 3]), "exceeds"),
        (np.float32([1, 2]), np.float32([-1, -2]), "exceeds"),
    ],
    ids=["shape", "dtype", "empty", "inf twice", "nan", "integers", "sign"],
)
def test_compare_refuses(reference, other, reason):
    found = compare_arrays(reference, other, tolerance_for("2bit", layers=1))
    assert not found
    assert reason in found.reason


@pytest.mark.parametrize(("other", "passed"), [("b", True), ("x", False)])
def test_text_must_be_equal(other, passed):
    first, second = (
        IterationResult(outputs={"label": np.array([["a"], [one]], object)}) for one in ("b", other)
    )
    pair = Pair("one", "two", ("int8",))
    (row,) = compare_case(pair, "static", first, second, tolerance_for("int8"))
    assert row.passed == passed


def test_cosine_alone_can_fail():
    reference = np.zeros(1000, np.float32)
    reference[0] = 1.0
    other = reference + np.float32(0.02)
    found = compare_arrays(reference, other, tolerance_for("2bit", layers=1))
    assert "cosine" in found.reason


def test_zero_outputs_agree_only_exactly():
    zeros = np.zeros(4, np.float32)
    assert compare_arrays(zeros, zeros, tolerance_for("function", layers=1))
    assert not compare_arrays(zeros, zeros + np.float32(1e-9), tolerance_for("function", layers=1))


def test_fp16_may_change_the_dtype():
    a = np.float32([1.0, 2.0])
    assert compare_arrays(a, a.astype(np.float16), tolerance_for("fp16", layers=1))
    assert not compare_arrays(a, a.astype(np.float16), tolerance_for("int8", layers=1))


def test_a_deep_model_may_turn_its_vectors_further():
    shallow, deep = (tolerance_for("int8", layers=n) for n in (1, 36))
    assert (shallow.min_cosine, deep.min_cosine) == (0.995, 0.98)
    assert deep.min_cosine < tolerance_for("int8", layers=12).min_cosine < shallow.min_cosine


def test_tolerances_add_up_and_atol_replaces():
    both = tolerance_for("2bit", "embeddings-int8", layers=1)
    assert both.relative == pytest.approx(0.05)
    assert both.min_cosine == pytest.approx(0.965)
    strict = tolerance_for("2bit", atol=1e-9)
    assert not compare_arrays(np.float32([1, 2]), np.float32([1, 2.001]), strict)
    with pytest.raises(InputError, match="no tolerance"):
        tolerance_for("guess")


@pytest.mark.parametrize("kind", TOLERANCES)
def test_tolerances_grow_with_depth(kind):
    depths = (1, 2, 8, DEEP_LAYERS, 100, None)
    steps = [tolerance_for(kind, layers=layers).relative for layers in depths]
    assert steps == sorted(steps)
    assert steps[-3:] == [TOLERANCES[kind].deep] * 3
    assert steps[0] == TOLERANCES[kind].single


def test_missing_and_extra_outputs_fail(tmp_path, files):
    example = {"x": torch.zeros(2, models.K)}
    made = {
        "torch": TorchRunner(Reference(), example, ["other_name"]),
        "f": runner(files["ternary"], "f"),
    }
    rows = run_parity(made, [Pair("torch", "f", ("function",), 2)], cases()[:1])
    assert {r.output for r in rows} == {"y", "other_name"}
    assert not any(r.passed for r in rows)
    made["torch"] = TorchRunner(Reference(), example, ["y", "z"])
    rows = run_parity(made, [Pair("torch", "f", ("function",), 2)], cases()[:1])
    assert [r.passed for r in rows] == [False]
    assert "1 tensors" in rows[0].reason


def test_nothing_to_compare_is_an_error(files):
    pair = Pair("a", "b", ("exact",), 2)
    made = {"a": runner(files["float"], "a"), "b": runner(files["float"], "b")}
    for pairs, some_cases in (([], cases()), ([pair], [])):
        with pytest.raises(InputError, match="nothing to compare"):
            run_parity(made, pairs, some_cases)
    with pytest.raises(InputError, match="no implementation named c"):
        run_parity(made, [Pair("a", "c", ("exact",), 2)], cases())


def test_missing_input_is_not_guessed(files):
    case = Case("batch=2", {"xx": models.example()["x"]})
    made = {"a": runner(files["float"], "a"), "b": runner(files["float"], "b")}
    rows = run_parity(made, [Pair("a", "b", ("exact",), 2)], [case])
    assert [r.passed for r in rows] == [False]
    assert "no value for input x" in rows[0].reason


def test_saved_results_compare_later(tmp_path, files):
    pair = Pair("ternary", "nbits", ("2bit",), 2)
    kept = tmp_path / "saved" / "ternary.json"
    first = parity(files, [pair], save={"ternary": kept})
    saved = load_results(kept)
    made = {"ternary": saved, "nbits": runner(files["nbits"], "nbits")}
    assert run_parity(made, [pair], cases()) == first
    with pytest.raises(InputError, match="3 saved results"):
        run_parity(made, [pair], cases()[:1])
    (tmp_path / "torn.json").write_text('{"lst": [')
    with pytest.raises(InputError, match="no saved Polygraphy results"):
        load_results(tmp_path / "torn.json")


def test_session_refuses_absent_provider_and_broken_file(tmp_path, files):
    with pytest.raises(MissingRequirement, match="CUDAExecutionProvider"):
        open_session(files["float"], provider="CUDAExecutionProvider")
    (tmp_path / "torn.onnx").write_bytes(files["float"].read_bytes()[:200])
    with pytest.raises(StageError, match="does not load"):
        open_session(tmp_path / "torn.onnx")
