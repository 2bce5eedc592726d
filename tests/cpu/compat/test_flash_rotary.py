"""Tests the FlashAttention door's rotary embedding against fp64, rounded once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.compat.flash_attn.layers.rotary import (
    ApplyRotaryEmb,
    ApplyRotaryEmbKV_,
    ApplyRotaryEmbQKV_,
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from jitattn.compat.flash_attn.ops.triton.rotary import apply_rotary
from tests.support.inputs import drawn
from tests.support.rotary import check_rounded_once, truth_of

B, L, H, D, HALF = 2, 9, 4, 32, 8
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def tables(dtype: torch.dtype, rows: int = 40, seed: int = 5) -> tuple[Tensor, Tensor]:
    angle = 7 * torch.rand(rows, HALF, generator=torch.Generator().manual_seed(seed))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def wanted(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, first: list[int]) -> Tensor:
    """fp64 of x [B, L, H, D] turned from the positions `first` on."""
    rotary = jitattn.Rotary(cos, sin, interleaved=interleaved)
    return truth_of(x.detach(), rotary, [[p + t for t in range(x.shape[1])] for p in first])


def turned_columns(x: Tensor) -> Tensor:
    return (torch.arange(D) < 2 * HALF).expand(x.shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("offset", [0, 4, (3, 20)])
def test_rounded_once_with_gradients(
    dtype: torch.dtype, interleaved: bool, inplace: bool, offset: int | tuple[int, int]
) -> None:
    x = drawn(B, L, H, D, dtype=dtype)
    cos, sin = tables(dtype)
    own = x.clone().requires_grad_()
    first = [offset] * B if isinstance(offset, int) else list(offset)
    given = offset if isinstance(offset, int) else torch.tensor(offset, dtype=torch.int32)
    out = apply_rotary_emb(own, cos, sin, interleaved, inplace, given)
    assert (out.data_ptr() == own.data_ptr()) is inplace
    check_rounded_once(out.detach(), wanted(x, cos, sin, interleaved, first), turned_columns(x))
    d_out = drawn(B, L, H, D, seed=1, dtype=dtype)
    kept = d_out.clone()
    out.backward(d_out)
    assert torch.equal(d_out, kept)
    check_rounded_once(own.grad, wanted(d_out, cos, -sin, interleaved, first), turned_columns(x))


def test_the_gradient_of_a_sum_in_place() -> None:
    """It is one number in memory, which must not be written to for each element."""
    x = drawn(B, L, H, D).requires_grad_()
    cos, sin = tables(torch.float32)
    apply_rotary_emb(x, cos, sin, inplace=True).sum().backward()
    ones = torch.ones(B, L, H, D)
    check_rounded_once(x.grad, wanted(ones, cos, -sin, False, [0] * B), turned_columns(ones))


def test_what_has_no_position_or_sequence_stays() -> None:
    flat = drawn(20, H, D, dtype=torch.float16)
    cos, sin = tables(torch.float16, rows=12)
    cu_seqlens = torch.tensor([2, 11, 11, 17], dtype=torch.int32)
    offsets = torch.tensor([5, 0, -2], dtype=torch.int32)
    place: list[int | None] = [None, None, *range(5, 14), *range(-2, 4), None, None, None]
    rotary = jitattn.Rotary(cos, sin, interleaved=True)
    truth = truth_of(flat[None], rotary, [place])[0]
    exists = torch.tensor([p is not None and 0 <= p < 12 for p in place])
    for inplace in (False, True):
        own = flat.clone()
        out = apply_rotary_emb(
            own, cos, sin, True, inplace, offsets, cu_seqlens=cu_seqlens, max_seqlen=9
        )
        check_rounded_once(out, truth, exists[:, None, None] & turned_columns(flat))
        assert torch.equal(own, out if inplace else flat)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("other_tables", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
def test_packed_qkv(packed: bool, other_tables: bool, contiguous: bool) -> None:
    heads_k = H if packed else 2
    shape = (B, L, 3, H, D) if packed else (B, L, H + 2 * heads_k, D)
    x = drawn(*shape, dtype=torch.bfloat16)
    cos, sin = tables(torch.bfloat16)
    cos_k, sin_k = tables(torch.bfloat16, seed=6) if other_tables else (None, None)
    own = x.clone()
    if not contiguous:
        own = torch.stack((x, x), dim=-2)[..., 0, :]
    own = own.detach().requires_grad_()
    heads = None if packed else H
    out = apply_rotary_emb_qkv_(own, cos, sin, cos_k, sin_k, True, 3, heads)
    assert out.data_ptr() == own.data_ptr()
    assert out.shape == shape
    d_out = drawn(*shape, seed=1, dtype=torch.bfloat16)
    out.backward(d_out)
    sizes = [H, heads_k, heads_k]
    for result, source, sign in ((out.detach(), x, 1), (own.grad, d_out, -1)):
        parts = [t.flatten(2, 3) if packed else t for t in (result, source)]
        (q, k, v), (from_q, from_k, from_v) = (part.split(sizes, dim=2) for part in parts)
        check_rounded_once(q, wanted(from_q, cos, sign * sin, True, [3] * B), turned_columns(q))
        own_k = (cos if cos_k is None else cos_k, sign * (sin if sin_k is None else sin_k))
        check_rounded_once(k, wanted(from_k, *own_k, True, [3] * B), turned_columns(k))
        assert torch.equal(v, from_v)


def test_packed_kv() -> None:
    x = drawn(B, L, 2, H, D, dtype=torch.float16)
    cos, sin = tables(torch.float32)
    own = x.clone().requires_grad_()
    offsets = torch.tensor([0, 33])  # beyond the tables at last
    out = apply_rotary_emb_kv_(own, cos, sin, False, offsets)
    assert out.data_ptr() == own.data_ptr()
    d_out = drawn(B, L, 2, H, D, seed=1, dtype=torch.float16)
    out.backward(d_out)
    exists = torch.arange(L) + offsets[:, None] < 40
    for result, source, sign in ((out.detach(), x, 1), (own.grad, d_out, -1)):
        k, from_k = result[:, :, 0], source[:, :, 0]
        turned = exists[:, :, None, None] & turned_columns(k)
        check_rounded_once(k, wanted(from_k, cos, sign * sin, False, [0, 33]), turned)
        assert torch.equal(result[:, :, 1], source[:, :, 1])


def test_other_names_for_the_same() -> None:
    cos, sin = tables(torch.float32)
    x, qkv, kv = drawn(B, L, H, D), drawn(B, L, 3, H, D), drawn(B, L, 2, H, D)
    assert apply_rotary_emb_func is apply_rotary_emb
    out = apply_rotary_emb(x, cos, sin)
    assert torch.equal(ApplyRotaryEmb.apply(x, cos, sin, False, False, 0, None, None), out)
    assert torch.equal(apply_rotary(out, cos, sin, conjugate=True, inplace=True), out)
    torch.testing.assert_close(out, x)  # turned back
    assert not apply_rotary(x.requires_grad_(), cos, sin).requires_grad
    assert torch.equal(
        ApplyRotaryEmbQKV_.apply(qkv.clone(), cos, sin), apply_rotary_emb_qkv_(qkv, cos, sin)
    )
    assert torch.equal(
        ApplyRotaryEmbKV_.apply(kv.clone(), cos, sin), apply_rotary_emb_kv_(kv, cos, sin)
    )


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_plain_function_and_its_half(interleaved: bool) -> None:
    x = drawn(B, L, H, D)
    cos, sin = (table[:L] for table in tables(torch.float32))
    plain = apply_rotary_emb_torch(x, cos, sin, interleaved)
    torch.testing.assert_close(plain, apply_rotary_emb(x, cos, sin, interleaved))
    own = torch.stack((cos, cos)), torch.stack((sin, sin))
    assert torch.equal(apply_rotary_emb_torch(x, *own, interleaved), plain)
    half = rotate_half(x, interleaved)
    assert torch.equal(rotate_half(half, interleaved), -x)


@pytest.mark.parametrize("scale_base", [None, 512.0])
@pytest.mark.parametrize("interleaved", [False, True])
def test_the_module(scale_base: float | None, interleaved: bool) -> None:
    module = RotaryEmbedding(2 * HALF, 1000.0, interleaved, scale_base).half()
    x = drawn(B, L, 3, H, D, dtype=torch.float16)
    out = module(x.clone(), seqlen_offset=4)
    rows = L + 4
    angle = torch.arange(rows)[:, None].double() * 1000.0 ** (-torch.arange(HALF).double() / HALF)
    scale = torch.ones(rows, HALF, dtype=torch.float64)
    if scale_base is not None:
        pair = (2 * torch.arange(HALF).double() + 0.4 * 2 * HALF) / (1.4 * 2 * HALF)
        scale = pair ** ((torch.arange(rows)[:, None] - rows // 2) / scale_base)
    for place, factor in ((0, scale), (1, 1 / scale)):
        truth = wanted(x[:, :, place], angle.cos() * factor, angle.sin() * factor, interleaved,
                       [4] * B)  # fmt: skip
        torch.testing.assert_close(out[:, :, place].double(), truth, atol=6e-3, rtol=2e-3)
    assert torch.equal(out[:, :, 2], x[:, :, 2])
    # The same of q and kv, with offsets on the device.
    q, kv = module(x[:, :, 0].clone(), x[:, :, 1:].clone(), torch.tensor([4, 4]), max_seqlen=rows)
    assert torch.equal(torch.cat((q[:, :, None], kv), 2), out)
    packed = module(x[:, :, 0].clone(), seqlen_offset=4, num_heads_q=2)
    assert torch.equal(packed[:, :, :2], out[:, :, 0, :2])
    assert torch.equal(packed[:, :, 3], x[:, :, 0, 3])
    assert not module.state_dict()


def test_tables_grow_and_are_kept() -> None:
    module = RotaryEmbedding(2 * HALF)
    module(drawn(1, 5, 3, H, D))
    first = module._cos_cached
    module(drawn(1, 3, 3, H, D))
    assert module._cos_cached is first
    module(drawn(1, 9, 3, H, D))
    assert len(module._cos_cached) == 9
    with torch.inference_mode():
        module(drawn(1, 30, 3, H, D))
    module(drawn(1, 4, 3, H, D).requires_grad_())  # not from tables that autograd cannot keep
    assert not module._cos_cached.is_inference()


def test_one_graph_with_the_same_results() -> None:
    cos, sin = tables(torch.float32)
    x = drawn(B, L, 3, H, D)
    results = []
    for run in (
        torch.compile(apply_rotary_emb_qkv_, fullgraph=True, backend="aot_eager"),
        apply_rotary_emb_qkv_,
    ):
        torch._dynamo.reset()
        own = x.clone().requires_grad_()
        out = run(own, cos, sin, seqlen_offsets=torch.tensor([1, 2]))
        results.append([out, own.detach().clone(), *torch.autograd.grad(out.square().sum(), own)])
    for got, other in zip(*results, strict=True):
        torch.testing.assert_close(got, other)


COS, SIN = tables(torch.float32)
X = drawn(B, L, H, D)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=32), "^cos and sin: .*40 positions"),
        (lambda: apply_rotary_emb(X[..., :8], COS, SIN), "turn 16 columns"),
        (lambda: apply_rotary_emb(X, COS, SIN[:9]), r"both must be \[positions"),
        (lambda: apply_rotary_emb(X[0], COS, SIN), "with cu_seqlens"),
        (lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=torch.tensor([1])), "1 entries"),
        (lambda: apply_rotary_emb(X, COS, SIN, seqlen_offsets=COS[:2, 0]), "^seqlen_offsets is"),
        (lambda: apply_rotary_emb_qkv_(X, COS, SIN), "num_heads_q is missing"),
        (lambda: apply_rotary_emb_qkv_(X, COS, SIN, num_heads_q=3), "num_heads_q=3"),
        (lambda: apply_rotary_emb_qkv_(X[0], COS, SIN), "qkv has shape"),
        (lambda: apply_rotary_emb_kv_(X, COS, SIN), "kv has shape"),
        (lambda: RotaryEmbedding(16)(X, seqlen_offset=torch.tensor([1, 2])), "max_seqlen is"),
    ],
)
def test_refusals_are_assertions(call: Callable[[], Any], text: str) -> None:
    with pytest.raises(AssertionError, match=text) as caught:
        call()
    assert isinstance(caught.value, jitattn.InvalidInputError)
