"""What a run can be told beyond its steps: the best weights, patience, padding, memory, terms."""

import copy
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_export.errors import UsageError
from bitnet_export.ternary import (
    FinetuneConfig,
    TernaryConfig,
    finetune,
    prepare,
    run_state,
    schedule,
)
from bitnet_export.ternary.conv import BitConv2d
from bitnet_export.ternary.data import Batches, as_samples, lengths_of, split, trimmed
from bitnet_export.ternary.finetune_config import SCHEDULES
from tests.ternary import parallel_runs


def run(data=None, **changes):
    student, teacher = parallel_runs.models()
    data = parallel_runs.data() if data is None else data
    result = finetune(student, teacher, data, parallel_runs.config(**changes))
    return student, result


def held_out_loss(student):
    """What a run of no consequence says of the student before its first step."""
    student = copy.deepcopy(student)
    teacher = parallel_runs.models()[1]
    config = parallel_runs.config(steps=1, lr=1e-9)
    return finetune(student, teacher, parallel_runs.data(), config).evaluations[0]["loss"]


@pytest.mark.parametrize("resumed", [False, True])
def test_the_student_ends_with_the_weights_of_the_best_evaluation(tmp_path, resumed):
    """A rate so high that training only does harm: the best row is an early one."""
    harm = {"lr": 0.3, "steps": 8, "eval_every": 2, "warmup": 0.5}
    if resumed:
        kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 6}
        run(**harm, **kept)
        (tmp_path / "step-0000008.pt").unlink()
        student, result = run(**harm, **kept, resume=True)
    else:
        student, result = run(**harm)
    losses = [row["loss"] for row in result.evaluations]
    assert result.best["step"] < 8
    assert losses[-1] > 1.2 * min(losses)
    assert held_out_loss(student) == pytest.approx(min(losses), rel=1e-5)
    if not resumed:
        last, _ = run(**harm, keep_best=False)
        assert held_out_loss(last) == pytest.approx(losses[-1], rel=1e-5)


def test_patience_ends_a_run_that_gets_no_better():
    _, result = run(lr=0.3, steps=40, eval_every=1, patience=3)
    assert result.stopped_early
    assert len(result.history) == result.best["step"] + 3
    _, result = run(patience=3)
    assert not result.stopped_early


def test_arrays_padded_to_one_length_train_like_samples_of_their_own_length():
    arrays = parallel_runs.data()
    lengths = arrays["attention_mask"].sum(1)
    assert lengths_of(as_samples(arrays)) == lengths.tolist()
    items = [
        {name: torch.from_numpy(a[i, :n]) for name, a in arrays.items()}
        for i, n in enumerate(lengths)
    ]

    class Known(list):
        def __init__(self, items):
            super().__init__(items)
            self.lengths = [len(item["input_ids"]) for item in items]

    padded, single = run()[1], run(Known(items))[1]
    assert [row["loss"] for row in padded.history] == pytest.approx(
        [row["loss"] for row in single.history], rel=1e-3
    )


def test_padding_is_cut_to_the_longest_of_a_batch_only():
    mask = torch.tensor([[1, 1, 0, 0, 0], [1, 1, 1, 0, 0]])
    batch = {"input_ids": mask * 7, "attention_mask": mask, "image": torch.ones(2, 4)}
    short = trimmed(batch)
    assert {name: tuple(t.shape) for name, t in short.items()} == {
        "input_ids": (2, 3),
        "attention_mask": (2, 3),
        "image": (2, 4),
    }
    assert trimmed({"x": torch.ones(2, 5)})["x"].shape == (2, 5)
    left = {"attention_mask": mask.flip(1)}
    assert trimmed(left)["attention_mask"].shape == (2, 5)


def test_a_model_of_one_length_keeps_its_padding():
    class Fixed(parallel_runs.Encoder):
        """As an exported program without a dynamic axis behaves."""

        def forward(self, input_ids, attention_mask):
            assert input_ids.shape[1] == 12, "fixed shape"
            return super().forward(input_ids, attention_mask)

    teacher = Fixed().eval()
    student = copy.deepcopy(teacher)
    prepare(student)
    result = finetune(student, teacher, parallel_runs.data(), parallel_runs.config())
    assert len(result.history) == parallel_runs.STEPS


class OfFixedBatch(nn.Sequential):
    """Takes eight samples and no other number, as a program exported without a batch axis does."""

    def forward(self, input):
        assert len(input) == 8
        return super().forward(input)


def test_a_model_of_a_fixed_batch_is_judged_on_whole_batches():
    teacher = OfFixedBatch(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 5))
    student = copy.deepcopy(teacher)
    prepare(student)
    inputs = {"input": np.random.default_rng(0).normal(size=(110, 32)).astype(np.float32)}
    result = finetune(student, teacher, inputs, FinetuneConfig(steps=2, batch_size=8))
    assert len(result.evaluations) == 2  # on 8 of the 11 held-out samples


