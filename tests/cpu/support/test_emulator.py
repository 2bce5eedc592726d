"""Tests the kernel emulator: calls through the GPU path, and faults that it must detect."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import jitattn
from tests.support.compare import rel_l2
from tests.support.emulator import (
    HERE,
    LIBRARY_FLAGS,
    WATCH_FLAGS,
    build,
    emulated,
    missing,
    prelude,
)

pytestmark = pytest.mark.skipif(bool(missing()), reason=missing() or "nothing is missing")

DTYPES = {torch.float16: 1e-3, torch.bfloat16: 6e-3, torch.float32: 2e-6}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "arch"),
    [(torch.float16, "sm_86"), (torch.bfloat16, "sm_80"), (torch.float32, "sm_89")],
    ids=str,
)
def test_values_and_gradients(dtype: torch.dtype, arch: str) -> None:
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 70, 4, 64), (1, 150, 2, 64), (1, 150, 2, 64))
    qkv = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    given: dict[str, Any] = {"mask": jitattn.Window(40, 0, keep_first=3)}
    own = [x.double().requires_grad_() for x in qkv]
    truth = jitattn.reference.reference(*own, **given)
    d_out = torch.randn(truth.shape, generator=generator).to(dtype)
    wanted = torch.autograd.grad(truth, own, d_out.double())
    with emulated(arch) as emulator:
        leaves = [x.detach().requires_grad_() for x in qkv]
        out = jitattn.attention(*leaves, **given)
        found = torch.autograd.grad(out, leaves, d_out)
    families = {spec.family for spec in emulator.launched}
    assert {"fwd", "bwd"} <= families
    assert {spec.arch for spec in emulator.launched} == {arch}
    assert rel_l2(out, truth) < DTYPES[dtype]
    for one, other in zip(found, wanted, strict=True):
        assert rel_l2(one, other) < 2 * DTYPES[dtype]


def test_the_way_back_is_clean() -> None:
    with emulated("sm_80"):
        assert torch.zeros(1, device="cuda").is_cuda
    assert not torch.zeros(1).is_cuda
    q = torch.randn(1, 5, 2, 16)
    torch.testing.assert_close(jitattn.attention(q, q, q), jitattn.attention(q, q, q))
    assert jitattn.explain(q, q, q).path == "cpu"


HEAD = """
#include "jitattn/types.cuh"
#include "jitattn/ptx/cp_async.cuh"
#include "jitattn/ptx/shared.cuh"
#include "jitattn/ptx/ldmatrix.cuh"
#include "jitattn/ptx/sm90/mbarrier.cuh"
#include "jitattn/ptx/sm90/tma.cuh"
#include "jitattn/ptx/sm90/warpgroup.cuh"
struct Params { float* data; };
extern "C" void jitattn_it(const Params params) {
  using namespace jitattn;
"""
WRONG = {
    "all threads wait": "if (threadIdx.x % 32 == 0) __syncthreads(); else __syncwarp();",
    "out of shared memory": "ptx::st_shared_b32(1024, 0);",
    "shared memory is not aligned": "uint32_t r[4]; ptx::ldmatrix_x4(r, 8);",
    "a load is not aligned": "__ldg(reinterpret_cast<const float4*>(params.data + 1));",
    "cp.async is not aligned": "ptx::cp_async_16B(0, params.data + 1);",
    "not for all threads": "ptx::barrier_sync<32>();",
}
COPIES = """
  if (threadIdx.x == 0) {
    ptx::cp_async_16B(0, params.data);
    ptx::cp_async_commit();
    WAIT
    params.data[4] = ptx::ld_shared_f32(0);
  }
"""


def build_it(body: str, folder: Path, *, watched: bool = False) -> Path:
    """Compile a kernel of 64 threads and 1024 bytes of shared memory."""
    (folder / "it.cu").write_text(HEAD + body + "\n}\n")
    library = folder / "it.so"
    headers = (folder, HERE.parents[1] / "cuda_src")
    build("it.cu", "jitattn_it", headers, library, watched=watched)
    return library


RUN = """
import ctypes, sys
data = (ctypes.c_float * 16)(*range(1, 17))
start = ctypes.addressof(data) + -ctypes.addressof(data) % 16
params = ctypes.c_void_p(start)
options = (ctypes.c_int32 * 2)(int(sys.argv[2]), int(sys.argv[3]))
library = ctypes.CDLL(sys.argv[1])
if watched := hasattr(library, "emulate_with"):  # of 16 floats, 10 are a tensor's
    library.emulate_with((ctypes.c_size_t * 2)(start, start + 40), 1)
library.emulate(ctypes.byref(params), 1, 64, 1024, options)
if watched:
    library.emulate_found.restype = ctypes.c_char_p
    print(library.emulate_found().decode())
else:
    print(ctypes.cast(start, ctypes.POINTER(ctypes.c_float))[4])
"""


def run(library: Path, late: int, last_to_first: int = 0) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(library), str(late), str(last_to_first)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_a_gpu_would_not_do_ends_the_process(message: str, tmp_path: Path) -> None:
    done = run(build_it(WRONG[message], tmp_path), 1)
    assert done.returncode != 0
    assert message in done.stderr


@pytest.mark.parametrize("watched", [False, True])
def test_kernels_use_the_precompiled_header(watched: bool, tmp_path: Path) -> None:
    (tmp_path / "it.cu").write_text(HEAD + "\n}\n")
    flags = [*LIBRARY_FLAGS, *(WATCH_FLAGS if watched else ()), "-H", "-fsyntax-only"]
    folders = (prelude(watched), HERE, tmp_path, HERE.parents[1] / "cuda_src")
    done = subprocess.run(
        ["g++", *flags, *(f"-I{folder}" for folder in folders), '-DENTRY="it.cu"',
         "-DKERNEL=jitattn_it", str(HERE / "main.cpp")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    # "!" marks one that is used; one that the compiler cannot use is passed over silently.
    assert f"! {prelude(watched)}/cuda.h.gch" in done.stderr.splitlines()


def test_a_copy_that_is_not_waited_for_has_not_come(tmp_path: Path) -> None:
    careless = build_it(COPIES.replace("WAIT", "ptx::cp_async_wait<1>();"), tmp_path)
    assert run(careless, 1).stdout.strip() == "nan"
    assert float(run(careless, 0).stdout) >= 1.0
    right = build_it(COPIES.replace("WAIT", "ptx::cp_async_wait<0>();"), tmp_path)
    assert float(run(right, 1).stdout) >= 1.0


ONE_WRITES = "if (threadIdx.x == {writer}) ptx::st_shared_b32(64, 1);"
ANOTHER_READS = "if (threadIdx.x == {reader}) ptx::ld_shared_b32(64);"
ARRAY = "static float s_sums[64]; const emulator::SharedArray own(&s_sums, sizeof(s_sums));"
#: What is found of a kernel; nothing, if that is empty.
FOUND = [
    ("outside: 4 bytes are read, 8 behind", "volatile float x = params.data[12];"),
    ("", "volatile float x = params.data[9];"),
    ("outside: 16 bytes are read", "ptx::cp_async_16B_zfill(0, params.data + 8, 8);"),
    ("", "ptx::cp_async_16B_zfill(0, params.data + 4, 8);"),
    ("", "ptx::cp_async_16B_zfill(0, params.data + 12, 0);"),
    ("race", ONE_WRITES.format(writer=3) + ANOTHER_READS.format(reader=5)),
    ("race", ONE_WRITES.format(writer=3) + "__syncwarp();" + ANOTHER_READS.format(reader=40)),
    ("", ONE_WRITES.format(writer=3) + "__syncwarp();" + ANOTHER_READS.format(reader=5)),
    ("", ONE_WRITES.format(writer=3) + "__syncthreads();" + ANOTHER_READS.format(reader=40)),
    ("race", "ptx::ld_shared_b32(64); __syncwarp();" + ONE_WRITES.format(writer=40)),
    ("race", "ptx::ld_shared_b32(64);" + ONE_WRITES.format(writer=3)),
    ("", "ptx::ld_shared_b32(64); __syncthreads();" + ONE_WRITES.format(writer=40)),
    ("race", "ptx::st_shared_b32(64, 1);"),
    ("", "ptx::st_shared_b32(threadIdx.x * 4, 1);"),
    ("race", ARRAY + "s_sums[threadIdx.x] = 1.f; volatile float x = s_sums[threadIdx.x ^ 1];"),
    ("", ARRAY + "s_sums[threadIdx.x] = 1.f; volatile float x = s_sums[threadIdx.x];"),
    ("", ARRAY + "atomicAdd(&s_sums[0], 1.f);"),
    ("race", ARRAY + "atomicAdd(&s_sums[0], 1.f); volatile float x = s_sums[0];"),
]


@pytest.mark.parametrize(("found", "body"), FOUND)
def test_watched_kernels(found: str, body: str, tmp_path: Path) -> None:
    library = build_it(body, tmp_path, watched=True)
    for last_to_first in (0, 1):
        done = run(library, 1, last_to_first)
        assert done.returncode == 0, done.stderr
        assert found in done.stdout
        if found:
            assert "it.cu" in done.stdout  # where
        else:
            assert not done.stdout.strip()


AGAIN = """
import ctypes, sys
data = (ctypes.c_float * 16)()
start = ctypes.addressof(data)
library = ctypes.CDLL(sys.argv[1])
library.emulate_found.restype = ctypes.c_char_p
for size in (64, 40, 64):
    library.emulate_with((ctypes.c_size_t * 2)(start, start + size), 1)
    library.emulate(ctypes.byref(ctypes.c_void_p(start)), 1, 64, 1024, (ctypes.c_int32 * 2)())
    print(len(library.emulate_found().decode().splitlines()) > 0)
"""


def test_memory_of_an_earlier_launch_is_nobodys(tmp_path: Path) -> None:
    library = build_it("volatile float x = params.data[12];", tmp_path, watched=True)
    done = subprocess.run(
        [sys.executable, "-c", AGAIN, str(library)], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "True", "False"]


def test_a_write_to_memory_of_no_tensor_ends_the_process(tmp_path: Path) -> None:
    done = run(build_it("params.data[12] = 1.f;", tmp_path, watched=True), 1)
    assert done.returncode != 0
    assert "4 bytes are written" in done.stderr


def test_calls_that_are_watched() -> None:
    q = torch.randn(1, 20, 2, 16)
    with emulated("sm_86", watched=True) as emulator:
        out = jitattn.attention(q, q, q)
    assert emulator.launched
    assert rel_l2(out, jitattn.reference.reference(q, q, q)) < 2e-6
