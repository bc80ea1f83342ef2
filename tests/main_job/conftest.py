"""One thread everywhere, and the exports that several tests look at."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bitnet_export.load import save
from bitnet_export.options import ExportOptions
from bitnet_export.pipeline import run_export
from tests.main_job import models

DYNAMIC_IMAGE = {"image": {0: "batch"}}


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def export(tmp_path_factory):
    """export(model, target, **options) -> (report, directory); each combination runs once."""
    done = {}

    def run(model, target="ort", **options):
        key = (model, target, str(sorted(options.items(), key=str)))
        if key not in done:
            out = tmp_path_factory.mktemp("exports") / f"{model.stem}-{target}"
            settings = dict(threads=1, bench=True) | options
            done[key] = (
                run_export(ExportOptions(model=model, target=target, output=out, **settings)),
                out,
            )
        return done[key]

    return run


@pytest.fixture(scope="session")
def digit_files(tmp_path_factory):
    """{"mlp", "vit", "cnn": model.pt, "data": held-out images and labels, "train"}, trained."""
    folder = tmp_path_factory.mktemp("digits")
    data = models.digits()
    files = {"data": folder / "held-out.npz", "train": folder / "train.npz"}
    np.savez(files["data"], image=data["test_x"], label=data["test_y"])
    np.savez(files["train"], image=data["train_x"])
    torch.manual_seed(0)
    for name in ("mlp", "vit", "cnn"):
        model = models.train(models.digits_model(name), 200)
        files[name] = save(
            model, folder / f"{name}.pt", {"image": torch.tensor(data["test_x"][:4])}, DYNAMIC_IMAGE
        )
    return files
