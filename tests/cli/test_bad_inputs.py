"""Bad inputs as processes: a clear message, the right exit code, no traceback, nothing written."""

import os
import resource
import signal
import subprocess
import sys
import time

import pytest
import torch
from torch import nn

from tests.cli.conftest import ENVIRONMENT, run


def check(done, code, *texts):
    assert done.returncode == code, done.stderr
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.fixture
def work(tmp_path):
    """A directory in which a failed command must leave nothing; its inputs are elsewhere."""
    directory = tmp_path / "work"
    directory.mkdir()
    yield directory
    assert list(directory.rglob("*")) == []


def test_truncated_file(mlp_file, tmp_path, work):
    data = mlp_file.read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[: len(data) // 2])
    check(run(tmp_path / "cut.pt", cwd=work), 2, "cut.pt", "truncated or damaged")


def test_wrong_magic(tmp_path, work):
    (tmp_path / "model.pt").write_bytes(b"this is no model")
    check(run(tmp_path / "model.pt", cwd=work), 2, "no known kind", "-> pass")


def test_empty_file(tmp_path, work):
    (tmp_path / "model.pt").touch()
    check(run(tmp_path / "model.pt", cwd=work), 2, "the file is empty")


def test_pickle_without_the_flag(tmp_path, work):
    torch.save(nn.Linear(4, 4), tmp_path / "whole.pt")
    texts = ("runs whatever code", "bitnet_export.save", "--trust-pickle")
    check(run(tmp_path / "whole.pt", cwd=work), 2, *texts)


def test_a_metric_that_cannot_be_used_is_said_before_the_work(mlp_file, work):
    done = run(mlp_file, "--metric", "no.such:metric", cwd=work)
    check(done, 2, "cannot import no.such")
    assert "export full precision" not in done.stderr
    metric = ("--metric", "math:sqrt")
    check(run(mlp_file, *metric, "--no-verify", cwd=work), 2, "--metric --no-verify")
    check(run(mlp_file, *metric, "--metric-data", "gone.npz", cwd=work), 2, "gone.npz", "no such")


@pytest.mark.parametrize("option", ["--data", "--metric-data"])
def test_a_directory_of_text_is_no_data_to_measure_on(mlp_file, work, option):
    """It was once passed over, and quality measured on random inputs under the user's option."""
    check(run(mlp_file, option, work, cwd=work), 2, f"{option} {work}", "text is for fine-tuning")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--opt-shape", "input:4x32"], "the model takes batchx64"),
        (["--opt-shape", "input:4"], "the model takes batchx64"),
        (["--opt-shape", "input"], "it has no sizes"),
        (["--min-shape", "input:8x64", "--max-shape", "input:2x64"], "at least 8 and at most 2"),
    ],
)
def test_shapes_that_cannot_be(mlp_file, work, options, text):
    check(run(mlp_file, *options, cwd=work), 2, text)


@pytest.mark.parametrize(
    ("command", "options", "text"),
    [
        ("bench", ["--baseline", __file__], "of no known kind"),
        ("bench", ["--baseline", "nothing.onnx"], "there is no such file"),
        ("verify", ["--data", "nothing.npz"], "there is no such file"),
        ("verify", ["--data", "."], "it is a directory"),
        ("report", ["--json", "--markdown"], "choose one"),
        ("report", ["--max-regression", "5%"], "needs --baseline"),
    ],
)
def test_options_that_do_not_go_together(exported, command, options, text):
    check(run(command, exported[1], *options), 2, text)


def test_unknown_operator(tmp_path, work):
    import onnx
    from onnx import TensorProto, helper

    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("NoSuchOp", ["x"], ["y"], name="odd")],
        "g",
        [info("x", TensorProto.FLOAT, [1])],
        [info("y", TensorProto.FLOAT, [1])],
    )
    onnx.save(helper.make_model(graph), tmp_path / "m.onnx")
    check(run(tmp_path / "m.onnx", cwd=work), 2, "NoSuchOp", "odd")


