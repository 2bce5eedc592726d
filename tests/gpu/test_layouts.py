"""Tensors as users have them: strides, alignment, sizes beyond 2**31 elements."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv

BF16 = torch.bfloat16


def test_fused_projection() -> None:
    fused = torch.randn(2, 130, 3, 4, 64, device="cuda", dtype=BF16)
    q, k, v = fused.unbind(2)
    truth = jitattn.attention(q.contiguous(), k.contiguous(), v.contiguous())
    assert torch.equal(jitattn.attention(q, k, v), truth)


def test_expanded_heads_are_gqa() -> None:
    q, k, v = random_qkv(2, 100, 200, 6, 1, 64, dtype=BF16, device="cuda")
    expanded = [x.expand(2, 200, 6, 64) for x in (k, v)]
    assert rel_l2(jitattn.attention(q, *expanded), jitattn.attention(q, k, v)) < 3e-3


def test_bhsd_gives_the_same_bits() -> None:
    q, k, v = random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda")
    out, lse = jitattn.attention(q, k, v, return_lse=True)
    swapped = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
    out_bhsd, lse_bhsd = jitattn.attention(*swapped, layout="bhsd", return_lse=True)
    assert torch.equal(out_bhsd.transpose(1, 2), out)
    assert torch.equal(lse_bhsd, lse)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_unaligned_gives_the_same_values(name: str) -> None:
    tensors = dict(
        zip("qkv", random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda"), strict=True)
    )
    truth = jitattn.reference.reference(*tensors.values())
    buffer = torch.empty(tensors[name].numel() + 1, device="cuda", dtype=BF16)
    moved = buffer[1:].view(tensors[name].shape)
    tensors[name] = moved.copy_(tensors[name])
    assert tensors[name].data_ptr() % 16 != 0
    assert rel_l2(jitattn.attention(*tensors.values()), truth) < 3e-3


def test_batch_stride_beyond_32_bits() -> None:
    q, k, v = random_qkv(2, 40, 50, 2, 2, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v)
    step = 2**31 + 64
    buffer = torch.empty(step + 2 * 50 * 2 * 64, device="cuda", dtype=BF16)
    far = buffer.as_strided(k.shape, (step, 128, 64, 1)).copy_(k)
    assert torch.equal(jitattn.attention(q, far, v), truth)
    assert torch.equal(jitattn.attention(q, k, far), jitattn.attention(q, k, k))


def test_rows_beyond_32_bits() -> None:
    q, k, v = random_qkv(1, 300, 300, 1, 1, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v, mask=jitattn.Causal())
    step = 2**23 + 64  # 300 rows span 2.5e9 elements, and the rows of a tile 2**30 bytes
    buffer = torch.empty(step * 300, device="cuda", dtype=BF16)
    far = buffer.as_strided(k.shape, (0, step, 64, 1))
    assert torch.equal(jitattn.attention(q, far.copy_(k), v, mask=jitattn.Causal()), truth)
    assert torch.equal(jitattn.attention(q, k, far.copy_(v), mask=jitattn.Causal()), truth)
    assert torch.equal(jitattn.attention(far.copy_(q), k, v, mask=jitattn.Causal()), truth)
    jitattn.attention(q, k, v, mask=jitattn.Causal(), out=far.fill_(float("nan")))
    assert torch.equal(far, truth)


def test_out_is_written_and_returned() -> None:
    q, k, v = random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda")
    out = torch.full_like(q, float("nan"))
    assert jitattn.attention(q, k, v, out=out) is out
    assert torch.equal(out, jitattn.attention(q, k, v))


def test_fp32_output_is_the_unrounded_one() -> None:
    q, k, v = random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda")
    unrounded = jitattn.attention(q, k, v, out_dtype=torch.float32)
    assert unrounded.dtype == torch.float32
    assert torch.equal(unrounded.to(BF16), jitattn.attention(q, k, v))


@pytest.mark.parametrize("shape", [(0, 5, 2), (2, 0, 2), (2, 5, 0)])
def test_nothing_to_compute(shape: tuple[int, int, int]) -> None:
    q = torch.empty(*shape, 64, device="cuda", dtype=BF16)
    out, lse = jitattn.attention(q, q, q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (shape[0], shape[2], shape[1])
