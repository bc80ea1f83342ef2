"""The fine-tuning loop: it learns, resumes exactly, stops on NaN, and takes every data source."""

import copy
import json
import re

import numpy as np
import pytest
import torch
from torch import nn

from bitnet_export.errors import InputError, StageError, UsageError
from bitnet_export.ternary import FinetuneConfig, TernaryConfig, convert, finetune, prepare
from bitnet_export.ternary.data import Batches, as_samples, split


def _classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 64), nn.Linear(64, 5)).eval()


def _pair(build=_classifier, config=None):
    teacher = build()
    student = copy.deepcopy(teacher)
    prepare(student, config)
    return student, teacher


def _data(n=256):
    return {"input": np.random.default_rng(0).normal(size=(n, 32)).astype(np.float32)}


class Encoder(nn.Module):
    """A little text encoder: embeddings, two blocks, [B, S, 32] out."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(60, 32)
        block = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(block, 2)

    def forward(self, input_ids, attention_mask):
        return self.encoder(self.words(input_ids), src_key_padding_mask=attention_mask == 0)


def test_distillation_recovers_the_teachers_answers():
    student, teacher = _pair()
    x = torch.from_numpy(np.random.default_rng(9).normal(size=(512, 32)).astype(np.float32))

    def agreement():
        return (student(x).argmax(1) == teacher(x).argmax(1)).float().mean().item()

    before = agreement()
    # White noise through a random net has no structure to exploit: gains are small, and only a
    # low learning rate has any.
    config = FinetuneConfig(steps=200, eval_every=50, lr=1e-4)
    result = finetune(student, teacher, _data(2048), config)
    assert result.objective == "logits"
    assert result.history[-1]["loss"] < 0.9 * result.history[0]["loss"]
    assert [row["step"] for row in result.evaluations] == [0, 50, 100, 150, 200]
    assert result.best["loss"] <= result.evaluations[0]["loss"]
    assert agreement() > before
    y = student(x)
    convert(student)
    assert torch.equal(y, student(x))


def test_teacher_none_is_the_students_own_float_weights():
    student, teacher = _pair()
    config = FinetuneConfig(steps=5)
    other = copy.deepcopy(student)
    given = finetune(student, teacher, _data(), config).history
    assert finetune(other, None, _data(), config).history == given


@pytest.mark.parametrize("cache", [0, 64])
def test_resumed_run_repeats_the_uninterrupted_one_exactly(tmp_path, cache):
    def config(**kwargs):
        base = dict(steps=40, batch_size=32, eval_every=10, dropout=True, teacher_cache_mb=cache)
        return FinetuneConfig(**base, **kwargs)

    def build():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Linear(32, 64), nn.Dropout(0.2), nn.Linear(64, 64), nn.Linear(64, 5)
        )

    whole, teacher = _pair(build)
    expected = finetune(whole, teacher, _data(), config())

    def interrupt(info):
        if info.step == 25:
            raise KeyboardInterrupt

    cut, _ = _pair(build)
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 10}
    with pytest.raises(KeyboardInterrupt):
        finetune(cut, teacher, _data(), config(**kept), progress=interrupt)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-0000010.pt", "step-0000020.pt"]
    before = torch.load(tmp_path / "step-0000020.pt", weights_only=True)["seconds"]
    again, _ = _pair(build)
    torch.manual_seed(123)  # the caller's random state must not matter
    resumed = finetune(again, teacher, _data(), config(**kept, resume=True))
    assert resumed.history == expected.history
    assert resumed.evaluations == expected.evaluations
    assert resumed.seconds > before > 0  # of the whole run
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_resume_refuses_another_runs_checkpoint_and_an_empty_directory(tmp_path):
    student, teacher = _pair()
    kept = {"checkpoint_dir": tmp_path, "checkpoint_every": 5}
    with pytest.raises(UsageError, match="no checkpoint"):
        finetune(student, teacher, _data(), FinetuneConfig(steps=5, resume=True, **kept))
    finetune(student, teacher, _data(), FinetuneConfig(steps=5, **kept))
    with pytest.raises(UsageError, match="batch_size=32"):
        finetune(
            student, teacher, _data(), FinetuneConfig(steps=5, batch_size=8, resume=True, **kept)
        )
    config = FinetuneConfig(steps=5, teacher_cache_mb=64, resume=True, **kept)
    with pytest.raises(UsageError, match="teacher_cache=False"):
        finetune(student, teacher, _data(), config)
    grouped, _ = _pair(config=TernaryConfig(granularity="group", group_size=32))
    config = FinetuneConfig(steps=5, resume=True, **kept)
    with pytest.raises(UsageError, match=r"layer 0='twn, channel, A8', .* 'twn, group 32, A8'"):
        finetune(grouped, teacher, _data(), config)
    fewer, _ = _pair(config=TernaryConfig(exclude=("0",)))
    with pytest.raises(UsageError, match="layer 0='twn, channel, A8', this run has None"):
        finetune(fewer, teacher, _data(), config)
    newest = next(tmp_path.iterdir())
    torch.save({"step": 5, "student": {}}, newest)
    with pytest.raises(UsageError, match="another version"):
        finetune(student, teacher, _data(), FinetuneConfig(steps=5, resume=True, **kept))
    newest.write_bytes(b"cut off")
    with pytest.raises(InputError, match="cannot be read"):
        finetune(student, teacher, _data(), FinetuneConfig(steps=5, resume=True, **kept))


def test_a_new_run_does_not_mix_its_checkpoints_with_an_earlier_ones(tmp_path):
    """The newest by number are kept: the later steps of the earlier run would be."""
    student, teacher = _pair()
    finetune(student, teacher, _data(), FinetuneConfig(steps=5, checkpoint_dir=tmp_path))
    with pytest.raises(UsageError, match=r"earlier run \(step-0000005.pt\)"):
        finetune(student, teacher, _data(), FinetuneConfig(steps=2, checkpoint_dir=tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["step-0000005.pt"]


def test_nan_stops_with_the_step_and_the_remedy():
    student, teacher = _pair()
    data = _data()
    data["input"][:] = np.nan
    with pytest.raises(StageError, match=r"step 1\b[\s\S]*learning rate"):
        finetune(student, teacher, data, FinetuneConfig(steps=5))


def test_the_callers_random_state_modes_and_gradients_are_put_back():
    student, teacher = _pair()
    student.train()
    student[2].weight.requires_grad_(False)
    state = torch.get_rng_state()
    finetune(student, teacher, _data(), FinetuneConfig(steps=3))
    assert torch.equal(state, torch.get_rng_state())
    assert student.training
    assert not student[2].weight.requires_grad
    assert student[0].weight.grad is None


def test_progress_hears_every_step_with_loss_and_eta():
    student, teacher = _pair()
    heard = []
    finetune(
        student, teacher, _data(), FinetuneConfig(steps=6, eval_every=3), progress=heard.append
    )
    assert [info.step for info in heard] == [1, 2, 3, 4, 5, 6]
    assert heard[-1].eta_seconds == 0
    assert all(info.loss > 0 and info.eta_seconds >= 0 for info in heard)
    assert [info.evaluation is not None for info in heard] == [False, False, True] * 2


def test_labels_add_a_task_loss_and_custom_ones_replace_it():
    student, teacher = _pair()
    data = {**_data(), "target": np.random.default_rng(0).integers(0, 5, 256)}
    row = finetune(student, teacher, data, FinetuneConfig(steps=2, labels="target")).history[0]
    assert row["labels"] > 0
    row = finetune(
        student,
        teacher,
        data,
        FinetuneConfig(steps=2, labels="target", label_weight=3.0),
        label_loss=lambda outputs, labels: outputs.sum() * 0 + 7.0,
    ).history[0]
    assert row["labels"] == 21.0
    with pytest.raises(UsageError, match="no entry 'missing'"):
        finetune(student, teacher, data, FinetuneConfig(steps=2, labels="missing"))


def test_encoder_is_trained_on_cosine_and_block_outputs():
    student, teacher = _pair(lambda: Encoder().eval())
    words = student.words.weight.detach().clone()
    generator = np.random.default_rng(0)
    data = [
        {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        for ids in (generator.integers(0, 60, generator.integers(3, 9)) for _ in range(64))
    ]
    result = finetune(student, teacher, data, FinetuneConfig(steps=30, batch_size=16))
    assert result.objective == "embedding"
    assert set(result.history[0]) == {"step", "loss", "lr", "cosine", "hidden"}
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    assert torch.equal(words, student.words.weight)  # embeddings stay by default


def test_padding_does_not_change_the_loss():
    student, teacher = _pair(lambda: Encoder().eval())
    ids = np.random.default_rng(0).integers(0, 60, (8, 5))
    padded = np.pad(ids, ((0, 0), (0, 4)))
    mask = np.pad(np.ones_like(ids), ((0, 0), (0, 4)))
    config = FinetuneConfig(steps=1, batch_size=8)
    rows = [
        finetune(copy.deepcopy(student), teacher, d, config, eval_data=d).evaluations[0]["loss"]
        for d in (
            {"input_ids": ids, "attention_mask": np.ones_like(ids)},
            {"input_ids": padded, "attention_mask": mask},
        )
    ]
    assert rows[0] == pytest.approx(rows[1], rel=0.02)  # an int8 step may flip, no more


def test_exported_program_modules_can_be_student_and_teacher():
    """Flattened models: linear layers as submodules, no blocks, no train() or eval()."""

    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = _classifier()

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    teacher = torch.fx.symbolic_trace(Flat())
    student = copy.deepcopy(teacher)
    prepare(student)
    x = {"x": _data()["input"]}
    result = finetune(student, teacher, x, FinetuneConfig(steps=20))
    assert result.objective == "logits"
    assert result.history[-1]["hidden"] < result.history[0]["hidden"]


def test_bfloat16_autocast_trains():
    student, teacher = _pair()
    result = finetune(student, teacher, _data(), FinetuneConfig(steps=30, bf16=True))
    assert result.bf16
    assert result.history[-1]["loss"] < result.history[0]["loss"]


def test_unprepared_and_half_precision_students_are_refused():
    with pytest.raises(UsageError, match="prepare"):
        finetune(_classifier(), _classifier(), _data())
    student = _classifier().half()
    prepare(student)
    with pytest.raises(UsageError, match=r"model\.float\(\)"):
        finetune(student, _classifier(), _data())


@pytest.mark.parametrize(
    "kwargs",
    [{"steps": 0}, {"batch_size": 0}, {"objective": "magic"}, {"lr": -1.0}, {"resume": True}],
)
def test_bad_settings_are_refused(kwargs):
    with pytest.raises(UsageError):
        FinetuneConfig(**kwargs)


def test_files_arrays_tuples_and_datasets_give_the_same_run(tmp_path):
    data = _data(64)
    np.savez(tmp_path / "data.npz", **data)
    from safetensors.numpy import save_file

    save_file(data, tmp_path / "data.safetensors")
    x = torch.from_numpy(data["input"])
    sources = [
        data,
        tmp_path / "data.npz",
        str(tmp_path / "data.safetensors"),
        torch.utils.data.TensorDataset(x),
        torch.utils.data.TensorDataset(x, torch.zeros(64)),  # the extra one is a label: unused
        [{"input": row} for row in x],
    ]
    histories = []
    for source in sources:
        student, teacher = _pair()
        histories.append(finetune(student, teacher, source, FinetuneConfig(steps=3)).history)
    assert all(history == histories[0] for history in histories)


def _tokenizer(tmp_path):
    """A word-level tokenizer.json."""
    tokenizers = pytest.importorskip("tokenizers")
    vocab = {"[UNK]": 0, **{f"w{i}": i + 1 for i in range(50)}}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def test_a_directory_of_text_is_tokenized_line_by_line(tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "b.txt").write_text("w1 w2\n\n  w3 w4 w5 w6 w7\n", "utf-8")
    (text / "a.txt").write_text("w9\n", "utf-8")
    samples = as_samples(text, _tokenizer(tmp_path), max_length=4)
    assert [samples[i]["input_ids"] for i in range(3)] == [[10], [2, 3], [4, 5, 6, 7]]
    batch = Batches(samples, 3).collate(torch.tensor([0, 2]))
    assert batch["input_ids"].tolist() == [[10, 0, 0, 0], [4, 5, 6, 7]]
    assert batch["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    lines = [f"w{i % 50} w{(i * 7) % 50} w3" for i in range(40)]
    student, teacher = _pair(lambda: Encoder().eval())
    config = FinetuneConfig(steps=2, batch_size=8)
    finetune(student, teacher, lines, config, tokenizer=_tokenizer(tmp_path))


def test_text_errors_say_what_to_do(tmp_path):
    with pytest.raises(UsageError, match="tokenizer"):
        as_samples(["some text"])
    with pytest.raises(InputError, match=re.escape("no .txt file")):
        as_samples(tmp_path, _tokenizer(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="not UTF-8"):
        as_samples(tmp_path, tmp_path / "tokenizer.json")
    with pytest.raises(UsageError, match="cannot take samples"):
        as_samples(42)
    json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    (tmp_path / "vocab.txt").write_text("w1\nw2\n")
    with pytest.raises(InputError, match="no tokenizer can be read from it"):
        as_samples(["some text"], tmp_path / "vocab.txt")


def test_batches_cover_each_epoch_once_and_depend_only_on_seed_and_step():
    samples = as_samples(_data(50))
    batches = Batches(samples, 8, seed=3)
    epoch = torch.cat([batches.indices(step) for step in range(batches.per_epoch)])
    assert len(set(epoch.tolist())) == 48
    later = batches.indices(17)
    assert torch.equal(later, Batches(samples, 8, seed=3).indices(17))
    assert not torch.equal(later, Batches(samples, 8, seed=4).indices(17))
    fixed = Batches(samples, 8, seed=3, fixed=True)
    parts = [
        {tuple(fixed.indices(step).tolist()) for step in range(start, start + fixed.per_epoch)}
        for start in (0, fixed.per_epoch)
    ]
    assert parts[0] == parts[1]


def test_split_holds_out_the_tail():
    train, held_out = split(as_samples(_data(50)))
    assert (len(train), len(held_out)) == (45, 5)
    data = _data(50)["input"]
    assert np.array_equal(held_out[0]["input"], data[45])
