"""``bitnet-export inspect FILE.onnx | DIR``: operators, ternary layers, and where the bytes are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import align
from bitnet_export.cli.values import GroupedCommand, option

if TYPE_CHECKING:
    from bitnet_export.cli.inspect_model import Inspection


@click.command("inspect", cls=GroupedCommand)
@click.argument("model", type=shared.FILE)
@option("--json", "as_json", group="Output", is_flag=True, help="Print JSON.")
def command(model: Path, as_json: bool) -> None:
    """Show what MODEL holds: an ONNX file, ours or any other, or an exported directory.

    Lists operators, ternary layers with their sizes and sparsity, bytes by part, and the layers
    that an export would make ternary.
    """
    from bitnet_export.cli.inspect_model import inspect_model

    found = inspect_model(model)
    if as_json:
        click.echo(json.dumps(found.as_dict(), indent=1))
        return
    click.echo("\n".join(_lines(found)))


def _lines(found: Inspection) -> list[str]:
    from bitnet_export.report.text import megabytes

    at_rest = found.compressed_bytes
    stored = "" if at_rest is None else f" ({megabytes(at_rest)} compressed)"
    opsets = ", ".join(f"{d or 'ai.onnx'} {v}" for d, v in found.opsets.items())
    lines = [
        f"{found.path}: {megabytes(found.bytes)}{stored}, IR version {found.ir_version}, "
        f"opset {opsets}",
        *(f"  input  {line}" for line in found.inputs),
        *(f"  output {line}" for line in found.outputs),
        "",
        "Operators",
        *align([(name, str(count)) for name, count in found.operators.items()]),
        "",
        "Bytes by part",
        *align([(part, megabytes(count)) for part, count in found.bytes_by_part.items()]),
    ]
    if found.layers:
        header = ("layer", "K", "N", "scale", "zeros", "bytes", "bits/weight", "operator")
        rows = [
            (
                layer.name,
                str(layer.K),
                str(layer.N),
                layer.scale,
                f"{layer.sparsity:.1%}",
                str(layer.bytes),
                f"{layer.bits_per_weight:.2f}",
                layer.operator,
            )
            for layer in found.layers
        ]
        lines += ["", f"{len(rows)} ternary layers", *align([header, *rows])]
    if found.refusal:
        lines += ["", f"An export would refuse it: {found.refusal}"]
    if found.candidates:
        verdicts = [(c.name, str(c.K), str(c.N), c.verdict) for c in found.candidates]
        table = align([("layer", "K", "N", ""), *verdicts])
        lines += ["", "Matrix products with constant weights", *table]
    return lines
