"""Every command as a process, on a small model: what it prints, writes and returns."""

import json
import shutil

import numpy as np
import pytest

from bitnet_export.errors import EXIT_GATE_FAILED, EXIT_MISSING_REQUIREMENT, EXIT_USAGE
from tests.cli.conftest import run


def outputs(directory, name, x):
    from bitnet_export.targets.session import load_session

    return load_session(directory).run(None, {name: x})[0]


def test_export(exported):
    done, directory = exported
    names = {path.name for path in directory.iterdir()}
    expected = {"model.onnx", "manifest.json", "report.json", "report.html", "report.md"}
    assert names >= expected | {"junit.xml"}
    assert "smaller" in done.stdout
    assert "PASS" in done.stdout
    assert str(directory) in done.stdout
    for stage in ("load", "ternarize", "verify", "bench"):
        assert f"\n{stage}" in f"\n{done.stderr}"
    assert "Traceback" not in done.stderr
    report = json.loads((directory / "report.json").read_text())
    assert report["verdict"] == "pass"
    assert [p.name for p in directory.parent.iterdir()] == [directory.name]  # no temporary left


def test_export_runs(exported):
    x = np.ones((3, 64), np.float32)
    y = outputs(exported[1], "input", x)
    assert y.shape == (3, 10)
    assert np.isfinite(y).all()


def test_json_is_the_report(mlp_file, tmp_path):
    done = run(mlp_file, "-t", "onnx", "-o", tmp_path / "o", "--json", "--no-bench", "-q")
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "o/report.json").read_text())
    assert printed["model"]["target"] == "onnx"


def test_default_output_directory(mlp_file, tmp_path):
    done = run(mlp_file, "--no-bench", "--no-verify", "--exclude", "laers.*", cwd=tmp_path)
    assert "--exclude laers.* matches no layer" in done.stderr
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/mlp-ort/model.onnx").is_file()


def test_failed_gate(mlp_file, tmp_path):
    done = run(
        mlp_file, "-o", tmp_path / "o", "--no-bench", "--no-verify", "--min-compression", "1000x"
    )
    assert done.returncode == EXIT_GATE_FAILED, done.stderr
    assert "FAILED min_compression" in done.stdout
    assert (tmp_path / "o/report.html").is_file()  # what was measured is kept


def test_a_run_is_judged_by_its_own_limits(exported, tmp_path):
    """Not by those of runs before it: a CI job's command line says all that can fail it."""
    directory = shutil.copytree(exported[1], tmp_path / "o")
    strict = run("verify", directory, "--min-compression", "1000x", "--max-quality-loss", "90%")
    assert strict.returncode == EXIT_GATE_FAILED, strict.stderr
    plain = run("verify", directory)
    assert plain.returncode == 0, plain.stdout
    assert "warning: not judged: --min-compression 1000x, which the run before fail" in plain.stderr
    assert "not judged: --max-quality-loss 90%, which the run before passed" in plain.stderr
    report = json.loads((directory / "report.json").read_text())
    assert [gate["name"] for gate in report["gates"]] == ["finite", "parity"]
    assert any("--min-compression 1000x" in text for text in report["warnings"])
    bench = run("bench", directory, "--samples", 5, "--threads", 1)
    assert bench.returncode == 0, bench.stdout
    assert "not judged" not in bench.stderr
    assert run("report", directory).returncode == 0


def test_target_trt_says_what_is_missing(mlp_file, tmp_path):
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        pass
    else:
        pytest.skip("TensorRT is installed here")
    done = run(mlp_file, "--target", "trt", "-o", tmp_path / "o", "--no-bench", "--no-verify")
    assert done.returncode == EXIT_MISSING_REQUIREMENT, done.stderr
    assert "TensorRT is not installed" in done.stderr
    assert "Traceback" not in done.stderr
    import onnx

    nodes = onnx.load(tmp_path / "o/model.onnx").graph.node
    assert any(node.domain == "trt.plugins" for node in nodes)


def test_foreign_onnx(tmp_path):
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weight = np.random.default_rng(0).standard_normal((64, 48)).astype(np.float32)
    second = np.random.default_rng(1).standard_normal((48, 64)).astype(np.float32)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["h"]),
            helper.make_node("Relu", ["h"], ["r"]),
            helper.make_node("MatMul", ["r", "v"], ["z"]),
            helper.make_node("Relu", ["z"], ["y"]),
        ],
        "foreign",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 64])],
        [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(second, "v")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "dense.onnx")
    done = run(tmp_path / "dense.onnx", "-t", "ort", "-o", tmp_path / "o", "--no-bench")
    assert done.returncode == 0, done.stderr
    assert "bitnet-export finetune" in done.stderr  # the warning gives the command
    assert outputs(tmp_path / "o", "x", np.ones((2, 64), np.float32)).shape == (2, 64)


