"""load_session and open_session: what is checked before anything runs."""

import numpy as np
import onnxruntime
import pytest

from bitnet_export import manifest, onnx_io
from bitnet_export.errors import InputError, MissingRequirement, StageError, UsageError
from bitnet_export.targets import load_session, open_session
from bitnet_export.targets.session import NATIVE_VARIABLE, STOP_SPINNING, native_library
from bitnet_export.verify import speed
from bitnet_export.verify.feeds import Case
from tests.passes.graphs import reference, ternary_case, ternary_model, x_of

CASE = ternary_case(64, 8)


@pytest.fixture
def directory(tmp_path):
    onnx_io.write_model(ternary_model(CASE), tmp_path / "model.onnx")
    record = manifest.Manifest(name="m", target="onnx", outputs=["y"])
    record.files = manifest.record_files(tmp_path, ["model.onnx"])
    manifest.write_manifest(record, tmp_path)
    return tmp_path


@pytest.mark.parametrize("threads", [None, 1, 2])
def test_runs_as_onnxruntime_does(directory, threads):
    session = load_session(str(directory), threads=threads)
    x = x_of(3, 64)
    for names in (None, ["y"]):
        (y,) = session.run(names, {"x": x})
        np.testing.assert_allclose(y, reference(x, CASE), rtol=1e-5, atol=1e-5)
    assert [i.name for i in session.get_inputs()] == ["x"]
    assert [o.name for o in session.get_outputs()] == ["y"]
    assert session.get_providers() == ["CPUExecutionProvider"]
    assert session.manifest.name == "m"


def test_threads_of_sessions_that_take_turns_do_not_spin(directory, monkeypatch):
    def spins(session) -> bool:
        try:
            options = session.get_session_options()
            return options.get_session_config_entry(STOP_SPINNING) != "1"
        except RuntimeError:  # no such entry
            return True

    model = directory / "model.onnx"
    assert spins(open_session(model))
    assert not spins(open_session(model, takes_turns=True))

    opened = []

    def kept(*args, **options):
        opened.append(open_session(*args, **options))
        return opened[-1]

    monkeypatch.setattr(speed, "open_session", kept)
    cases = [Case("one", {"x": x_of(3, 64)})]
    speed.measure_speed(model, model, cases, threads=2, samples=11, memory=False)
    assert [spins(one) for one in opened] == [False, False]


@pytest.mark.parametrize("threads", [0, -1])
def test_threads_are_at_least_one(directory, threads):
    with pytest.raises(UsageError, match="threads must be at least 1"):
        load_session(directory, threads=threads)


def test_the_manifest_is_checked_first(directory):
    path = directory / "model.onnx"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(InputError, match="truncated or replaced"):
        load_session(directory)
    (directory / "manifest.json").unlink()
    with pytest.raises(InputError, match="not a directory bitnet-export wrote"):
        load_session(directory)


def test_a_model_that_does_not_load(tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"nothing of the sort")
    with pytest.raises(StageError, match="does not load the model") as caught:
        open_session(tmp_path / "model.onnx")
    assert "\n" not in caught.value.what


def test_a_missing_provider_is_no_silent_fallback(directory):
    with pytest.raises(MissingRequirement, match="has no CUDAExecutionProvider here"):
        open_session(directory / "model.onnx", provider="CUDAExecutionProvider")


def test_a_provider_that_falls_back(directory, monkeypatch):
    real = onnxruntime.get_available_providers()
    monkeypatch.setattr(
        onnxruntime, "get_available_providers", lambda: [*real, "CUDAExecutionProvider"]
    )
    with pytest.raises((MissingRequirement, StageError)):
        open_session(directory / "model.onnx", provider="CUDAExecutionProvider")


def test_no_onnxruntime(directory, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(MissingRequirement, match="ONNX Runtime is not installed"):
        open_session(directory / "model.onnx")


def test_the_native_library_can_be_switched_off(directory, monkeypatch):
    monkeypatch.setenv(NATIVE_VARIABLE, "0")
    assert native_library() is None
    assert load_session(directory).native is None
