"""How a model file was fine-tuned: a record beside the file, read again when it is exported."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitnet_export import manifest

if TYPE_CHECKING:
    from bitnet_export.report.schema import FinetuneBlock


def finetune_block(result: Any, config: Any) -> FinetuneBlock:
    """A FinetuneResult as the report's block."""
    from bitnet_export.report.schema import FinetuneBlock, FinetunePoint

    held_out = {int(row["step"]): row["loss"] for row in result.evaluations}
    points = [
        FinetunePoint(
            step=int(row["step"]),
            loss=row["loss"],
            learning_rate=row["lr"],
            evaluation=held_out.get(int(row["step"])),
        )
        for row in result.history
    ]
    return FinetuneBlock(
        steps=len(result.history),
        seconds=result.seconds,
        batch_size=config.batch_size,
        metric="held-out loss",
        best_step=int(result.best["step"]),
        best_value=result.best["loss"],
        history=points,
    )


def history_path(model: Path) -> Path:
    """Where the fine-tuning of a model file is recorded."""
    return model.with_name(f"{model.name}.finetune.json")


def write_history(
    model: Path, source: Path, activation_bits: int, block: FinetuneBlock, recipe: str = ""
) -> Path:
    """Record how ``model`` was trained and from what, for the report of its export."""
    path = history_path(model)
    record = {
        "model_sha256": manifest.sha256_of(model),
        "source": str(source.resolve()),
        "activation_bits": activation_bits,
        "recipe": recipe,
        "finetune": asdict(block),
    }
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def trained_recipe(model: Path) -> str:
    """The recipe that a file was fine-tuned with; "" where none is recorded."""
    path = history_path(model)
    try:
        return str(json.loads(path.read_text()).get("recipe", "")) if path.is_file() else ""
    except (ValueError, AttributeError):
        return ""


def origin(model: Path) -> Path | None:
    """What a file of finetune was trained from, at the start of any chain of fine-tunings; None for
    a file that finetune did not write."""
    chain = [model]
    while (found := read_history(chain[-1])) is not None and found[0] not in chain:
        chain.append(found[0])
    return chain[-1] if len(chain) > 1 else None


def read_history(model: Path) -> tuple[Path, FinetuneBlock, int] | None:
    """(full-precision source, training, activation bits) of a model file that finetune wrote and
    nobody changed since, else None."""
    from bitnet_export.report.schema import FinetuneBlock, FinetunePoint

    path = history_path(model)
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text())
        if record["model_sha256"] != manifest.sha256_of(model):
            return None
        block = record["finetune"]
        points = [FinetunePoint(**point) for point in block.pop("history")]
        trained = FinetuneBlock(**block, history=points)
        return Path(record["source"]), trained, int(record["activation_bits"])
    except (ValueError, KeyError, TypeError):
        return None
