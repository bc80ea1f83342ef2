"""Fine-tuning where the models lie on a GPU. Skipped where PyTorch sees none."""

import pytest
import torch

from bitnet_export.ternary import finetune
from tests.ternary import parallel_runs


def test_a_gpu_has_the_losses_of_the_cpu():
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU that PyTorch sees")
    student, teacher = (model.cuda() for model in parallel_runs.models())
    found = finetune(student, teacher, parallel_runs.data(), parallel_runs.config())
    expected = parallel_runs.run()["history"]
    # Another order of sums, and from there int8 steps and trits that flip.
    assert [row["loss"] for row in found.history] == pytest.approx(
        [row["loss"] for row in expected], rel=2e-2
    )
    assert all(p.is_cuda for p in student.parameters())
