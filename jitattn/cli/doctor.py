"""Command `jitattn-cache doctor`."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from dataclasses import asdict

import click

from jitattn.cli import health as findings
from jitattn.cli import streams
from jitattn.cli.common import json_option
from jitattn.cli.words import counted
from jitattn.spec.text import one_line

_MARKS = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}
_COLOURS = {"ok": "green", "warn": "yellow", "bad": "red"}


@click.command()
@click.option("--full", is_flag=True, help="ask torch as well, which takes seconds")
@json_option
def doctor(full: bool, as_json: bool) -> None:
    """Report the installation, problems and their remedies; status 1 if there are problems."""
    found = list(findings.examine(full=full))
    counts: Counter[str] = Counter(one.status for one in found)
    if as_json:
        streams.write(f"{json.dumps([asdict(one) for one in found])}\n")
    else:
        lines = []
        for one in found:
            mark = _coloured(one.status, _MARKS[one.status])
            lines.append(f"{mark} {one.area:12s} {one_line(one.found)}")
            if one.advice:
                lines.append(f"{'':17s} -> {one_line(one.advice)}")
        streams.write("\n".join([*lines, "", _summary(counts)]) + "\n")
    sys.exit(1 if counts["bad"] else 0)


def _summary(counts: Counter[str]) -> str:
    """Return the verdict in one line."""
    worst = "bad" if counts["bad"] else "warn" if counts["warn"] else "ok"
    verdict = {
        "ok": "all is well",
        "warn": "it works; see the advice for what is missing",
        "bad": "not all works; see the advice",
    }[worst]
    numbers = (
        f"{counts['ok']} ok, {counted(counts['warn'], 'warning')}, "
        f"{counted(counts['bad'], 'problem')}"
    )
    return f"{numbers}: {_coloured(worst, verdict)}"


def _coloured(status: str, text: str) -> str:
    """Colour a text for a terminal that wants it (https://no-color.org)."""
    is_terminal = sys.stdout is not None and sys.stdout.isatty()
    if not is_terminal or os.environ.get("NO_COLOR"):
        return text
    return click.style(text, fg=_COLOURS[status], bold=status != "ok")
