"""Agreement metrics against hand-computed and SciPy values; the user's metric; NaN."""

import sys

import numpy as np
import pytest
from scipy import stats

from bitnet_export.errors import InputError, StageError
from bitnet_export.verify.quality import (
    kl_divergence,
    load_metric,
    mean_cosine,
    measure_agreement,
    measure_metric,
    quality_loss,
    similarity_spearman,
)

RNG = np.random.default_rng(0)


def data(batches=3, rows=4):
    return [{"x": RNG.standard_normal((rows, 6)).astype(np.float32)} for _ in range(batches)]


def model(noise=0.0, name="logits", seed=1):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((6, 5))
    w = w + noise * rng.standard_normal((6, 5))
    return lambda feeds: {name: (feeds["x"] @ w).astype(np.float32)}


def values(block):
    return {row.metric: row.value for row in block.rows}


def test_a_model_agrees_with_itself():
    block = measure_agreement(model(), model(), data())
    assert block.metric == "top-1 agreement with full precision"
    assert (block.baseline, block.value, block.loss, block.samples) == (1, 1, 0, 12)
    assert values(block)["cosine"] == pytest.approx(1)
    assert values(block)["KL divergence"] == pytest.approx(0, abs=1e-9)


def test_agreement_falls_with_noise_and_counts_rows():
    inputs = data(50)
    block = measure_agreement(model(), model(1.0), inputs)
    before = np.concatenate([model()(f)["logits"] for f in inputs])
    after = np.concatenate([model(1.0)(f)["logits"] for f in inputs])
    assert block.value == (before.argmax(1) == after.argmax(1)).mean()
    assert 0 < block.value < 1
    assert block.loss == pytest.approx(1 - block.value)
    assert values(block)["cosine"] == pytest.approx(mean_cosine(before, after), rel=1e-6)


def test_embeddings_get_spearman_and_padding_is_left_out():
    hidden = RNG.standard_normal((6, 4, 8)).astype(np.float32)
    mask = np.ones((6, 4), np.int64)
    mask[:, 2:] = 0
    spoiled = hidden + np.where(mask[..., None], 0, 100).astype(np.float32)
    feeds = [{"ids": np.zeros((6, 4), np.int64), "attention_mask": mask}]
    block = measure_agreement(
        lambda f: {"last_hidden_state": hidden}, lambda f: {"last_hidden_state": spoiled}, feeds
    )
    assert block.metric == "similarity Spearman with full precision"
    assert block.value == pytest.approx(1)
    assert values(block)["cosine"] == pytest.approx(1)
    del feeds[0]["attention_mask"]
    block = measure_agreement(
        lambda f: {"last_hidden_state": hidden}, lambda f: {"last_hidden_state": spoiled}, feeds
    )
    assert block.value < 0.9


def test_spearman_and_kl_match_scipy():
    a, b = RNG.standard_normal((2, 9, 7))
    b = a + 0.7 * b
    upper = np.triu_indices(9, k=1)
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (a, b)]
    expected = stats.spearmanr(*[(u @ u.T)[upper] for u in unit]).statistic
    assert similarity_spearman(a, b) == pytest.approx(expected)
    assert np.isnan(similarity_spearman(np.ones((4, 2)), a[:4]))
    p, q = (np.exp(x) / np.exp(x).sum(1, keepdims=True) for x in (a, b))
    assert kl_divergence(a, b) == pytest.approx(stats.entropy(p, q, axis=1).mean())
    assert kl_divergence(a + 1e4, b) == pytest.approx(kl_divergence(a, b), rel=1e-6)


def test_nan_is_no_value():
    block = measure_agreement(model(), lambda f: {"logits": model()(f)["logits"] * np.nan}, data())
    assert block.value is None
    assert block.loss is None
    assert all(row.value is None for row in block.rows)


def test_other_outputs_get_the_cosine():
    block = measure_agreement(model(name="output"), model(0.5, name="output"), data())
    assert block.metric == "cosine with full precision"
    assert [row.metric for row in block.rows] == ["cosine"]


