"""Runs `python -m jitattn.cli`, for environments where jitattn-cache is not on the path."""

from jitattn.cli import main

main(prog_name="jitattn-cache")
