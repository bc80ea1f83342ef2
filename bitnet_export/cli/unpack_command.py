"""``bitnet-export unpack DIR -o FILE.onnx``: the plain ONNX file of a compressed export."""

from __future__ import annotations

from pathlib import Path

import click

from bitnet_export.cli import shared_options as shared
from bitnet_export.cli.output import check_output_file
from bitnet_export.cli.values import GroupedCommand, option


@click.command("unpack", cls=GroupedCommand)
@click.argument("directory", type=shared.FILE)
@option(
    "--output",
    "-o",
    group="Output",
    type=shared.FILE,
    metavar="FILE",
    help="The ONNX file to write. [default: DIRECTORY's name with .onnx]",
)
@option("--force", "overwrite", group="Output", is_flag=True, help="Replace an existing file.")
def command(directory: Path, output: Path | None, overwrite: bool) -> None:
    """Write the ONNX file of DIRECTORY, which an export wrote with --compress, for runtimes other
    than load_session.

    The directory stays as it is; its hashes are checked first.
    """
    output = output or Path(f"{directory.resolve().name}.onnx")
    check_output_file(output, overwrite)
    from bitnet_export import manifest, onnx_io
    from bitnet_export.compress import PlainModel
    from bitnet_export.report.text import megabytes

    manifest.check_manifest(directory)
    plain = PlainModel(directory / manifest.MODEL)
    onnx_io.write_model(onnx_io.read_model(plain.path), output)
    click.echo(f"written to {output} ({megabytes(output.stat().st_size)})")