def test_outputs_that_are_no_floats_are_compared_value_by_value():
    def classes(noise):
        return lambda f: {"label": model(noise)(f)["logits"].argmax(1)}

    def both(noise):
        return lambda f: {**classes(noise)(f), **model(noise)(f)}

    inputs = data(10)
    block = measure_agreement(classes(0.0), classes(1.0), inputs)
    assert block.metric == "equal values with full precision"
    assert 0 < block.value < 1
    assert block.value == values(measure_agreement(model(), model(1.0), inputs))["top-1 agreement"]
    mixed = measure_agreement(both(0.0), both(1.0), inputs)
    assert mixed.metric == "top-1 agreement with full precision"
    assert values(mixed)["equal values"] == block.value


def test_a_shape_that_depends_on_the_values_cannot_be_measured():
    block = measure_agreement(model(), lambda f: {"logits": np.zeros((1, 5), np.float32)}, data())
    assert block.value is None
    assert block.loss is None


def test_outputs_of_text_count_where_they_are_equal():
    before = {"label": np.array(["a", "b", "c", "d"], object), "empty": np.zeros((4, 0), "f")}
    after = {"label": np.array(["a", "b", "x", "d"], object), "empty": np.zeros((4, 0), "f")}
    block = measure_agreement(lambda f: before, lambda f: after, data())
    assert [(row.output, row.value) for row in block.rows] == [("label", 0.75)]


def test_no_data_and_no_shared_output():
    with pytest.raises(InputError, match="no inputs"):
        measure_agreement(model(), model(), [])
    with pytest.raises(InputError, match="share no"):
        measure_agreement(model(), model(name="other"), data())


@pytest.mark.parametrize(
    ("baseline", "value", "higher", "loss"),
    [
        (0.8, 0.6, True, 0.25),
        (0.8, 0.9, True, -0.125),
        (2.0, 3.0, False, 0.5),
        (-2.0, -3.0, True, 0.5),
        (0.0, 0.0, True, 0.0),
        (0.0, 0.1, True, None),
        (None, 1.0, True, None),
        (1.0, None, True, None),
    ],
)
def test_loss(baseline, value, higher, loss):
    assert quality_loss(baseline, value, higher) == (None if loss is None else pytest.approx(loss))


@pytest.fixture
def user_module(tmp_path, monkeypatch):
    (tmp_path / "my_metrics.py").write_text(
        "def mean(run, data):\n"
        "    return sum(float(run(f)['logits'].mean()) for f in data) / len(data)\n"
        "def error(run, data): return 2.0 if run(data[0])['logits'].shape else 0\n"
        "error.lower_is_better = True\n"
        "def breaks(run, data): raise KeyError('labels')\n"
        "def nothing(run, data): return None\n"
        "def nan(run, data): return float('nan')\n"
        "constant = 3\n"
    )
    (tmp_path / "my_broken_metrics.py").write_text("def metric(run, data)\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield
    sys.modules.pop("my_metrics", None)


@pytest.mark.usefixtures("user_module")
def test_user_metric():
    inputs = data()
    block = measure_metric("my_metrics:mean", model(), model(0.5), inputs, "calib.npz")
    expected = [np.mean([r(f)["logits"].mean() for f in inputs]) for r in (model(), model(0.5))]
    assert [block.baseline, block.value] == pytest.approx(expected)
    assert block.loss == quality_loss(block.baseline, block.value)
    assert block.samples == 12
    assert block.source == "calib.npz"
    lower = measure_metric("my_metrics:error", model(), model(), inputs)
    assert not lower.higher_is_better
    nan = measure_metric("my_metrics:nan", model(), model(), inputs)
    assert nan.value is None
    assert nan.loss is None


@pytest.mark.usefixtures("user_module")
def test_user_metric_errors():
    for spec, message in {
        "my_metrics": "package.module:function",
        "my_metrics:absent": "no function absent",
        "my_metrics:constant": "no function constant",
        "no_such_module:f": "cannot import",
        "my_broken_metrics:metric": "cannot import my_broken_metrics.*SyntaxError",
    }.items():
        with pytest.raises(InputError, match=message):
            load_metric(spec)
    for name, message in {"breaks": "KeyError: 'labels'", "nothing": "TypeError"}.items():
        with pytest.raises(StageError, match=message):
            measure_metric(f"my_metrics:{name}", model(), model(), data())
