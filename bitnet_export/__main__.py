"""``python -m bitnet_export``: the command line without its console script; torchrun needs it."""

from bitnet_export.cli import main

main(prog_name="bitnet-export")
