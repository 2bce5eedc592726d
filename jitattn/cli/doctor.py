"""Command `jitattn-cache doctor`."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from jitattn.cli import health as findings
from jitattn.cli.common import emit, json_option
from jitattn.spec.text import one_line


@click.command()
@click.option("--full", is_flag=True, help="ask torch as well, which takes seconds")
@json_option
def doctor(full: bool, as_json: bool) -> None:
    """Report the installation, problems and their remedies; status 1 if there are problems."""
    found = list(findings.examine(full=full))
    marks = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}
    lines = []
    for one in found:
        lines.append(f"{marks[one.status]} {one.area:12s} {one_line(one.found)}")
        if one.advice:
            lines.append(f"{'':17s} -> {one_line(one.advice)}")
    emit([asdict(one) for one in found], as_json, "\n".join(lines))
    sys.exit(1 if any(one.status == "bad" for one in found) else 0)