def test_finetune_resume_and_export(mlp_file, data_file, tmp_path):
    common = ("finetune", mlp_file, "--data", data_file, "--eval-every", 2, "--json")
    common += ("--checkpoints", tmp_path / "c", "-o", tmp_path / "ternary.pt")
    done = run(*common, "--steps", 4)
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)["model"]
    assert written == str(tmp_path / "ternary.pt")
    refused = run(*common, "--steps", 4)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    resumed = run(*common, "--steps", 4, "--resume", "--force")
    assert resumed.returncode == 0, resumed.stderr
    done = run(written, "-o", tmp_path / "o", "--no-bench", "--no-verify")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "o/report.json").read_text())
    reasons = {row["reason"] for row in report["layers"] if row["status"] == "ternary"}
    assert any("already ternary" in reason for reason in reasons)


def test_verify(exported):
    done = run("verify", exported[1], "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["parity"]


def quality_of(done):
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["quality"]["value"]


def test_verify_against_a_reference(exported, mlp_file, tmp_path):
    """The model given counts, not the one kept in the directory."""
    import torch
    from torch import nn

    import bitnet_export as be

    directory = exported[1]
    kept = quality_of(run("verify", directory, "--json"))
    same = quality_of(run("verify", directory, "--reference", mlp_file, "--json"))
    assert same == pytest.approx(kept, abs=1e-6)
    torch.manual_seed(5)
    batch = {0: "batch"}
    other, x = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)), torch.randn(4, 64)
    other_file = be.save(other, tmp_path / "other.pt", {"input": x}, {"input": batch})
    assert quality_of(run("verify", directory, "--reference", other_file, "--json")) < kept - 0.1

    class Renamed(nn.Linear):
        def forward(self, features):
            return super().forward(features)

    wrong_file = be.save(Renamed(64, 10), tmp_path / "wrong.pt", {"features": x})
    refused = run("verify", directory, "--reference", wrong_file)
    assert refused.returncode == EXIT_USAGE, refused.stderr
    assert "input features" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_bench(exported):
    done = run("bench", exported[1], "--samples", 5, "--shape", "batch=2", "--threads", 1)
    assert done.returncode == 0, done.stderr
    assert "batch=2, 1 thread" in done.stdout


def test_report(exported):
    assert run("report", exported[1]).stdout.startswith("mlp -> ort")
    assert run("report", exported[1], "--markdown").stdout.startswith("## PASS")
    shown = json.loads(run("report", exported[1] / "report.json", "--json").stdout)
    assert shown["schema_version"] == 1


def test_report_against_a_baseline(exported, tmp_path):
    report = json.loads((exported[1] / "report.json").read_text())
    same = run("report", exported[1], "--baseline", exported[1] / "report.json")
    assert same.returncode == 0, same.stderr
    report["size"]["bytes"] = int(report["size"]["bytes"] * 0.9)
    old = tmp_path / "old.json"
    old.write_text(json.dumps(report))
    worse = run("report", exported[1], "--baseline", old, "--max-regression", "5%")
    assert worse.returncode == EXIT_GATE_FAILED
    assert "size" in worse.stdout
    allowed = run("report", exported[1], "--baseline", old, "--max-regression", "20%")
    assert allowed.returncode == 0, allowed.stdout


@pytest.mark.parametrize(
    ("operator", "words"),
    [
        ("MatMul", "would become ternary"),
        ("MatMull", "An export would refuse it: operator MatMull does not exist in opset 13"),
    ],
)
def test_inspect_an_older_file(tmp_path, operator, words):
    from onnx import TensorProto, helper, numpy_helper, save

    weight = numpy_helper.from_array(np.random.default_rng(0).random((64, 64), np.float32), "w")
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["batch", 64]) for n in "xy"]
    node = helper.make_node(operator, ["x", "w"], ["y"], name="layer")
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    imports = [helper.make_opsetid("", 13)]
    save(helper.make_model(graph, opset_imports=imports, ir_version=7), tmp_path / "old.onnx")
    shown = run("inspect", tmp_path / "old.onnx")
    assert shown.returncode == 0, shown.stderr
    assert "opset ai.onnx 13" in shown.stdout
    assert words in shown.stdout


def test_inspect_ours(exported):
    found = json.loads(run("inspect", exported[1], "--json").stdout)
    layers = found["layers"]
    assert [(layer["K"], layer["N"]) for layer in layers] == [(64, 64), (64, 64)]
    for layer in layers:
        assert 0.2 < layer["sparsity"] < 0.6  # TWN on Gaussian-like weights: about 0.42
        assert layer["scale"] == "channel"
    assert sum(found["bytes_by_part"].values()) == found["bytes"]
    assert "2 ternary layers" in run("inspect", exported[1] / "model.onnx").stdout


def test_force_replaces_and_refuses(exported, mlp_file, tmp_path):

    directory = tmp_path / "o"
    shutil.copytree(exported[1], directory)
    done = run(mlp_file, "-o", directory, "--no-bench")
    assert done.returncode == 2
    assert "--force" in done.stderr
    done = run(mlp_file, "-o", directory, "--no-bench", "--no-verify", "--force")
    assert done.returncode == 0, done.stderr
