"""Runs `jitattn-cache` in this process."""

from __future__ import annotations

import json

from click.testing import CliRunner, Result

from jitattn.cli import main


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env=environment)


def result(*arguments: str, status: int = 0) -> object:
    """What a command says with --json."""
    done = run(*arguments, "--json")
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)
