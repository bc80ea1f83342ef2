"""``bitnet-export recipes``: what each recipe sets, and which models pick it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import click

from bitnet_export.cli.values import GroupedCommand, option
from bitnet_export.ternary.recipes import RECIPES, Recipe


@click.command("recipes", cls=GroupedCommand)
@option("--json", "as_json", group="Output", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> None:
    """List the recipes: what each makes ternary, how it is fine-tuned, and where that is from.

    export and finetune pick one by looking at the model; --recipe NAME chooses, and any option
    given beside it wins.
    """
    if as_json:
        click.echo(json.dumps([_as_row(recipe) for recipe in RECIPES.values()], indent=1))
        return
    for recipe in RECIPES.values():
        click.echo(f"{recipe.name}: {recipe.summary}")
        click.echo(f"  ternary    {_settings(recipe.ternary)}")
        click.echo(f"  fine-tune  {_settings(recipe.finetune)}")
        click.echo(f"  embeddings {recipe.embeddings}")
        click.echo(f"  calibrate  {recipe.calibration}")
        click.echo(f"  source     {recipe.source}")


def _as_row(recipe: Recipe) -> dict[str, Any]:
    return {
        "name": recipe.name,
        "summary": recipe.summary,
        "source": recipe.source,
        "ternary": dict(recipe.ternary),
        "finetune": dict(recipe.finetune),
        "embeddings": recipe.embeddings,
        "calibration": recipe.calibration,
    }


def _settings(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items()) or "defaults"
