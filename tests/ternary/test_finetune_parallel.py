"""Two processes on the CPU (gloo) train as one does: same losses, same weights, same files.

Not bit for bit: a process has half of each batch, its sums are in another order, and where such a
difference falls on a rounding boundary an int8 activation or a trit flips. Losses of the first
steps are held to 1e-4 of their size, later ones to 1e-2.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from bitnet_export.errors import UsageError
from bitnet_export.ternary.parallel import Group
from tests.ternary import parallel_runs
from tests.ternary.parallel_runs import CUT, RUNS, STEPS

ROOT = Path(__file__).parents[2]
LAUNCH = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def launch(*arguments, timeout=300):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, *LAUNCH, *map(str, arguments)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """{name: run} of two processes, and of one under "alone"."""
    directory = tmp_path_factory.mktemp("parallel")
    kept = {"checkpoint_dir": directory / "alone", "checkpoint_every": CUT}
    alone = parallel_runs.run(**kept)
    (directory / "alone" / f"step-{STEPS:07d}.pt").unlink()
    launch(Path(parallel_runs.__file__), directory)
    runs = torch.load(directory / "found.pt", weights_only=False)
    return {"alone": alone, "directory": directory, **runs}


def assert_same_losses(run, expected):
    assert [row["step"] for row in run["history"]] == [row["step"] for row in expected["history"]]
    for row, other in zip(run["history"], expected["history"], strict=True):
        rel = 1e-4 if row["step"] <= 2 else 1e-2
        assert row == pytest.approx(other, rel=rel)
    for row, other in zip(run["evaluations"], expected["evaluations"], strict=True):
        assert row == pytest.approx(other, rel=1e-2)


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_two_processes_have_the_losses_and_weights_of_one(found, name):
    expected = found["alone"]
    assert {"cosine", "similarity", "hidden", "relation"} <= expected["history"][0].keys()
    assert_same_losses(found[name], expected)
    start = parallel_runs.models()[0].state_dict()
    for path, value in expected["weights"].items():
        trained = found[name]["weights"][path]
        assert trained.shape == value.shape
        # AdamW's first steps are +-lr: where the gradient is all rounding (a key's bias has none,
        # softmax does not see it) they may go either way. Matrices have a real one.
        if value.dim() > 1:
            moved = (value - start[path]).norm()
            assert (trained - value).norm() <= 0.2 * moved, path


@pytest.mark.parametrize("name", ["ddp in parts", "fsdp in parts, recomputed"])
def test_accumulated_parts_and_recomputed_blocks_change_nothing(found, name):
    assert_same_losses(found[name], parallel_runs.run(similarity_weight=0.0))


def test_two_processes_go_on_where_one_stopped(found):
    assert_same_losses(found["fsdp resumed"], found["alone"])


@pytest.mark.parametrize("name", ["ddp", "fsdp"])
def test_one_process_goes_on_where_two_stopped(found, name, tmp_path):
    shutil.copytree(found["directory"] / name, tmp_path / "kept")
    (tmp_path / "kept" / f"step-{STEPS:07d}.pt").unlink()
    resumed = parallel_runs.run(checkpoint_dir=tmp_path / "kept", resume=True)
    assert_same_losses(resumed, found[name])


def test_a_batch_that_cannot_be_shared_is_refused_with_the_remedy():
    group = Group()
    group.rank, group.size = 1, 3
    with pytest.raises(UsageError, match="multiple of 6"):
        group.parts(torch.arange(32), 2)
    parts = group.parts(torch.arange(12), 2)
    assert [part.tolist() for part in parts] == [[1, 4], [7, 10]]
    assert set(RUNS) > {"ddp", "fsdp"}


def test_torchrun_on_the_command_line_writes_one_model_file(tmp_path):
    import bitnet_export as be

    teacher = parallel_runs.models()[1]
    arrays = parallel_runs.data()
    np.savez(tmp_path / "data.npz", **arrays)
    example = {name: torch.from_numpy(a[:2]) for name, a in arrays.items()}
    be.save(teacher, tmp_path / "model.pt", example, {name: {0: "batch"} for name in example})
    arguments = ("--data", tmp_path / "data.npz", "--steps", 4, "--batch-size", 8, "--json")
    written = tmp_path / "ternary.pt"
    done = launch(
        *("-m", "bitnet_export", "finetune", tmp_path / "model.pt", *arguments),
        *("--parallel", "fsdp", "-o", written),
    )
    assert json.loads(done.stdout) == {"model": str(written)}  # said once
    assert done.stderr.count("fine-tune:") == 1
    names = {p.name for p in tmp_path.iterdir()}
    assert names == {"data.npz", "model.pt", "ternary.pt", "ternary.pt.finetune.json"}
    entries = torch.export.load(written).state_dict
    matrices = [v for name, v in entries.items() if v.dim() == 2 and "words" not in name]
    assert len(matrices) == 11
    assert all(len(row.abs().unique()) <= 2 for m in matrices for row in m)  # {-s, 0, +s}