def test_missing_input_shape(tmp_path, work):
    torch.save(nn.Linear(12, 4).state_dict(), tmp_path / "sd.pt")
    (tmp_path / "factory.py").write_text("from torch import nn\nmake = lambda: nn.Linear(12, 4)\n")
    env = {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    done = run(tmp_path / "sd.pt", "--model", "factory:make", cwd=work, env=env)
    check(done, 2, "--input input:batchx12")
    wrong = ("--model", "factory:make", "--input", "input:batchx13")
    check(run(tmp_path / "sd.pt", *wrong, cwd=work, env=env), 2, "does not run on input [2, 13]")


def test_k_zero(tmp_path, work):
    torch.save({"weight": torch.zeros(4, 0), "bias": torch.zeros(4)}, tmp_path / "sd.pt")
    (tmp_path / "factory.py").write_text("from torch import nn\nmake = lambda: nn.Linear(0, 4)\n")
    env = {"PYTHONPATH": f"{ENVIRONMENT['PYTHONPATH']}{os.pathsep}{tmp_path}"}
    arguments = ("--model", "factory:make", "--input", "input:1x1")
    check(run(tmp_path / "sd.pt", *arguments, cwd=work, env=env), 2, "K = 0", "weight")


def test_nan_weights(tmp_path, work):
    from bitnet_export.load import save

    model = nn.Linear(64, 64)
    with torch.no_grad():
        model.weight[3, 3] = float("nan")
    save(model, tmp_path / "nan.pt", {"input": torch.ones(2, 64)})
    check(run(tmp_path / "nan.pt", cwd=work), 2, "weight", "NaN")


def test_unknown_pass(mlp_file, work):
    check(run(mlp_file, "--skip-pass", "nope", cwd=work), 2, "nope", "merge-siblings")


def test_directory_that_is_no_model(tmp_path, work):
    check(run(tmp_path, cwd=work), 2, "no config.json")


def test_output_directory_of_someone_else(mlp_file, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    done = run(mlp_file, "-o", tmp_path, "--force")
    check(done, 2, "not replaced, even with --force")
    assert [p.name for p in tmp_path.iterdir()] == ["precious.txt"]


def test_finetune_without_data(mlp_file, work):
    check(run("finetune", mlp_file, cwd=work), 2, "--data FILE.npz")


@pytest.mark.parametrize("command", ["verify", "bench", "report", "inspect"])
def test_directory_that_is_no_export(command, tmp_path):
    done = run(command, tmp_path)
    assert done.returncode in (2, 4)
    assert done.stderr
    assert "Traceback" not in done.stderr
    assert "unexpected" not in done.stderr


def test_changed_model_is_noticed(exported, tmp_path):
    import shutil

    shutil.copytree(exported[1], tmp_path / "o")
    with (tmp_path / "o/model.onnx").open("ab") as file:
        file.write(b"\x00")
    done = run("verify", tmp_path / "o")
    assert done.returncode in (2, 4)
    assert "model.onnx" in done.stderr
    assert "Traceback" not in done.stderr


FULL_DISK = """
import errno, onnx
def save_model(model, path, *args, **kwargs):
    open(path, "wb").close()
    raise OSError(errno.ENOSPC, "No space left on device", str(path))
onnx.save_model = onnx.save = save_model
"""


def test_full_disk(mlp_file, work):
    done = run(mlp_file, "-o", work / "o", code=FULL_DISK)
    check(done, 4, "o space left on device")


def limit_file_size():
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


def test_files_that_may_not_grow(mlp_file, work):
    """A real failing write, in whatever writer comes first: Python's or a library's."""
    done = run(mlp_file, "-o", work / "o", preexec_fn=limit_file_size)
    assert done.returncode == 4, done.stderr
    assert "too large" in done.stderr.lower()
    assert "Traceback" not in done.stderr


def test_finetune_on_a_full_disk(mlp_file, data_file, work):
    done = run(
        *("finetune", mlp_file, "--data", data_file, "--steps", 1, "-o", work / "t.pt"),
        preexec_fn=limit_file_size,
    )
    assert done.returncode == 4, done.stderr
    assert "cannot be written" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(mlp_file, work, sent, code):
    """Ctrl-C, or a cancelled CI job, in the middle of an export."""
    process = subprocess.Popen(
        [sys.executable, "-m", "bitnet_export.cli", str(mlp_file), "-o", str(work / "o")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **ENVIRONMENT},
        # As in a terminal: jobs that a shell starts in the background ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    printed = ""
    for line in process.stderr:
        printed += line
        if line.startswith("export full precision"):
            time.sleep(0.3)  # in the middle of the stage, the output directory being filled
            process.send_signal(sent)
            break
    printed += process.stderr.read()
    # A shell shows 128 + signal for both: an exit with that code, or death by the signal, which
    # Python chooses itself where the interrupt struck inside an eval.
    assert process.wait(timeout=60) in (code, -sent), printed
    assert "Traceback" not in printed
    if sent == signal.SIGINT:
        assert "interrupted" in printed
