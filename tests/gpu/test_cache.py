"""Tests kernels loaded from disk, from another process, and from the other compiler."""

from __future__ import annotations

from pathlib import Path

import pytest

from jitattn.jit import compilers

from .fresh_process import in_fresh_process

# Each starts processes that import torch and CuPy.
pytestmark = [pytest.mark.slow, pytest.mark.real_gpu]

_CALL = """
import json, torch, jitattn
from jitattn.jit import build
torch.manual_seed(1)
q, k, v = (torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
out = jitattn.attention(q, k, v, mask=jitattn.Causal())
truth = jitattn.reference.reference(q, k, v, mask=jitattn.Causal())
error = ((out.double() - truth).norm() / truth.norm()).item()
stats, record = build.stats(), jitattn.explain(q, k, v, mask=jitattn.Causal())
from jitattn.jit.launch import _kernels
made_by = next(iter(_kernels.values())).built.metadata.toolchain
print(json.dumps([stats.compiled, stats.disk_hits, error, made_by]))
"""


def call_in_fresh_process(cache: Path, **environment: str) -> tuple[int, int, float, str]:
    """One small call; (compiled, disk hits, relative error, toolchain)."""
    compiled, disk_hits, error, made_by = in_fresh_process(_CALL, cache, **environment)
    return compiled, disk_hits, error, made_by


def test_second_process_compiles_nothing(tmp_path: Path) -> None:
    compiled, disk_hits, error, _ = call_in_fresh_process(tmp_path)
    assert (compiled, disk_hits) == (1, 0)
    assert error < 5e-3
    compiled, disk_hits, error, _ = call_in_fresh_process(tmp_path)
    assert (compiled, disk_hits) == (0, 1)
    assert error < 5e-3


def test_damaged_cubin_is_compiled_anew(tmp_path: Path) -> None:
    call_in_fresh_process(tmp_path)
    cubin = max(tmp_path.glob("v1/*/*.cubin"), key=lambda path: path.stat().st_size)
    damaged = bytearray(cubin.read_bytes())
    damaged[len(damaged) // 2] ^= 0x10
    cubin.write_bytes(damaged)
    compiled, _, error, _ = call_in_fresh_process(tmp_path)
    assert compiled == 1
    assert error < 5e-3
    assert call_in_fresh_process(tmp_path)[0] == 0


@pytest.mark.parametrize("major", [12, 13])
def test_kernels_of_both_compilers_run(tmp_path: Path, major: int) -> None:
    if major not in compilers.installed():
        pytest.skip(f"needs NVRTC {major}")
    compiled, _, error, made_by = call_in_fresh_process(tmp_path, JITATTN_NVRTC=str(major))
    assert compiled == 1
    assert made_by.startswith(f"nvrtc {major}.")
    assert error < 5e-3


def test_no_cache_directory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    compiled, _, error, _ = call_in_fresh_process(blocked)
    assert compiled == 1
    assert error < 5e-3
