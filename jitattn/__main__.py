"""Runs `python -m jitattn`, which is jitattn-cache."""

from jitattn.cli import main

main(prog_name="jitattn-cache")
