"""Kernels on the processor: calls by a GPU's path, and what an emulator must not let pass."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import jitattn
from tests.support.compare import rel_l2
from tests.support.emulator import HERE, LIBRARY_FLAGS, emulated, missing

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


def build(body: str, folder: Path) -> Path:
    """Compile a kernel of 64 threads and 1024 bytes of shared memory."""
    (folder / "it.cu").write_text(HEAD + body + "\n}\n")
    library = folder / "it.so"
    headers = HERE.parents[1] / "cuda_src"
    subprocess.run(
        ["g++", *LIBRARY_FLAGS, f"-I{folder}", f"-I{HERE}", f"-I{headers}", '-DENTRY="it.cu"',
         "-DKERNEL=jitattn_it", str(HERE / "main.cpp"), "-o", str(library)],
        check=True,
    )  # fmt: skip
    return library


RUN = """
import ctypes, sys
data = (ctypes.c_float * 16)(*range(1, 17))
start = ctypes.addressof(data) + -ctypes.addressof(data) % 16
params = ctypes.c_void_p(start)
options = (ctypes.c_int32 * 2)(int(sys.argv[2]), 0)
function = ctypes.CDLL(sys.argv[1]).emulate
function(ctypes.byref(params), 1, 64, 1024, options)
print(ctypes.cast(start, ctypes.POINTER(ctypes.c_float))[4])
"""


def run(library: Path, late: int) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", RUN, str(library), str(late)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("message", WRONG)
def test_what_a_gpu_would_not_do_ends_the_process(message: str, tmp_path: Path) -> None:
    done = run(build(WRONG[message], tmp_path), 1)
    assert done.returncode != 0
    assert message in done.stderr


def test_a_copy_that_is_not_waited_for_has_not_come(tmp_path: Path) -> None:
    careless = build(COPIES.replace("WAIT", "ptx::cp_async_wait<1>();"), tmp_path)
    assert run(careless, 1).stdout.strip() == "nan"
    assert float(run(careless, 0).stdout) >= 1.0
    right = build(COPIES.replace("WAIT", "ptx::cp_async_wait<0>();"), tmp_path)
    assert float(run(right, 1).stdout) >= 1.0
