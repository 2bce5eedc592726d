"""Tests many processes on one cache directory: stopped, started together, forked, evicting.

What happens when one is killed is in `test_cache_faults.py`. Nothing here depends on how fast a
process runs or on which of them runs first: where order matters, they wait for each other.
"""

from __future__ import annotations

import contextlib
import errno
import os
import random
import signal
import threading
import time
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache.disk import Claim, DiskCache
from jitattn.cache.store import Bad
from jitattn.jit import build, nvrtc
from tests.cpu.processes import FORK, Child, together
from tests.cpu.specs import combine_spec, fake_entry

pytestmark = [
    FORK,
    # The children do nothing that other threads of the parent could have locked.
    pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """However slow the machine is, no lock is given up."""
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "3600")


def cold_build() -> list[str]:
    """Build in a process that knows nothing yet; (origin, sha256 of the cubin)."""
    build.clear_memory()
    built = build.build(combine_spec())
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
        assert not child.has_answered(0.005), child.result()
    return child


def test_killed_lock_holder_frees_the_lock(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = build.key_of(combine_spec())
    lock_holder(cache_dir, key).kill()
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0")  # free now, or never
    claim = DiskCache(cache_dir).claim(key, "sm_80")
    assert isinstance(claim, Claim)
    assert claim.holds_lock
    with claim:
        assert not DiskCache(cache_dir).claim(key, "sm_80").holds_lock


@pytest.mark.parametrize("count", [32, 64])
def test_cold_processes_compile_once(count: int) -> None:
    results = together(lambda _: cold_build(), count)
    assert sorted(origin for origin, _ in results) == ["compiled"] + ["disk"] * (count - 1)
    assert len({digest for _, digest in results}) == 1


@pytest.mark.usefixtures("windows")
def test_cold_processes_compile_once_on_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other branch, with another kind of lock."""
    import filelock

    monkeypatch.setattr(filelock, "FileLock", filelock.SoftFileLock)
    results = together(lambda _: cold_build(), 16)
    assert sorted(origin for origin, _ in results) == ["compiled"] + ["disk"] * 15


def test_different_kernels_are_compiled_side_by_side(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that waits for the lock of its kernel holds up nobody else's."""
    first, *others = (combine_spec(head_dim_v=dim) for dim in (16, 32, 48))
    first_key = build.key_of(first)
    second = next(spec for spec in others if build.key_of(spec)[:4] != first_key[:4])

    def wait(_: float) -> None:
        raise AssertionError("it waits for the lock of another kernel")

    with DiskCache(cache_dir).claim(first_key, "sm_80") as none:
        assert none is None
        monkeypatch.setattr(cache.time, "sleep", wait)
        assert build.build(second).origin == "compiled"


def test_stopped_lock_holder_delays_by_the_timeout_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0.3")
    key = build.key_of(combine_spec())

    holder = lock_holder(cache_dir, key)
    try:
        os.kill(holder.pid, signal.SIGSTOP)
        start = time.monotonic()
        assert build.build(combine_spec()).origin == "compiled"
        assert time.monotonic() - start >= 0.3
    finally:
        holder.kill()
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_no_locks_on_this_filesystem(monkeypatch: pytest.MonkeyPatch) -> None:
    """None waits for another: all are in the compiler at one time, and make the same bytes."""
    fcntl = pytest.importorskip("fcntl")

    def no_flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", no_flock)
    here, arrive = os.pipe()
    os.set_blocking(here, False)
    gate, opener = os.pipe()
    arrived = 0
    real = nvrtc.compile_spec

    def compile_spec(*arguments: object) -> object:
        os.write(arrive, b"x")
        os.read(gate, 1)  # until all have arrived
        return real(*arguments)

    def work(_: int) -> list[str]:
        os.close(opener)
        monkeypatch.setattr(nvrtc, "compile_spec", compile_spec)
        return cold_build()

    def count() -> None:
        nonlocal arrived
        with contextlib.suppress(BlockingIOError):
            arrived += len(os.read(here, 8))
            if arrived == 8:
                os.close(opener)

    results = together(work, 8, count)
    assert [origin for origin, _ in results] == ["compiled"] * 8
    assert len({digest for _, digest in results}) == 1
    assert cold_build()[0] == "disk"
    for descriptor in (here, arrive, gate):
        os.close(descriptor)


LIMIT, LARGEST = 1 << 20, 48 << 10
#: What eight writers can have written since they last counted.
SLACK = 8 * (LIMIT // 64 + LARGEST)


def sizes_of(number: int, count: int = 16) -> list[int]:
    """Sizes of the entries that a writer writes."""
    chance = random.Random(number)
    return [chance.randrange(4_000, 40_000) for _ in range(count)]


def test_eviction_with_eight_writers_in_turn(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each knows only what it wrote itself since it last counted: the limit holds all the same."""
    monkeypatch.setattr(os, "fsync", lambda _: None)  # which takes its time
    monkeypatch.setenv("JITATTN_CACHE_MAX_BYTES", str(LIMIT))
    writers, used = [DiskCache(cache_dir) for _ in range(8)], []
    sizes = [sizes_of(number) for number in range(8)]
    for step in range(16):
        for number, disk in enumerate(writers):
            assert disk.write(fake_entry(1000 * number + step, sizes[number][step]))
            used.append(sum(DiskCache(cache_dir).usage().values()))
    assert max(used) <= LIMIT + SLACK
    assert min(used[-40:]) > LIMIT // 2  # and it is not simply emptied


def test_eviction_under_eight_writers(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setenv("JITATTN_CACHE_MAX_BYTES", str(LIMIT))

    def write(number: int) -> int:
        disk, chance, wrong = DiskCache(cache_dir), random.Random(number), 0
        for step, size in enumerate(sizes_of(number)):
            entry = fake_entry(1000 * number + step, size)
            assert disk.write(entry)
            other = fake_entry(1000 * chance.randrange(8) + chance.randrange(step + 1))
            wrong += isinstance(disk.look(other.metadata.key, "sm_80"), Bad)
        return wrong

    assert together(write, 8) == [0] * 8  # no reader ever saw a torn entry
    assert sum(DiskCache(cache_dir).usage().values()) <= LIMIT + SLACK


def test_what_a_process_uses_is_not_evicted(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_CACHE_MAX_BYTES", "1K")
    specs = [combine_spec(head_dim_v=dim) for dim in (16, 32, 48)]
    keys = [build.build(spec).key for spec in specs]
    assert DiskCache(cache_dir).keys() == sorted(keys)
    build.clear_memory()  # another process, which uses none of them
    last = build.build(combine_spec(head_dim_v=64)).key
    assert DiskCache(cache_dir).keys() == [last]


def test_fork_while_a_thread_compiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """A child that is forked then can compile itself: no lock of the compiler is held in it."""
    compiling = threading.Event()
    real = nvrtc._run

    def run(*arguments: object) -> object:
        compiling.set()
        return real(*arguments)

    monkeypatch.setattr(nvrtc, "_run", run)
    thread = threading.Thread(target=build.build, args=(combine_spec(head_dim_v=128),))
    thread.start()
    assert compiling.wait(300)
    results = [Child(cold_build).result() for _ in range(2)]
    thread.join()
    assert [origin for origin, _ in results] == ["compiled", "disk"]
    assert len({digest for _, digest in results}) == 1
