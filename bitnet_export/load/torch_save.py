"""Files of torch.save: a state_dict, or a whole pickled module behind --trust-pickle.

Everything is first read with weights_only, which runs no code. Only a file that this refuses,
and only with the user's word, is unpickled.
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bitnet_export.errors import InputError

# Where training scripts put the state_dict inside a checkpoint.
CHECKPOINT_KEYS = ("state_dict", "model_state_dict", "model", "module", "net", "weights")


def read_torch_save(path: Path, *, trust_pickle: bool) -> dict[str, torch.Tensor] | nn.Module:
    """A file of torch.save -> its state_dict, or its module if trust_pickle allows.

    Raises InputError: damaged, a pickle that needs trust, or no model in it.
    """
    try:
        content = _read(path, weights_only=True)
    except pickle.UnpicklingError as e:
        if not trust_pickle:
            raise _refusal(path, e) from e
        content = _unpickle(path)
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, zipfile.BadZipFile) as e:
        raise _damaged(path, e) from e
    if isinstance(content, nn.Module):
        return content
    if isinstance(content, Mapping):
        return state_dict_in(content, path)
    raise InputError(
        f"it holds a {type(content).__name__}, neither a state_dict nor a module", where=str(path)
    )


def state_dict_in(content: Mapping[Any, Any], path: Path) -> dict[str, torch.Tensor]:
    """A state_dict, or the one inside a training checkpoint; the "module." that DataParallel
    puts before every key is taken off."""
    for key in (None, *CHECKPOINT_KEYS):
        found = content if key is None else content.get(key)
        if isinstance(found, Mapping) and found:
            tensors = {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}
            if len(tensors) == len(found) or (tensors and key is not None):
                prefix = "module."
                wrapped = all(str(k).startswith(prefix) for k in tensors)
                return {str(k)[len(prefix) if wrapped else 0 :]: v for k, v in tensors.items()}
    names = ", ".join(str(k) for k in list(content)[:5])
    raise InputError(
        f"no state_dict in it: its keys are {names}",
        where=str(path),
        fix=f"save model.state_dict(), alone or under one of {', '.join(CHECKPOINT_KEYS)}",
    )


def _read(path: Path, *, weights_only: bool) -> Any:
    """torch.load with tensors mapped, not read, where the file's format has them apart: a factory's
    module takes a copy of them anyway."""
    apart = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=weights_only, mmap=apart)


def _unpickle(path: Path) -> Any:
    try:
        return _read(path, weights_only=False)
    except (AttributeError, ImportError) as e:
        raise InputError(
            f"the pickle needs code that is not here: {e}",
            where=str(path),
            fix="run where the model's module can be imported (PYTHONPATH), "
            "or save it with bitnet_export.save",
        ) from e
    except Exception as e:
        raise _damaged(path, e) from e


def _refusal(path: Path, error: Exception) -> InputError:
    names = _unsafe_names(path)
    if names is None:
        return _damaged(path, error)
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return InputError(
        "it is a pickle of Python objects, and loading one runs whatever code is in it"
        + (f" (it needs {shown})" if names else ""),
        where=str(path),
        fix="write the model with bitnet_export.save(model, path, example_inputs) where its code "
        "is, or pass --trust-pickle if you trust the author of this file",
    )


def _unsafe_names(path: Path) -> list[str] | None:
    """The classes the pickle wants beyond plain tensors, None if it is damaged. Only its opcodes
    are read; files of the old format are not listed."""
    if not zipfile.is_zipfile(path):
        return []
    try:
        return sorted(torch.serialization.get_unsafe_globals_in_checkpoint(str(path)))
    except Exception:
        return None


def _damaged(path: Path, error: Exception) -> InputError:
    lines = str(error).splitlines()
    return InputError(
        f"the torch.save file is truncated or damaged ({lines[0] if lines else type(error)})",
        where=str(path),
        fix="copy or write it again",
    )
