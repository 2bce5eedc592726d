"""Tests the kernel service on a GPU: warm-up, archives, forks, and rejected cubins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import jitattn
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry, sha256
from jitattn.jit import build, compilers
from jitattn.jit.device import device
from jitattn.plan import choices
from jitattn.run import forward
from jitattn.run.execute import has_wgmma
from jitattn.spec.kernel_spec import KernelSpec
from tests.support.capture import capture
from tests.support.inputs import random_qkv

from .fresh_process import ROOT, in_fresh_process

BF16 = torch.bfloat16
slow = pytest.mark.slow


@pytest.mark.real_gpu
def test_warmup_then_capture() -> None:
    q, k, v = random_qkv(1, 7, 300, 4, 2, 40, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v, mask=jitattn.Causal())
    forward.forget_kernels()
    done = jitattn.warmup(q, k, v, mask=jitattn.Causal())
    takes_wgmma = has_wgmma(device(0).arch)
    expected = [spec for spec in _specs(40) if takes_wgmma or spec.family != "fwd_sm90"]
    assert done.kernels == len(expected)
    long = random_qkv(1, 200, 300, 4, 2, 40, dtype=BF16, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, mask=jitattn.Causal())
        jitattn.attention(*long, mask=jitattn.Causal())  # another row class
        jitattn.attention(q, k, v, mask=jitattn.Causal(), num_splits=4)  # and splits
    graph.replay()
    assert torch.equal(out, truth)
    assert jitattn.warmup(q, k, v, mask=jitattn.Causal()).compiled == 0


def _specs(head_dim: int) -> list[KernelSpec]:
    choice = {"dtype": "bf16", "head_dim": head_dim, "mask": "causal"}
    return choices.specs_of([choice], [device(0).arch])


def test_warmup_by_choices_and_file(tmp_path: Path) -> None:
    choice = {"dtype": "bf16", "head_dim": 24, "mask": "causal", "arch": "sm_80"}  # not this GPU's
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps([choice]))
    assert jitattn.warmup(specs=[choice]).kernels == jitattn.warmup(spec_file=path).kernels > 1
    compiled = build.stats().compiled
    q, k, v = random_qkv(1, 7, 300, 4, 2, 24, dtype=BF16, device="cuda")
    jitattn.attention(q, k, v, mask=jitattn.Causal())
    assert build.stats().compiled == compiled


_CALL = """
import json, torch, jitattn
from jitattn.jit import build
torch.manual_seed(1)
q, k, v = (torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.bfloat16) for _ in range(3))
out = jitattn.attention(q, k, v, mask=jitattn.Causal())
truth = jitattn.reference.reference(q, k, v, mask=jitattn.Causal())
error = ((out.double() - truth).norm() / truth.norm()).item()
print(json.dumps([build.stats().compiled, build.stats().disk_hits, error]))
"""


@slow
@pytest.mark.real_gpu
def test_archive_of_another_compiler_serves(tmp_path: Path) -> None:
    """What one machine made with NVRTC 12, another that has 13 uses and compiles nothing."""
    if len(compilers.installed()) < 2:
        pytest.skip("needs NVRTC 12 and 13")
    there, here, archive = tmp_path / "there", tmp_path / "here", tmp_path / "kernels.zip"
    jitattn_cache = [sys.executable, "-m", "jitattn.cli"]
    arch = device(0).arch.removeprefix("sm_")
    prebuild = ["prebuild", "--arch", arch, "--dtype", "bf16", "--head-dim", "64"]
    for arguments, cache, major in (
        ([*prebuild, "--mask", "causal"], there, "12"),
        (["export", str(archive)], there, "12"),
        (["import", str(archive)], here, "13"),
    ):
        subprocess.run(
            [*jitattn_cache, *arguments],
            check=True,
            env={**os.environ, "JITATTN_CACHE_DIR": str(cache), "JITATTN_NVRTC": major},
            cwd=ROOT,
        )
    compiled, disk_hits, error = in_fresh_process(
        _CALL, here, JITATTN_NVRTC="13", JITATTN_NO_COMPILE="1"
    )
    assert (compiled, disk_hits) == (0, 1)
    assert error < 5e-3


@slow
@pytest.mark.real_gpu
def test_cubin_that_the_driver_refuses_is_compiled_anew(tmp_path: Path) -> None:
    """Every checksum is right, but the driver cannot load it: not executed, not fatal."""
    in_fresh_process(_CALL, tmp_path)
    disk = DiskCache(tmp_path)
    for metadata in list(disk.entries()):
        found = disk.look(metadata.key, metadata.arch)
        assert isinstance(found, Entry)
        forged = found.cubin[:64] + bytes(len(found.cubin) - 64)  # an ELF header, and nothing
        disk.write(Entry(forged, replace(metadata, sha256=sha256(forged))))
    compiled, _, error = in_fresh_process(_CALL, tmp_path)
    assert compiled == 1
    assert error < 5e-3
    assert in_fresh_process(_CALL, tmp_path)[0] == 0


_FORK = """
import json, os, torch, jitattn
q = torch.randn(1, 40, 2, 64, device="cuda", dtype=torch.bfloat16)
out = torch.empty_like(q)
with torch.no_grad():
    jitattn.attention(q, q, q)
    torch.cuda.synchronize()
    reader, writer = os.pipe()
    if os.fork() == 0:
        texts = []
        for given in (None, out):
            try:
                jitattn.attention(q, q, q, out=given)
                texts.append("no error")
            except Exception as error:
                texts.append(str(error))
        os.write(writer, json.dumps(texts).encode())
        os._exit(0)
    os.wait()
    texts = json.loads(os.read(reader, 10000))
    jitattn.attention(q, q, q)  # the parent goes on
    torch.cuda.synchronize()
print(json.dumps(texts))
"""


@slow
@pytest.mark.real_gpu
def test_fork_after_cuda_was_initialised(tmp_path: Path) -> None:
    texts = in_fresh_process(_FORK, tmp_path)
    assert len(texts) == 2
    for text in texts:
        assert "spawn" in str(text)


_RECORD = """
import json, torch, jitattn
q = torch.randn(2, 40, 2, 64, device="cuda", dtype=torch.bfloat16)
with torch.no_grad():
    jitattn.attention(q, q, q)
    jitattn.attention(q[:, :2], q, q)
print(json.dumps([]))
"""


@slow
@pytest.mark.real_gpu
def test_record_then_prebuild_then_no_compile(tmp_path: Path) -> None:
    record = tmp_path / "used.jsonl"
    in_fresh_process(_RECORD, tmp_path / "first", JITATTN_RECORD=str(record))
    subprocess.run(
        [sys.executable, "-m", "jitattn.cli", "prebuild", "--spec", str(record)],
        check=True,
        env={**os.environ, "JITATTN_CACHE_DIR": str(tmp_path / "second")},
        cwd=ROOT,
    )
    assert len(DiskCache(tmp_path / "second").keys()) == len(record.read_text().splitlines())
    in_fresh_process(_RECORD, tmp_path / "second", JITATTN_NO_COMPILE="1")


@slow
@pytest.mark.real_gpu
def test_missing_kernel_is_named(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="jitattn-cache prebuild --arch"):
        in_fresh_process(_CALL, tmp_path, JITATTN_NO_COMPILE="1")
