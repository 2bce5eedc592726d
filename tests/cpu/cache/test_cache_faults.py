"""Injects every error of every system call of every operation of the cache.

After any fault, only documented errors are raised, no entry is wrong or incomplete, nothing outside
the cache has changed, no descriptor or draft is left, and a retry succeeds. A process killed at a
call leaves at most drafts, which are removed later.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.cache import files, leftovers
from tests.cpu.cache.faults import Calls, Fault, descriptors, faults, install, kills, state, tree
from tests.cpu.cache.operations import (
    ENTRIES,
    OPERATIONS,
    Operation,
    Place,
    add_leftovers,
    damage,
    found_anew,
    prepared,
    restored,
    tried,
)
from tests.cpu.processes import FORK, Child

pytestmark = pytest.mark.skipif(not files.HAS_OWNERS, reason="names the calls of POSIX")

#: Those that change something.
KILLED = OPERATIONS.keys() - {"read", "list", "recall", "read an imported kernel"}


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A place for thousands of small caches: in memory, where there is such a filesystem."""
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        memory = tmp_path
    with tempfile.TemporaryDirectory(prefix="jitattn-test-", dir=memory) as name:
        yield Path(name) / "place"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    return install(monkeypatch)


@pytest.mark.parametrize("name", OPERATIONS)
def test_fault_at_any_call(
    name: str, calls: Calls, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    snapshot = prepared(operation, folder, monkeypatch)
    place = restored(snapshot)
    with calls.watched() as names:
        operation.act(place)
    assert operation.is_done(place)
    assert len(names) > 2
    opened = descriptors()
    restored(snapshot)
    before = left = state(folder)
    # Most errors have the same outcome: each outcome is checked once, and done again once.
    outcomes = set()
    for fault in faults(list(names)):
        place = found_anew(folder) if left == before else restored(snapshot)
        with calls.watched(fault):
            result = tried(operation, place)
        assert descriptors() == opened, fault.text
        left = state(folder)
        is_believed = operation.believed in fault.text.split()
        may_leave_draft = fault.name == "unlink"  # one that has its name already
        shown = type(result) if isinstance(result, Exception) else repr(result)
        outcome = (is_believed, may_leave_draft, shown, left)
        if outcome not in outcomes:
            outcomes.add(outcome)
            assert is_believed or operation.is_honest(place, result), f"{fault.text}: {result!r}"
            check(operation, place, fault.text, may_leave_draft=may_leave_draft)
            tried(operation, place)
            assert operation.is_done(place), fault.text
            left = ()


def check(operation: Operation, place: Place, text: str, *, may_leave_draft: bool) -> None:
    assert tree(place.folder / "outside") == {"file": b"none of the cache's business"}, text
    known = {"cache", "home", "temporary", "outside"}
    known |= {"kernels.zip", "target.zip", "again.zip", "used.jsonl"}
    if not may_leave_draft:
        assert set(os.listdir(place.folder)) <= known, text
    for entry in ENTRIES:
        looked = place.look(entry)
        assert looked in (None, entry) or operation.prepare is damage, text
    left = leftovers.find(place.disk, [])
    if operation.prepare is not add_leftovers:
        assert "draft" not in {one.kind for one in left}, text
        place.disk.sweep(0)
        assert leftovers.find(place.disk, []) == [], text


@FORK
@pytest.mark.parametrize("name", sorted(KILLED))
def test_killed_at_any_call(
    name: str, calls: Calls, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation = OPERATIONS[name]
    snapshot = prepared(operation, folder, monkeypatch)
    place = restored(snapshot)
    with calls.watched() as names:
        operation.act(place)

    def end() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    for fault in kills(list(names), end):
        place = restored(snapshot)

        def work(place: Place = place, fault: Fault = fault) -> None:
            with calls.watched(fault):
                operation.act(place)

        assert Child(work).wait() == -signal.SIGKILL, fault.text
        for entry in ENTRIES:
            looked = place.look(entry)
            assert looked in (None, entry) or operation.prepare is damage, fault.text
        assert operation.is_sound(place), fault.text
        tried(operation, place)
        assert operation.is_done(place), fault.text
        for draft in leftovers.find(place.disk, []):
            if draft.kind == "draft":
                os.utime(place.disk.store / "tmp" / draft.name, (1, 1))
        place.disk.sweep(0)
        assert leftovers.find(place.disk, []) == [], fault.text
