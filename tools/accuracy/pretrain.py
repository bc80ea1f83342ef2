"""Train the GPT of the table from nothing, in full precision, on the long movie reviews.

A byte-level BPE of 512 tokens and a Llama of 10.6M parameters plus embeddings, context 128. What
comes out is an ordinary Hugging Face directory with its token ids beside it; ternary weights are
somebody else's business. Training is kept as checkpoints and goes on where it stopped.

    python tools/accuracy_table.py pretrain
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

CONTEXT = 128
HELD_OUT_REVIEWS = 400
TRAIN, HELD_OUT, CHECKPOINT = "train.npy", "held-out.npy", "training.pt"
WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Shape:
    """Of the model. The defaults are the table's: 10.6M parameters in linear layers."""

    vocabulary: int = 512
    width: int = 384
    inner: int = 1024
    layers: int = 6
    heads: int = 6


@dataclass(frozen=True)
class Training:
    """AdamW; warm-up, constant, and over the last part (decay) linear to a twentieth, so that a
    run can be made longer until then. A batch is batch * CONTEXT tokens."""

    steps: int = 3000
    batch: int = 8
    lr: float = 1e-3
    warmup: int = 60
    decay: float = 0.3
    seed: int = 0
    save_every: int = 100


def write_tokens(directory: Path, documents: list[str], vocabulary: int) -> None:
    """Train the tokenizer on documents and write tokenizer.json, train.npy and held-out.npy.

    uint16 ids, one stream each; the last HELD_OUT_REVIEWS documents are held out of both.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    held_out = min(HELD_OUT_REVIEWS, len(documents) // 5)
    train, test = documents[:-held_out], documents[-held_out:]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        train[:5000],
        trainers.BpeTrainer(
            vocab_size=vocabulary,
            special_tokens=["<end>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, part in ((TRAIN, train), (HELD_OUT, test)):
        encoded = tokenizer.encode_batch([f"{text}<end>" for text in part])
        np.save(directory / name, np.concatenate([np.array(e.ids, np.uint16) for e in encoded]))


def windows(directory: Path, name: str) -> npt.NDArray[np.int64]:
    """The stream as [n, CONTEXT] ids, without overlap."""
    stream = np.load(directory / name)
    count = len(stream) // CONTEXT
    return stream[: count * CONTEXT].reshape(count, CONTEXT).astype(np.int64)


def build(shape: Shape) -> Any:
    """A freshly initialised Llama."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.inner,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config)


def pretrain(
    directory: Path, shape: Shape, training: Training, documents: Callable[[], list[str]]
) -> Path:
    """Train to the end, from the checkpoint on if there is one; -> directory, loadable by
    transformers. documents: read where there are no token ids yet. The data depends on the seed
    and the step alone."""
    if not (directory / TRAIN).exists():
        write_tokens(directory, documents(), shape.vocabulary)
    torch.manual_seed(training.seed)
    model = build(shape)
    stream = torch.from_numpy(np.load(directory / TRAIN).astype(np.int64))
    optimizer = _optimizer(model, training)
    first, seconds, path = 0, 0.0, directory / CHECKPOINT
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, seconds = state["step"], state["seconds"]
    started = time.perf_counter()
    for step in range(first, training.steps):
        loss = _step(model, optimizer, stream, step, training)
        done = step + 1
        if done % training.save_every == 0 or done == training.steps:
            spent = seconds + time.perf_counter() - started
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save({**state, "step": done, "seconds": spent}, path.with_suffix(".new"))
            path.with_suffix(".new").replace(path)
            print(f"step {done} loss {loss:.3f} {spent:.0f} s", flush=True)
    model.eval().save_pretrained(directory)
    return directory


def _optimizer(model: torch.nn.Module, training: Training) -> torch.optim.Optimizer:
    """Weight decay on matrices only."""
    matrices = [p for p in model.parameters() if p.dim() == 2]
    others = [p for p in model.parameters() if p.dim() != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=training.lr, betas=(0.9, 0.98), fused=True)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    stream: torch.Tensor,
    step: int,
    training: Training,
) -> float:
    """One batch of random windows -> its loss."""
    generator = torch.Generator().manual_seed(training.seed * 1_000_003 + step)
    starts = torch.randint(len(stream) - CONTEXT - 1, (training.batch,), generator=generator)
    ids = stream[starts[:, None] + torch.arange(CONTEXT + 1)]
    for group in optimizer.param_groups:
        group["lr"] = training.lr * _schedule(step, training)
    logits = model(input_ids=ids[:, :-1]).logits
    loss = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return float(loss.detach())


def _schedule(step: int, training: Training) -> float:
    if step < training.warmup:
        return (step + 1) / training.warmup
    left = (training.steps - step) / (training.decay * training.steps)
    return max(0.05, min(1.0, left))
