"""Tests tensor layouts: strides, alignment, sizes beyond 2**31 elements."""

from __future__ import annotations

from collections.abc import Callable, Iterator

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


@pytest.fixture
def far() -> Iterator[Callable[..., torch.Tensor]]:
    """Make tensors with strides of choice in a buffer of gigabytes, NaN outside of them."""

    def make(values: torch.Tensor, strides: tuple[int, ...]) -> torch.Tensor:
        span = 1 + sum((size - 1) * step for size, step in zip(values.shape, strides, strict=True))
        try:
            buffer = torch.full((span,), float("nan"), device="cuda", dtype=values.dtype)
        except torch.OutOfMemoryError:
            pytest.skip(f"needs {span * values.element_size() >> 30} GiB of GPU memory")
        return buffer.as_strided(values.shape, strides).copy_(values)

    yield make
    torch.cuda.empty_cache()


@pytest.mark.parametrize("len_q", [1, 40, 100])
def test_batch_stride_beyond_32_bits(far: Callable[..., torch.Tensor], len_q: int) -> None:
    q, k, v = random_qkv(2, len_q, 50, 2, 2, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v)
    assert rel_l2(truth, jitattn.reference.reference(q, k, v)) < 3e-3
    strides = (2**31 + 64, 128, 64, 1)
    assert torch.equal(jitattn.attention(q, far(k, strides), v), truth)
    assert torch.equal(jitattn.attention(q, k, far(v, strides)), truth)


@pytest.mark.parametrize(
    ("step", "length"),
    [
        (2**23 + 64, 300),  # all rows span 2.5e9 elements, those of a tile 2**30 bytes
        (2**25 + 64, 130),  # those of a tile of 128 span 2**32 elements
        (2**25 + 65, 130),  # the same, one element at a time
    ],
)
def test_rows_beyond_32_bits(far: Callable[..., torch.Tensor], step: int, length: int) -> None:
    q, k, v = random_qkv(1, length, length, 1, 1, 64, dtype=BF16, device="cuda")
    causal = {"mask": jitattn.Causal()}
    near = jitattn.attention(q, k, v, **causal)
    truth = jitattn.reference.reference(q, k, v, **causal)
    strides = (0, step, 64, 1)

    def check(result: torch.Tensor) -> None:
        assert rel_l2(result, truth) < 3e-3
        if step % 8 == 0:  # the same kernel, so the same bits
            assert torch.equal(result, near)

    check(jitattn.attention(far(q, strides), k, v, **causal))
    check(jitattn.attention(q, far(k, strides), v, **causal))
    check(jitattn.attention(q, k, far(v, strides), **causal))
    out = far(torch.full_like(q, float("nan")), strides)
    check(jitattn.attention(q, k, v, out=out, **causal))


def test_out_is_written_and_returned() -> None:
    q, k, v = random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda")
    out = torch.full_like(q, float("nan"))
    assert jitattn.attention(q, k, v, out=out) is out
    assert torch.equal(out, jitattn.attention(q, k, v))


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("columns", [slice(8, 72), slice(3, 67)], ids=["aligned", "unaligned"])
def test_nothing_but_out_is_written(num_splits: int, columns: slice) -> None:
    q, k, v = random_qkv(2, 77, 99, 4, 2, 64, dtype=BF16, device="cuda")
    buffer = torch.full((2, 79, 6, 80), float("nan"), device="cuda", dtype=BF16)
    out = buffer[:, 1:78, 1:5, columns]
    jitattn.attention(q, k, v, out=out, num_splits=num_splits)
    assert rel_l2(out, jitattn.reference.reference(q, k, v)) < 3e-3
    out.fill_(float("nan"))
    assert buffer.isnan().all()


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
