"""Runs a program that finds jitattn under other names: ``python -m jitattn.compat PROGRAM``."""

from __future__ import annotations

import argparse
import os
import runpy
import sys
from pathlib import Path

from jitattn.compat import DOORS, alias_from_environment, is_installed


def main() -> None:
    """Alias the names in ``JITATTN_ALIAS`` (default: all that are not installed); run a program."""
    parser = argparse.ArgumentParser(
        prog="python -m jitattn.compat",
        description="Runs a Python program that finds jitattn under the names in JITATTN_ALIAS "
        "(separated by commas; without it, all of ours that are not installed).",
        epilog="Where the command cannot be changed either: PYTHONPATH=$(python -m jitattn.compat "
        "--site) JITATTN_ALIAS=flash_attn PROGRAM",
    )
    parser.add_argument("--site", action="store_true", help="print the folder for PYTHONPATH")
    parser.add_argument(
        "-m", dest="module", nargs=argparse.REMAINDER, help="run a module instead, with arguments"
    )
    parser.add_argument("program", nargs=argparse.REMAINDER, help="file, and its arguments")
    given = parser.parse_args()
    if given.site:
        sys.stdout.write(f"{Path(__file__).parent / '_site'}\n")
        return
    if not given.program and not given.module:
        parser.error("name a program, or --site")
    if "JITATTN_ALIAS" not in os.environ:
        os.environ["JITATTN_ALIAS"] = ",".join(name for name in DOORS if not is_installed(name))
    alias_from_environment()
    if given.module:
        sys.argv = given.module
        sys.path.insert(0, "")
        runpy.run_module(given.module[0], run_name="__main__", alter_sys=True)
        return
    sys.argv = given.program
    sys.path.insert(0, str(Path(given.program[0]).resolve().parent))
    runpy.run_path(given.program[0], run_name="__main__")


if __name__ == "__main__":
    main()
