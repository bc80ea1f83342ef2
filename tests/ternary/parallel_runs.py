"""What the processes of test_finetune_parallel.py do: the same small run, once for every way of
sharing it. Started by torchrun with the directory to write to; also imported for a run alone."""

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from bitnet_export.ternary import FinetuneConfig, finetune, prepare

STEPS, CUT = 6, 3


class Block(nn.Module):
    """x [B, S, 32] -> the same shape: attention, then a small network."""

    def __init__(self):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(32, 32) for _ in range(3))
        self.norm = nn.LayerNorm(32)
        self.inner = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def forward(self, x, mask):
        q, k, v = (
            layer(x).unflatten(-1, (2, 16)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        y = nn.functional.scaled_dot_product_attention(q, k, v, mask[:, None, None, :] != 0)
        x = self.norm(x + y.transpose(1, 2).flatten(2))
        return x + self.inner(x)


class Encoder(nn.Module):
    """Embeddings, two blocks, and a pooler that the loss never reaches."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(60, 32)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.pooler = nn.Linear(32, 32)

    def forward(self, input_ids, attention_mask):
        x = self.words(input_ids)
        for block in self.blocks:
            x = block(x, attention_mask)
        return {"last_hidden_state": x, "pooled": self.pooler(x[:, 0])}


def models():
    """(student, teacher), the same in every process."""
    torch.manual_seed(0)
    teacher = Encoder().eval()
    student = copy.deepcopy(teacher)
    prepare(student)
    return student, teacher


def data():
    """96 sentences of 3 to 9 words, padded to 12."""
    generator = np.random.default_rng(0)
    mask = (np.arange(12) < generator.integers(3, 10, (96, 1))).astype(np.int64)
    return {"input_ids": generator.integers(1, 60, (96, 12)) * mask, "attention_mask": mask}


def config(**changes):
    base = FinetuneConfig(
        steps=STEPS,
        batch_size=8,
        lr=1e-3,
        eval_every=CUT,
        similarity_weight=1.0,
        relation_weight=1.0,
        seed=1,
        bf16=False,
    )
    return replace(base, **changes)


def run(**changes):
    """(history, evaluations, the student's weights as lists) of one run."""
    student, teacher = models()
    result = finetune(student, teacher, data(), config(**changes))
    assert not result.missing
    weights = {name: p.detach().clone() for name, p in student.state_dict().items()}
    return {"history": result.history, "evaluations": result.evaluations, "weights": weights}


RUNS = {
    "ddp": dict(parallel="ddp"),
    "fsdp": dict(parallel="fsdp"),
    "ddp in parts": dict(parallel="ddp", accumulate=2, similarity_weight=0.0),
    "fsdp in parts, recomputed": dict(
        parallel="fsdp", accumulate=2, recompute=True, similarity_weight=0.0
    ),
}


def main(directory):
    from bitnet_export.ternary.parallel import joined

    torch.set_num_threads(1)
    with joined() as group:
        assert group.size == 2
        found = {}
        for name, changes in RUNS.items():
            kept = directory / name
            found[name] = run(**changes, checkpoint_dir=kept, checkpoint_every=CUT)
        # What one process alone left after CUT steps, continued by two.
        alone = directory / "alone"
        found["fsdp resumed"] = run(parallel="fsdp", checkpoint_dir=alone, resume=True)
        if group.leads:
            torch.save(found, directory / "found.pt")
            (directory / "done.json").write_text(json.dumps(list(found)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
