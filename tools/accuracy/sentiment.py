"""Row: MiniLM fine-tuned for sentiment on Rotten Tomatoes sentences, test accuracy in percent.

The full-precision classifier is trained here, with labels, and kept under build/. Its ternary copy
is made by the product, which sees the training sentences as plain text and no labels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from accuracy import texts

HELD_OUT = 1500
MAX_LENGTH = 48
BATCH = 32
Feed = dict[str, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class Training:
    """Of the full-precision classifier: AdamW, warm-up then linear to 0, embeddings frozen."""

    epochs: float = 1.5
    lr: float = 1.5e-4
    seed: int = 0


def split() -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
    """(training, held-out) sentences with labels; the first HELD_OUT of the fixed order are held
    out, and no held-out text is among the training ones."""
    rows = texts.labelled_sentences()
    test = rows[:HELD_OUT]
    seen = {text for text, _ in test}
    return [row for row in rows[HELD_OUT:] if row[0] not in seen], test


def feeds(sentences: list[str], directory: Path, batch: int = BATCH) -> list[Feed]:
    """Sentences in order -> batches of MiniLM's inputs, each padded to its longest."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.enable_truncation(MAX_LENGTH)
    tokenizer.enable_padding()
    made = []
    for start in range(0, len(sentences), batch):
        encoded = tokenizer.encode_batch(sentences[start : start + batch])
        made.append(
            {
                "input_ids": np.array([e.ids for e in encoded], np.int64),
                "attention_mask": np.array([e.attention_mask for e in encoded], np.int64),
                "token_type_ids": np.array([e.type_ids for e in encoded], np.int64),
            }
        )
    return made


def train_classifier(directory: Path, rows: list[tuple[str, int]], training: Training) -> Path:
    """MiniLM with a head of two classes, trained with labels -> a Hugging Face directory."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(training.seed)
    source = texts.minilm_directory()
    model = BertForSequenceClassification.from_pretrained(source, num_labels=2)
    model.train()
    model.bert.embeddings.word_embeddings.requires_grad_(False)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=training.lr, weight_decay=0.01, fused=True)
    steps = round(training.epochs * (len(rows) // BATCH))
    started = time.perf_counter()
    for step, chosen in enumerate(_batches(rows, steps, training.seed)):
        (feed,) = feeds([text for text, _ in chosen], source)
        rate = min((step + 1) / (0.1 * steps), (steps - step) / (0.9 * steps))
        for group in optimizer.param_groups:
            group["lr"] = training.lr * rate
        logits = model(**{name: torch.from_numpy(a) for name, a in feed.items()}).logits
        loss = F.cross_entropy(logits, torch.tensor([label for _, label in chosen]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if (step + 1) % 20 == 0:
            spent = time.perf_counter() - started
            print(f"classifier {step + 1}/{steps} loss {loss:.3f} {spent:.0f} s", flush=True)
    model.eval().save_pretrained(directory)
    AutoTokenizer.from_pretrained(source).save_pretrained(directory)
    return directory


def _batches(rows: list[Any], steps: int, seed: int) -> list[list[Any]]:
    """steps batches of BATCH rows; each epoch a new permutation, whose windows of 16 batches are
    sorted by length so that little is padded, and the batches shuffled again."""
    generator = np.random.default_rng(seed)
    made: list[list[Any]] = []
    while len(made) < steps:
        order = generator.permutation(len(rows)).tolist()
        window = 16 * BATCH
        parts = [order[i : i + window] for i in range(0, len(order), window)]
        by_length = [i for part in parts for i in sorted(part, key=lambda i: len(rows[i][0]))]
        starts = generator.permutation(len(rows) // BATCH) * BATCH
        made += [[rows[i] for i in by_length[start : start + BATCH]] for start in starts]
    return made[:steps]
