"""Tests tools/heat_map.py: the table that it has written has every cell, and their ratios."""

from __future__ import annotations

import csv
import math
from pathlib import Path
from types import ModuleType

import pytest

from tests.cpu.tools.loaded import ROOT, load_tool

TABLE = ROOT / "cuda_src/notes/0010-heat-map.csv"


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("heat_map")


def test_the_table_has_every_cell(tool: ModuleType) -> None:
    with TABLE.open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == tool.COLUMNS
    found = [(row["kind"], int(row["len"]), int(row["head_dim"])) for row in rows]
    assert found == list(tool.cells())


def test_ratios_are_of_the_best_backend(tool: ModuleType) -> None:
    with TABLE.open() as file:
        for row in csv.DictReader(file):
            peers = [float(row[f"{name}_us"]) for name in tool.PEERS]
            best = min(one for one in peers if not math.isnan(one))
            assert math.isclose(float(row["ratio"]), best / float(row["jitattn_us"]), rel_tol=2e-3)


def test_a_map_is_drawn(tool: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    tool.draw(TABLE, tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
