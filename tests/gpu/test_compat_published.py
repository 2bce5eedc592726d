"""Tests sageattention, xformers, FlashAttention 3 and 4 on a GPU: random calls, errors, graphs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from jitattn.compat.sageattention import sageattn, sageattn_varlen
from jitattn.compat.xformers.ops import fmha
from jitattn.compat.xformers.ops.fmha.attn_bias import (
    BlockDiagonalCausalWithOffsetPaddedKeysMask,
)
from tests.gpu.test_compat_waiting import no_waiting
from tests.support import comfy
from tests.support import compat_random_flash3 as drawn_flash
from tests.support import compat_random_sage as drawn_sage
from tests.support import compat_random_xformers as drawn_xformers
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.compat_dense import dense

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))
from _doors_published_cases import published_cases

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
pytestmark = pytest.mark.usefixtures("with_grad")


@pytest.mark.parametrize("seed", range(4))
def test_in_fp32(seed: int) -> None:
    drawn_sage.check_sage(seed, torch.float32, "cuda")
    drawn_sage.check_sage_varlen(seed, torch.float32, "cuda")
    drawn_xformers.check_batched(seed, torch.float32, "cuda")
    drawn_flash.check_fa3("varlen", seed, torch.float32, "cuda")
    drawn_flash.check_fa4("varlen", seed, torch.float32, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_sageattn(seed: int, dtype: torch.dtype) -> None:
    drawn_sage.check_sage(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(4))
def test_sageattn_varlen(seed: int, dtype: torch.dtype) -> None:
    drawn_sage.check_sage_varlen(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(16))
def test_xformers(seed: int, dtype: torch.dtype) -> None:
    drawn_xformers.check_batched(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("name", drawn_xformers.BLOCKS)
@pytest.mark.parametrize("seed", range(2))
def test_xformers_sequences(name: str, seed: int, dtype: torch.dtype) -> None:
    drawn_xformers.check_blocks(name, seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("name", drawn_flash.FA3)
@pytest.mark.parametrize("seed", range(4))
def test_flash_attn_3(name: str, seed: int, dtype: torch.dtype) -> None:
    drawn_flash.check_fa3(name, seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(8))
def test_flash_attn_3_with_a_cache(seed: int, dtype: torch.dtype) -> None:
    drawn_flash.check_fa3_cache(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("name", drawn_flash.FA4)
@pytest.mark.parametrize("seed", range(3))
def test_flash_attn_4(name: str, seed: int, dtype: torch.dtype) -> None:
    drawn_flash.check_fa4(name, seed, dtype, "cuda")


KINDS = pytest.mark.parametrize("kind", ["gaussian", "outlier channels", "biased keys"])


def check_promise(kind: str, dim: int, dtype: torch.dtype, length: int) -> None:
    """Check the error of gear 4: relative L2 of 2 %, a cosine of 0.999."""
    q, k, v = drawn_sage.of_kind(kind, 1, length, 4, dim, dtype=dtype, device="cuda")
    with torch.no_grad():
        truth, _ = dense(q, k, v)
        out = sageattn(q, k, v, tensor_layout="NHD")
        cu = torch.tensor([0, length], dtype=torch.int32, device="cuda")
        packed = sageattn_varlen(q[0], k[0], v[0], cu, cu, length, length)
    for found in (out, packed[None]):
        assert rel_l2(found, truth) <= 2e-2
        assert torch.cosine_similarity(found.double().flatten(), truth.flatten(), 0) >= 0.999


@DTYPES
@KINDS
@pytest.mark.parametrize("dim", [64, 128])
def test_the_promise_of_sageattn(kind: str, dim: int, dtype: torch.dtype) -> None:
    check_promise(kind, dim, dtype, 256)


@pytest.mark.real_gpu
@pytest.mark.usefixtures("mma_family")
@DTYPES
@KINDS
@pytest.mark.parametrize("dim", [64, 128])
def test_the_promise_of_sageattn_in_8_bits(kind: str, dim: int, dtype: torch.dtype) -> None:
    """On sm_90 the kernels of mma.sync have 8 bits, those of wgmma have not."""
    check_promise(kind, dim, dtype, 2048)


@DTYPES
def test_comfyui(dtype: torch.dtype) -> None:
    comfy.check("cuda", dtype, 2e-2)


CASES = [f"{one.door}: {one.name}" for one in published_cases("cpu")]


@pytest.mark.real_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("name", CASES)
def test_a_call_waits_for_nothing_and_is_captured(name: str) -> None:
    call = published_cases("cuda")[CASES.index(name)].call
    with torch.no_grad():
        expected = call()
        with no_waiting():
            call()
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            found = call()
        graph.replay()
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    assert torch.equal(found, expected)


@pytest.mark.real_gpu
def test_lengths_of_a_cache_grow_between_replays() -> None:
    """In a captured graph, with lengths on the device alone."""
    room, batch = 512, 3
    cuda = torch.device("cuda")
    bias = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [1] * batch, room, [5, 9, 1], device=cuda
    )
    q = torch.randn(1, batch, 8, 64, device=cuda, dtype=torch.float16)
    k, v = torch.randn(2, 1, batch * room, 8, 64, device=cuda, dtype=torch.float16)
    with torch.no_grad():
        fmha.memory_efficient_attention(q, k, v, bias)
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            out = fmha.memory_efficient_attention(q, k, v, bias)
        for lengths in ([5, 9, 1], [100, 512, 77]):
            bias.k_seqinfo.seqlen.copy_(torch.tensor(lengths, dtype=torch.int32))
            graph.replay()
            for b, length in enumerate(lengths):
                own = slice(b * room, b * room + length)
                truth, _ = dense(q[:, b : b + 1], k[:, own], v[:, own])
                assert rel_l2(out[:, b : b + 1], truth) < 5e-3
