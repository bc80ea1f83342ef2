"""``bitnet-export doctor``: what this machine can do, and what to install for the rest."""

from __future__ import annotations

import json

import click

from bitnet_export.cli.doctor_checks import MISSING, Check, run_checks
from bitnet_export.cli.values import GroupedCommand, option

_MARKS = {"ok": "ok", "limited": "limited", MISSING: "MISSING", "absent": "-"}


@click.command("doctor", cls=GroupedCommand)
@option("--json", "as_json", group="Output", is_flag=True, help="Print JSON.")
def command(as_json: bool) -> int:
    """Show versions, execution providers, processor, GPU, compilers and native libraries, and for
    what is missing the command that installs it. Exit code 3 if a required package is missing."""
    from bitnet_export import env

    checks = run_checks()
    code = 3 if any(check.status == MISSING for check in checks) else 0
    if as_json:
        rows = [vars(check) for check in checks]
        click.echo(json.dumps({"environment": env.describe(), "checks": rows}, indent=1))
        return code
    for group in dict.fromkeys(check.group for check in checks):
        click.echo(f"{group}")
        for check in checks:
            if check.group == group:
                _print(check)
    return code


def _print(check: Check) -> None:
    click.echo(f"  {_MARKS[check.status]:8}{check.name:28}{check.detail}")
    if check.fix and check.status != "ok":
        click.echo(f"  {'':8}-> {check.fix}")
