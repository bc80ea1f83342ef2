"""Batches for fine-tuning, from arrays, files, text or a torch Dataset.

Which samples make up the batch of a step depends only on the seed and the step, so a resumed run
sees what the uninterrupted one would have. Reading npz and safetensors is load.data's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bitnet_export.errors import InputError, MissingRequirement, UsageError, first_line
from bitnet_export.load.data import ArrayData, load_data

Batch = dict[str, Tensor]
# Batches sorted together by length: enough to waste little on padding, few enough to stay random.
LENGTH_WINDOW = 16
MASK = "attention_mask"


class Samples(Protocol):
    """What a data source must offer; torch's map-style Dataset does."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any:
        """A mapping from input name to array, or a tuple in the order of forward's arguments."""


class TextSamples:
    """Tokenized lines. Items are dicts of int64 lists: input_ids, attention_mask and so on."""

    def __init__(self, lines: Sequence[str], tokenizer: Path, max_length: int = 128) -> None:
        if not lines:
            raise InputError("there is no text: every line is empty")
        self.items = _tokenize(lines, tokenizer, max_length)
        self.lengths = [len(item["input_ids"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.items[index]


class Subset:
    """Samples start..stop of another source."""

    def __init__(self, samples: Samples, start: int, stop: int) -> None:
        self.samples, self.start, self.stop = samples, start, stop
        lengths = lengths_of(samples)
        if lengths is not None:
            self.lengths = lengths[start:stop]

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> Any:
        return self.samples[self.start + index]


def as_samples(data: Any, tokenizer: str | Path | None = None, max_length: int = 128) -> Samples:
    """data -> samples. Accepted: a path (npz, safetensors, a directory of .txt files with one
    sample a line), a mapping of arrays, a list of strings, anything with len() and [index].

    tokenizer: a tokenizer.json or a Hugging Face tokenizer directory; needed for text.
    """
    if isinstance(data, str | Path):
        path = Path(data)
        if not path.is_dir():
            return load_data(path)
        data = _read_lines(path)
    if isinstance(data, Mapping):
        return ArrayData({name: _to_numpy(value) for name, value in data.items()})
    if isinstance(data, list | tuple) and data and isinstance(data[0], str):
        if tokenizer is None:
            raise UsageError(
                "text needs a tokenizer",
                where="finetune",
                fix="pass tokenizer= (--tokenizer): a tokenizer.json or a Hugging Face directory",
            )
        return TextSamples(data, Path(tokenizer), max_length)
    if not (hasattr(data, "__len__") and hasattr(data, "__getitem__")):
        raise UsageError(
            f"cannot take samples from a {type(data).__name__}",
            where="finetune",
            fix="pass a path, a dict of arrays, a list of strings or a map-style torch Dataset",
        )
    if len(data) == 0:
        raise InputError("the data holds no samples")
    return data


def lengths_of(samples: Samples) -> list[int] | None:
    """Positions of each sample that are not padding at its end, where the source knows them or
    an attention mask tells; None elsewhere."""
    if isinstance(samples, ArrayData):
        mask = samples.arrays.get(MASK)
        if mask is None or mask.ndim != 2:
            return None
        backwards = (mask != 0)[:, ::-1]
        return (mask.shape[1] - backwards.argmax(1) * backwards.any(1)).tolist()
    return getattr(samples, "lengths", None)


def split(samples: Samples, fraction: float = 0.1, most: int = 256) -> tuple[Samples, Samples]:
    """(training samples, held-out tail); a source of one sample is used for both."""
    held_out = min(max(1, int(len(samples) * fraction)), most)
    if len(samples) == 1:
        return samples, samples
    cut = len(samples) - held_out
    return Subset(samples, 0, cut), Subset(samples, cut, len(samples))


class Batches:
    """The batch of every step: ``batches.indices(step)`` and ``batches[step]``.

    Each epoch is a new permutation; the remainder that fills no batch is left out of that epoch.
    fixed: keep the composition of the batches over epochs and permute only their order, so that
    what was computed for a batch can be used again. device: where batches are put. trim: cut the
    padding that all samples of a batch have at their end (for models of any length only).
    drop_last: in_order leaves a smaller last batch out (for models of a fixed batch).
    """

    device = torch.device("cpu")
    trim = False
    drop_last = False

    def __init__(
        self,
        samples: Samples,
        batch_size: int,
        input_names: Sequence[str] = (),
        seed: int = 0,
        fixed: bool = False,
    ) -> None:
        self.samples, self.input_names, self.seed, self.fixed = samples, input_names, seed, fixed
        self.batch_size = min(batch_size, len(samples))
        self.per_epoch = len(samples) // self.batch_size
        self.lengths = lengths_of(samples)
        self._epoch = -1
        self._order: list[Tensor] = []

    def indices(self, step: int) -> Tensor:
        """Sample indices [batch_size] of a step."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self._epoch:
            self._order, self._epoch = self._epoch_order(epoch), epoch
        return self._order[position]

    def __getitem__(self, step: int) -> Batch:
        return self.collate(self.indices(step))

    def in_order(self) -> list[Tensor]:
        """All samples once, for evaluation, by length where known; the last may be smaller."""
        order = torch.arange(len(self.samples))
        if self.lengths is not None:
            order = torch.tensor(self.lengths).argsort(stable=True)
        parts = list(order.split(self.batch_size))
        return parts[:-1] if self.drop_last and len(parts[-1]) < self.batch_size else parts

    def collate(self, indices: Tensor) -> Batch:
        """Samples -> one batch, shorter 1-D samples padded with 0 at the end."""
        items = [self._named(self.samples[int(i)]) for i in indices]
        batch = {name: _stack(name, [item[name] for item in items]) for name in items[0]}
        if self.trim:
            batch = trimmed(batch)
        return {name: t.to(self.device) for name, t in batch.items()}

    def _epoch_order(self, epoch: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.fixed:
            composition = torch.Generator().manual_seed(self.seed * 1_000_003)
            batches = self._compose(composition)
        else:
            batches = self._compose(generator)
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def _compose(self, generator: torch.Generator) -> list[Tensor]:
        """A random partition into batches, of similar lengths where the source knows them."""
        size = self.batch_size
        order = torch.randperm(len(self.samples), generator=generator)[: self.per_epoch * size]
        if self.lengths is not None:
            known = torch.tensor(self.lengths)
            windows = order.split(LENGTH_WINDOW * size)
            order = torch.cat([w[known[w].argsort(stable=True)] for w in windows])
        return list(order.split(size))

    def _named(self, item: Any) -> dict[str, Any]:
        if isinstance(item, Mapping):
            return dict(item)
        values = item if isinstance(item, tuple | list) else (item,)
        names = [*self.input_names[: len(values)]]
        if len(values) > len(names):
            names.append("labels")
        if len(values) > len(names):
            raise UsageError(
                f"a sample has {len(values)} values, forward takes {len(self.input_names)}"
                f" ({', '.join(self.input_names)}) and one more may be the label",
                where="finetune",
                fix="let the Dataset return dicts by input name",
            )
        return dict(zip(names, values, strict=True))


def trimmed(batch: Batch) -> Batch:
    """The batch without the padding at the end that all of its samples have; entries of another
    shape than the attention mask [B, S] stay as they are."""
    mask = batch.get(MASK)
    if mask is None or mask.dim() != 2:
        return batch
    used = mask.ne(0).any(0).nonzero()
    length = int(used[-1]) + 1 if len(used) else 1
    return {n: t[:, :length] if t.shape == mask.shape else t for n, t in batch.items()}


def _stack(name: str, values: list[Any]) -> Tensor:
    tensors = [v if isinstance(v, Tensor) else torch.as_tensor(np.asarray(v)) for v in values]
    if len({t.shape for t in tensors}) > 1:
        if any(t.dim() != 1 for t in tensors):
            shapes = sorted({tuple(t.shape) for t in tensors})
            raise InputError(f"samples of input {name} differ in shape: {shapes[:3]}")
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True)
    batch = torch.stack(tensors)
    return batch.float() if batch.dtype == torch.float64 else batch


def _to_numpy(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else np.asarray(value)


def _read_lines(directory: Path) -> list[str]:
    """The non-empty lines of every .txt file under directory, files in order of their names."""
    files = sorted(directory.rglob("*.txt"))
    if not files:
        raise InputError(
            "there is no .txt file in it", where=str(directory), fix="one sample a line, UTF-8"
        )
    try:
        lines = [line.strip() for f in files for line in f.read_text("utf-8").splitlines()]
    except UnicodeDecodeError as e:
        raise InputError(f"a text file is not UTF-8 ({e})", where=str(directory)) from e
    return [line for line in lines if line]


def _tokenize(lines: Sequence[str], path: Path, max_length: int) -> list[dict[str, list[int]]]:
    file = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        raise InputError("there is no such tokenizer", where=str(path))
    if file.is_file():
        return _tokenize_fast(lines, file, max_length)
    try:
        from transformers import AutoTokenizer
    except ImportError as e:
        raise MissingRequirement(
            "this tokenizer needs transformers", where=str(path), fix="pip install transformers"
        ) from e
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as e:  # OSError, ValueError, or what a damaged file makes of it
        raise _no_tokenizer(path, e) from e
    encoded = tokenizer(list(lines), truncation=True, max_length=max_length)
    return [{name: values[i] for name, values in encoded.items()} for i in range(len(lines))]


def _no_tokenizer(path: Path, error: Exception) -> InputError:
    return InputError(
        f"no tokenizer can be read from it: {first_line(error)}",
        where=str(path),
        fix="pass a tokenizer.json, or the Hugging Face directory of the tokenizer",
    )


def _tokenize_fast(lines: Sequence[str], file: Path, max_length: int) -> list[dict[str, list[int]]]:
    try:
        from tokenizers import Tokenizer
    except ImportError as e:
        raise MissingRequirement(
            "a tokenizer.json needs the tokenizers package", fix="pip install tokenizers"
        ) from e
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as e:  # the library raises nothing more precise
        raise _no_tokenizer(file, e) from e
    tokenizer.enable_truncation(max_length)
    tokenizer.no_padding()
    return [
        {
            "input_ids": e.ids,
            "attention_mask": e.attention_mask,
            "token_type_ids": e.type_ids,
        }
        for e in tokenizer.encode_batch(list(lines))
    ]
