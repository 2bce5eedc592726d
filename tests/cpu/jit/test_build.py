"""Tests kernel building: memory and disk caches, compiler, threads and processes."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.jit import build
from tests.cpu.specs import combine_spec


def test_memory_then_disk(cache_dir: Path) -> None:
    first = build.build(combine_spec())
    assert build.build(combine_spec()) is first
    assert build.stats() == build.Stats(compiled=1, disk_hits=0, memory_hits=1)
    build.clear_memory()
    again = build.build(combine_spec())
    assert again.origin == "disk"
    assert again.cubin == first.cubin
    assert build.stats() == build.Stats(compiled=0, disk_hits=1, memory_hits=0)


def test_cache_off(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_CACHE", "off")
    build.build(combine_spec())
    assert not cache_dir.exists()


def test_cache_read_only(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build.build(combine_spec())
    before = sorted(cache_dir.rglob("*"))
    build.clear_memory()
    monkeypatch.setenv("JITATTN_CACHE", "ro")
    assert build.build(combine_spec()).origin == "disk"
    assert build.build(combine_spec(head_dim_v=32)).origin == "compiled"
    assert sorted(cache_dir.rglob("*")) == before


def test_rebuild_replaces_what_the_driver_refused(cache_dir: Path) -> None:
    good = build.build(combine_spec()).cubin
    (path,) = cache_dir.glob("v1/*/*.cubin")
    path.write_bytes(b"bad")
    assert build.rebuild(combine_spec()).origin == "compiled"
    assert path.read_bytes() == good


def test_bad_entry_is_compiled_anew(cache_dir: Path) -> None:
    build.build(combine_spec())
    (path,) = cache_dir.glob("v1/*/*.cubin")
    path.write_bytes(path.read_bytes()[:-7])
    build.clear_memory()
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_threads_compile_once() -> None:
    barrier = threading.Barrier(8)
    origins = []

    def work() -> None:
        barrier.wait()
        origins.append(build.build(combine_spec()).key)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(origins) == 8
    assert build.stats().compiled == 1


_WORK = """
import json, sys, time
from jitattn.jit import build
from jitattn.kernels.combine import CombineSpec
from jitattn.spec.enums import Dtype
while time.time() < float(sys.argv[1]):
    pass
spec = CombineSpec(dtype=Dtype.BF16, out_dtype=Dtype.BF16, head_dim_v=16, arch="sm_80")
built = build.build(spec)
print(json.dumps([built.origin, built.metadata.sha256]))
"""


@pytest.mark.slow
def test_processes_compile_once(cache_dir: Path) -> None:
    start = str(time.time() + 1.5)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", _WORK, start],
            env=environment,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    results = [json.loads(worker.communicate(timeout=60)[0]) for worker in workers]
    assert sorted(origin for origin, _ in results) == ["compiled"] + ["disk"] * 5
    assert len({digest for _, digest in results}) == 1


def _hold(root: str, key: str, held: object, release: object) -> None:
    claim = cache.DiskCache(Path(root)).claim(key, "sm_80")
    assert isinstance(claim, cache.Claim)
    with claim:
        held.set()
        release.wait(30)


def test_stuck_lock_holder_delays_by_the_timeout_only(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0.3")
    context = multiprocessing.get_context("spawn")
    held, release = context.Event(), context.Event()
    key = build.key_of(combine_spec())
    holder = context.Process(target=_hold, args=(str(cache_dir), key, held, release))
    holder.start()
    try:
        assert held.wait(30)
        start = time.perf_counter()
        assert build.build(combine_spec()).origin == "compiled"
        assert time.perf_counter() - start >= 0.3
    finally:
        release.set()
        holder.join()


def test_same_bytes_from_two_compiles() -> None:
    first = build.build(combine_spec()).cubin
    assert build.rebuild(combine_spec()).cubin == first
