"""Reports registers, spills, shared memory, size and compile time of all tiles. Needs no GPU.

``--check`` fails if a kernel does not compile, or spills without an entry with reason and figure in
tests/data/resource_budget.json.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import compile_matrix as cm
from _table import print_table, say

if TYPE_CHECKING:
    from collections.abc import Sequence


def report(figures: Sequence[cm.Figures]) -> None:
    """Print one table per architecture."""
    for arch in dict.fromkeys(row.spec["arch"] for row in figures):
        rows = [row for row in figures if row.spec["arch"] == arch]
        print_table(
            f"{arch}: {len(rows)} kernels",
            ("kernel", "registers", "spill B", "smem B", "cubin B", "compile ms"),
            [
                (
                    row.name.removeprefix(f"{arch} "),
                    row.registers if not row.error else "failed",
                    row.spill_bytes,
                    row.smem_bytes,
                    row.cubin_bytes,
                    f"{row.compile_ms:.0f}",
                )
                for row in rows
            ],
        )


def unused(figures: Sequence[cm.Figures], budget: Sequence[cm.Allowance]) -> list[cm.Allowance]:
    """Return allowances that no kernel of the report needs."""
    spilling = [row.spec for row in figures if row.spill_bytes]
    return [entry for entry in budget if not any(map(entry.covers, spilling))]


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; with --check return 1 if it is over budget."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default=",".join(cm.TUNED), help="80,90 or sm_80,sm_90")
    parser.add_argument("--full", action="store_true", help="every multiple of 16, dtype and mask")
    parser.add_argument("-j", "--jobs", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="the figures as JSON, and no table")
    parser.add_argument("--check", action="store_true", help="exit 1 over budget")
    parser.add_argument("--budget", type=Path, default=cm.BUDGET_FILE)
    parser.add_argument("--from", dest="source", type=Path, help="figures of an earlier --json")
    arguments = parser.parse_args(argv)

    if arguments.source is not None:
        figures = [cm.Figures(**entry) for entry in json.loads(arguments.source.read_text())]
    else:
        arches = cm.parse_arches(arguments.arch)
        figures = cm.collect(
            arches, full=arguments.full, short=False, jobs=arguments.jobs, quiet=True
        )
    if arguments.json:
        say(json.dumps([asdict(row) for row in figures], indent=1))
    else:
        report(figures)
    if not arguments.check:
        return 0
    budget = cm.load_budget(arguments.budget)
    bad = cm.problems(figures, budget)
    for line in bad:
        print(f"over budget: {line}", file=sys.stderr)
    for entry in unused(figures, budget):
        print(f"not needed by these kernels: {entry.match}", file=sys.stderr)
    if not arguments.json:
        spills = sum(1 for row in figures if row.spill_bytes)
        say(f"\n{len(figures)} kernels, {spills} with spills: {'over' if bad else 'within'} budget")
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
