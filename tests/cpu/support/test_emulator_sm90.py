"""Tests the emulator's barriers in shared memory, named barriers and bulk copies."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cpu.support.test_emulator import ANOTHER_READS, ONE_WRITES, build_it, run
from tests.support.emulator import missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")

BARRIER = "if (threadIdx.x == 0) ptx::mbarrier_init(512, 1); __syncthreads();"
#: Copies 16 bytes to address 0.
COPY = """
  if (threadIdx.x == 0) {
    const ptx::TensorMap map = {reinterpret_cast<unsigned char*>(params.data), {8, 1, 1, 1, 1},
                                {16, 16, 16, 16}, {8, 1, 1, 1, 1}};
    ptx::mbarrier_arrive_expect(512, 16);
    ptx::tma_load(0, map, 512, 0, 0, 0, 0);
  }
"""
WAIT = "ptx::mbarrier_wait(512, 0);"
READ_COPY = "if (threadIdx.x == 40) ptx::ld_shared_f32(0);"
WRITE, READ = ONE_WRITES.format(writer=3), ANOTHER_READS.format(reader=40)
ARRIVE = "if (threadIdx.x == 0) ptx::mbarrier_arrive(512);"
HALVES = "if (threadIdx.x < 32) ptx::named_barrier_{}(1, 64); else ptx::named_barrier_{}(1, 64);"
FOUND = [
    ("", BARRIER + COPY + WAIT + READ_COPY),
    ("race", BARRIER + COPY + READ_COPY),
    ("race", BARRIER + READ_COPY + COPY + WAIT),
    ("", BARRIER + READ_COPY + "__syncthreads();" + COPY + WAIT),
    ("", BARRIER + WRITE + "__syncwarp();" + ARRIVE + WAIT + READ),
    ("race", BARRIER + WRITE + ARRIVE + WAIT + READ),  # of another lane than wrote
    ("race", BARRIER + WRITE + "__syncwarp();" + ARRIVE + READ),
    ("", WRITE + HALVES.format("sync", "sync") + READ),
    ("", WRITE + HALVES.format("arrive", "sync") + READ),
    ("race", WRITE + HALVES.format("sync", "arrive") + READ),
    ("race", WRITE + "ptx::named_barrier_sync(1 + threadIdx.x / 32, 32);" + READ),
]


@pytest.mark.parametrize(("found", "body"), FOUND)
def test_watched_kernels(found: str, body: str, tmp_path: Path) -> None:
    library = build_it(body, tmp_path, watched=True)
    for late, last_to_first in ((0, 0), (0, 1), (1, 0), (1, 1)):
        done = run(library, late, last_to_first)
        assert done.returncode == 0, done.stderr
        assert found in done.stdout
        assert bool(found) == bool(done.stdout.strip())


WRONG = {
    "all threads wait": BARRIER + WAIT,
    "no barrier was initialised": "ptx::mbarrier_arrive(512);",
    "more threads arrive": BARRIER + COPY + ARRIVE + ARRIVE,
    "threads disagree": "ptx::named_barrier_sync(1, 64 + threadIdx.x / 32 * 32);",
    "TMA copy is not aligned": BARRIER + COPY.replace("tma_load(0", "tma_load(64"),
}


@pytest.mark.parametrize("message", WRONG)
def test_what_a_gpu_would_not_do_ends_the_process(message: str, tmp_path: Path) -> None:
    done = run(build_it(WRONG[message], tmp_path), 1)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_copy_comes_when_it_is_waited_for(tmp_path: Path) -> None:
    store = "if (threadIdx.x == 0) params.data[4] = ptx::ld_shared_f32(0);"
    careless = build_it(BARRIER + COPY + store, tmp_path)
    assert run(careless, 1).stdout.strip() == "nan"
    assert float(run(careless, 0).stdout) >= 1.0
    right = build_it(BARRIER + COPY + WAIT + store, tmp_path)
    assert float(run(right, 1).stdout) >= 1.0
