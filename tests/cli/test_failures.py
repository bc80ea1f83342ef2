"""Whatever goes wrong: one message on stderr, the right exit code, no traceback."""

import errno
import signal

import click
import pytest

from bitnet_export import errors
from bitnet_export.cli.failures import DEBUG_VARIABLE, exit_with_message
from bitnet_export.cli.progress import BarProgress, LogProgress, QuietProgress


def fail_with(error, capsys):
    with pytest.raises(SystemExit) as exit_info, exit_with_message():
        raise error
    return exit_info.value.code, capsys.readouterr().err


@pytest.fixture(autouse=True)
def no_debug(monkeypatch):
    monkeypatch.delenv(DEBUG_VARIABLE, raising=False)


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            errors.InputError("K = 0", where="fc", fix="drop it"),
            2,
            "error: fc: K = 0\n  -> drop it",
        ),
        (errors.UsageError("no"), 2, "error: no"),
        (errors.MissingRequirement("no TensorRT"), 3, "error: no TensorRT"),
        (errors.StageError("broke"), 4, "error: broke"),
        (errors.GateFailed("slow"), 1, "error: slow"),
        (click.UsageError("bad flag"), 2, "bad flag"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (click.Abort(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "x", "out/m.onnx"), 4, "out/m.onnx: no space left on device"),
        (PermissionError(errno.EACCES, "x", "out"), 4, "out: permission denied"),
        (MemoryError(), 4, "out of memory"),
        (ZeroDivisionError("division by zero"), 4, "unexpected ZeroDivisionError"),
    ],
)
def test_message_and_code(capsys, error, code, text):
    found, printed = fail_with(error, capsys)
    assert found == code
    assert text in printed
    assert "Traceback" not in printed


def test_unexpected_errors_ask_for_a_report(capsys):
    _, printed = fail_with(RuntimeError("odd\nsecond line"), capsys)
    assert "please report it" in printed
    assert DEBUG_VARIABLE in printed
    assert "second line" not in printed


def test_traceback_on_request(capsys, monkeypatch):
    monkeypatch.setenv(DEBUG_VARIABLE, "1")
    _, printed = fail_with(RuntimeError("odd"), capsys)
    assert "Traceback" in printed


def test_success_passes_through(capsys):
    with exit_with_message():
        pass
    assert capsys.readouterr().err == ""


@pytest.fixture
def sigint_raises():
    """As in a terminal: jobs that a shell starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("sigint_raises")
@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("progress", [QuietProgress, LogProgress, BarProgress])
def test_an_interrupt_that_a_library_swallows_ends_the_next_stage(progress, sent, code):
    reached = []

    def command():
        shown = progress()
        shown.stage("export")
        try:
            signal.raise_signal(sent)
        except BaseException:
            reached.append("swallowed")
        shown.stage("verify")
        reached.append("verify")

    with pytest.raises(SystemExit) as exit_info, exit_with_message():
        command()
    assert exit_info.value.code == code
    assert reached == ["swallowed"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
