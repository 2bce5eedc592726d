"""Runs `python -m jitattn.cli`, as `python -m jitattn`."""

from jitattn.cli import main

main(prog_name="jitattn-cache")
