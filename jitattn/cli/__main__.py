"""`python -m jitattn.cli`, where the script jitattn-cache is not on the path."""

from jitattn.cli import main

main(prog_name="jitattn-cache")
