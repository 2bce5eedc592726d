"""Tests the model of context-parallel calls: its pairs, its limits, where methods cross over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "tools"))

from _parallel_model import Machine, Work, pairs_of, predict  # noqa: E402

from jitattn.distributed.pieces import Piece  # noqa: E402


@pytest.mark.parametrize("window", [(None, None), (None, 0), (4, 0), (2, 3), (None, 2), (5, None)])
def test_pairs_of_a_piece(window: tuple[int | None, int | None]) -> None:
    """Of those that there are: the first row sees a key, and so does the last."""
    left, right = window
    for rows, keys in ((7, 7), (5, 9), (9, 5), (1, 8), (8, 1)):
        if keys - rows + (9 if right is None else right) < 0:
            continue
        piece = Piece(0, rows, 0, keys, left, right, (0, 0), 0, 0, 0, 1, 0)
        wanted = sum(
            (left is None or j >= i + keys - rows - left)
            and (right is None or j <= i + keys - rows + right)
            for i in range(rows)
            for j in range(keys)
        )
        assert pairs_of(piece) == wanted


def test_pairs_of_a_call() -> None:
    assert Work(64).pairs == 64 * 65 // 2
    seen = sum(min(i + 1, 8) + min(2, max(0, i - 7)) for i in range(64))
    assert Work(64, window=8, keep_first=2).pairs == seen


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_free_transfers_leave_even_work(method: str) -> None:
    free = Machine(link_gbytes=1e9, net_gbytes=1e9, memory_gbytes=1e9, latency_us=0, launch_us=0)
    for backward in (False, True):
        found = predict(Work(2**17), 8, method, free, backward=backward)
        assert found.efficiency == pytest.approx(1, abs=0.01)
        assert found.hidden == pytest.approx(1) or method == "ulysses"


def test_slow_transfers_cost_what_they_take() -> None:
    slow = Machine(link_gbytes=0.01)
    work = Work(2**14)
    found = predict(work, 2, "ring", slow, backward=False)
    # The row of keys and values of one rank, of which the diagonal's half hides a little.
    assert found.transfer == pytest.approx(2**13 * 2 * 8 * 128 * 2 / 0.01e9, rel=0.3)
    assert found.both == pytest.approx(found.transfer, rel=0.3)
    assert found.efficiency < 0.1


def test_heads_are_exchanged_faster_within_a_node_than_across() -> None:
    work, machine = Work(2**17), Machine()
    near = predict(work, 8, "ulysses", machine, backward=False)
    far = predict(work, 32, "ulysses", machine, backward=False)
    assert near.efficiency > far.efficiency


def test_simulation_prints_every_method() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "bench_parallel.py"), "--simulate", "8,64",
         "--lengths", "131072,1048576"],
        capture_output=True, text=True, check=True, cwd=ROOT,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    for method in ("ring", "allgather", "ulysses", "hybrid"):
        assert any(f" {method} " in f" {line} " for line in lines)
    assert any("best" in line for line in lines)
