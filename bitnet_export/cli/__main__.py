"""``python -m bitnet_export.cli``: the command line without its console script."""

from bitnet_export.cli import main

main(prog_name="bitnet-export")
