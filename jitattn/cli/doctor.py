"""`jitattn-cache doctor`."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict

import click

from jitattn import doctor as findings
from jitattn.cli.common import json_option


@click.command()
@click.option("--full", is_flag=True, help="ask torch as well, which takes seconds")
@json_option
def doctor(full: bool, as_json: bool) -> None:
    """Say what is installed, what is wrong or mixed, and what to do. Status 1 if bad."""
    found = list(findings.examine(full=full))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in found]))
    else:
        marks = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}
        for one in found:
            click.echo(f"{marks[one.status]} {one.area:12s} {one.found}")
            if one.advice:
                click.echo(f"{'':17s} -> {one.advice}")
    sys.exit(1 if any(one.status == "bad" for one in found) else 0)