def test_batches_of_arrays_hold_samples_of_similar_length():
    samples, held_out = split(as_samples(parallel_runs.data()))
    batches = Batches(samples, 8)
    spreads = []
    for step in range(batches.per_epoch):
        lengths = np.array(samples.lengths)[batches.indices(step)]
        spreads.append(int(lengths.max() - lengths.min()))
    assert max(spreads) <= 2
    order = torch.cat(Batches(held_out, 4).in_order())
    assert sorted(order.tolist()) == list(range(len(held_out)))


def test_recomputing_and_parts_change_no_loss_and_undo_themselves():
    student, result = run(similarity_weight=0.0)
    expected = [row["loss"] for row in result.history]
    for changes in ({"recompute": True}, {"accumulate": 2}, {"accumulate": 4, "recompute": True}):
        other, result = run(similarity_weight=0.0, **changes)
        assert [row["loss"] for row in result.history] == pytest.approx(expected, rel=1e-2)
        assert not any("forward" in vars(m) for m in other.modules())
    assert list(student.state_dict()) == list(other.state_dict())


def test_recomputing_keeps_less_for_the_backward_pass():
    def saved(recompute):
        total = 0

        def pack(tensor):
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            run(steps=1, recompute=recompute, relation_weight=0.0, similarity_weight=0.0)
        return total

    assert saved(True) < 0.7 * saved(False)


def test_recomputing_a_model_without_blocks_is_refused():
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    student = copy.deepcopy(teacher)
    prepare(student)
    with pytest.raises(UsageError, match="no repeated blocks"):
        finetune(student, teacher, {"x": torch.ones(8, 32)}, FinetuneConfig(recompute=True))


def test_terms_that_do_not_apply_are_named():
    teacher = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 5))
    student = copy.deepcopy(teacher)
    prepare(student)
    config = FinetuneConfig(steps=2, relation_weight=1.0, similarity_weight=1.0)
    result = finetune(student, teacher, {"input": torch.randn(64, 32)}, config)
    assert [text.partition(":")[0] for text in result.missing] == ["relation", "similarity"]
    assert set(result.history[0]) == {"step", "loss", "lr", "logits", "hidden"}


@pytest.mark.parametrize("shape", SCHEDULES)
def test_the_rate_rises_then_falls_to_nothing(shape):
    rates = [schedule.factor(step, 100, 0.1, shape) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[10] == pytest.approx(1)
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[-1] < 0.02


def test_convolutions_are_trained_too():
    torch.manual_seed(0)
    teacher = nn.Sequential(
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.Conv2d(32, 32, 1), nn.Flatten(), nn.Linear(512, 5)
    )
    student = copy.deepcopy(teacher)
    prepare(student)
    assert isinstance(student[0], BitConv2d)
    before = student[0].weight.detach().clone()
    x = torch.randn(256, 16, 4, 4)
    config = FinetuneConfig(steps=40, lr=1e-3, eval_every=20)
    result = finetune(student, teacher, {"input": x}, config)
    assert not torch.equal(before, student[0].weight)
    assert result.best["loss"] < 0.9 * result.evaluations[0]["loss"]


@pytest.mark.parametrize(
    "kwargs",
    [
        *({"accumulate": 0}, {"patience": -1}, {"schedule": "square"}, {"parallel": "magic"}),
        *({"patience": 2, "eval_every": 0}, {"similarity_weight": -1.0}, {"warmup": 2.0}),
    ],
)
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(UsageError):
        FinetuneConfig(**kwargs)


def test_a_batch_that_does_not_divide_into_its_parts_is_refused():
    with pytest.raises(UsageError, match="multiple of 3"):
        run(accumulate=3)


def test_with_dropout_on_batch_norms_keep_their_statistics():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Dropout(0.5), nn.ReLU(), nn.Linear(32, 8)
    ).eval()
    teacher = copy.deepcopy(model)
    prepare(model, TernaryConfig(keep_head=False))
    kept = model[1].running_mean.clone()
    data = {"input": 3 + torch.randn(40, 32)}
    config = FinetuneConfig(steps=2, batch_size=8, dropout=True, keep_best=False, bf16=False)
    finetune(model, teacher, data, config)
    assert torch.equal(model[1].running_mean, kept)


def test_an_optimizer_put_back_counts_its_steps_where_the_parameters_are():
    there, here = nn.Linear(4, 4), nn.Linear(4, 4, device="meta")
    trained = torch.optim.AdamW(there.parameters(), fused=True)
    there(torch.ones(1, 4)).sum().backward()
    trained.step()
    resumed = torch.optim.AdamW(here.parameters(), fused=False)
    run_state.put_optimizer(here, resumed, run_state.take_optimizer(there, trained))
    states = [resumed.state[p] for p in here.parameters()]
    assert all(value.is_meta for state in states for value in state.values())
    assert {"step", "exp_avg", "exp_avg_sq"} <= set(states[0])
