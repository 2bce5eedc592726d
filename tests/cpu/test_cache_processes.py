"""Many processes and one cache directory: killed, stopped, started together, forked, evicting."""

from __future__ import annotations

import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from jitattn.jit import build, files
from jitattn.jit.cache import Claim, DiskCache
from jitattn.jit.store import Bad

from .processes import FORK, Child, together
from .specs import fake_entry, merge_spec

pytestmark = [
    FORK,
    # The children do nothing that other threads of the parent could have locked.
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]


def cold_build() -> list[str]:
    """Build in a process that knows nothing yet; (origin, sha256 of the cubin)."""
    build.clear_memory()
    built = build.build(merge_spec())
    return [built.origin, built.metadata.sha256]


def lock_holder(cache_dir: Path, key: str) -> Child:
    """A process that holds the lock of a kernel, and goes on holding it."""
    held = cache_dir.with_name("held")

    def hold() -> None:
        claim = DiskCache(cache_dir).claim(key, "sm_80")
        assert isinstance(claim, Claim)
        held.touch()
        time.sleep(60)

    child = Child(hold)
    while not held.exists():
        time.sleep(0.005)
    return child


def test_killed_writers_leave_nothing_that_is_believed_and_wrong(cache_dir: Path) -> None:
    entries = [fake_entry(number, 30_000) for number in range(8)]
    delays = random.Random(1)
    disk = DiskCache(cache_dir)

    def write_for_ever() -> None:
        while True:
            for entry in entries:
                disk.write(entry)

    found = missing = 0
    for _ in range(150):
        child = Child(write_for_ever)
        time.sleep(delays.uniform(0.0, 0.012))
        assert child.kill() == -signal.SIGKILL
        for entry in entries:
            looked = disk.look(entry.metadata.key, "sm_80")
            assert looked is None or looked == entry
            found, missing = found + (looked is not None), missing + (looked is None)
        for file in random.Random(found).sample(entries, 4):
            disk.remove(file.metadata.key)
    assert found > 40
    assert missing > 20
    # What the dead left behind goes once it is old enough.
    drafts = list((cache_dir / "v1" / "tmp").iterdir())
    assert drafts
    for draft in drafts:
        os.utime(draft, (1, 1))
    assert disk.sweep() == len(drafts)
    assert list((cache_dir / "v1" / "tmp").iterdir()) == []


def test_killed_lock_holder_frees_the_lock(cache_dir: Path) -> None:
    key = build.key_of(merge_spec())

    lock_holder(cache_dir, key).kill()
    start = time.monotonic()
    with DiskCache(cache_dir).claim(key, "sm_80") as none:
        assert none is None
    assert time.monotonic() - start < 1


@pytest.mark.parametrize("count", [32, 64])
def test_cold_processes_compile_once(count: int) -> None:
    results = together(lambda _: cold_build(), count)
    assert sorted(origin for origin, _ in results) == ["compiled"] + ["disk"] * (count - 1)
    assert len({digest for _, digest in results}) == 1


def test_cold_processes_compile_once_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other branch: no owners and modes, no links to refuse, another kind of lock."""
    import filelock

    monkeypatch.setattr(files, "HAS_OWNERS", False)
    monkeypatch.setattr(files, "_OPEN_FLAGS", 0)
    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    results = together(lambda _: cold_build(), 16)
    assert sorted(origin for origin, _ in results) == ["compiled"] + ["disk"] * 15


def test_different_kernels_are_compiled_side_by_side(cache_dir: Path) -> None:
    """One that waits for the lock of its kernel holds up nobody else's."""
    first, second = merge_spec(), merge_spec(head_dim_v=32)
    with DiskCache(cache_dir).claim(build.key_of(first), "sm_80") as none:
        assert none is None
        start = time.monotonic()
        assert build.build(second).origin == "compiled"
        assert time.monotonic() - start < 10  # the lock's timeout is 60


def test_stopped_lock_holder_delays_by_the_timeout_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0.3")
    key = build.key_of(merge_spec())

    holder = lock_holder(cache_dir, key)
    try:
        os.kill(holder.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert build.build(merge_spec()).origin == "compiled"
        assert time.monotonic() - start >= 0.3
    finally:
        holder.kill()
    build.clear_memory()
    assert build.build(merge_spec()).origin == "disk"


def test_no_locks_on_this_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    results = together(lambda _: cold_build(), 8)
    # None waits for another, so that those that began together all compile: the same bytes.
    assert [origin for origin, _ in results].count("compiled") > 1
    assert len({digest for _, digest in results}) == 1
    assert cold_build()[0] == "disk"


def test_eviction_under_eight_writers(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit, largest_entry = 1 << 20, 48 << 10
    monkeypatch.setenv("JITATTN_CACHE_MAX_BYTES", str(limit))
    sizes: list[int] = []

    def write(number: int) -> int:
        disk, chance, wrong = DiskCache(cache_dir), random.Random(number), 0
        for step in range(40):
            entry = fake_entry(1000 * number + step, chance.randrange(4_000, 40_000))
            assert disk.write(entry)
            other = fake_entry(1000 * chance.randrange(8) + chance.randrange(step + 1))
            wrong += isinstance(disk.look(other.metadata.key, "sm_80"), Bad)
        return wrong

    def measure() -> None:
        sizes.append(sum(DiskCache(cache_dir).usage().values()))

    assert together(write, 8, measure) == [0] * 8  # no reader ever saw a torn entry
    measure()
    assert len(sizes) > 5
    assert max(sizes) <= limit + 8 * largest_entry  # what eight writers have under way
    assert sizes[-1] > limit // 2  # and it is not simply emptied


def test_what_a_process_uses_is_not_evicted(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_CACHE_MAX_BYTES", "1K")
    specs = [merge_spec(head_dim_v=dim) for dim in (16, 32, 48)]
    keys = [build.build(spec).key for spec in specs]
    assert DiskCache(cache_dir).keys() == sorted(keys)
    build.clear_memory()  # another process, which uses none of them
    last = build.build(merge_spec(head_dim_v=64)).key
    assert DiskCache(cache_dir).keys() == [last]


def test_fork_while_a_thread_compiles() -> None:
    thread = threading.Thread(target=build.build, args=(merge_spec(head_dim_v=128),))
    thread.start()
    results = []
    while thread.is_alive():
        results.append(Child(cold_build).result(15))
    thread.join()
    assert [origin for origin, _ in results][:1] == ["compiled"]
    assert len({digest for _, digest in results}) == 1
