"""Tests gears on a GPU: guaranteed error bounds on every path, and requested tiles."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import jitattn
from jitattn.jit.device import device
from jitattn.plan import prepare
from jitattn.request import problem, request
from jitattn.spec.enums import Dtype, Numerics
from jitattn.values.gears import GEARS
from jitattn.values.tensors import DTYPES
from tests.support.compare import rel_l2
from tests.support.gears import MASKS, check, tensors
from tests.support.inputs import random_qkv

#: What rounding a result to its dtype adds.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float32: 0.0}


@pytest.fixture
def geforce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls believe that this GPU is faster with fp16 accumulators."""
    own = replace(device(0), name="NVIDIA GeForce RTX 3090", arch="sm_86")
    monkeypatch.setattr(problem, "device", lambda _: own)
    monkeypatch.setattr(problem, "_problems", {})
    monkeypatch.setattr(request, "_requests", {})


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("gear", list(GEARS))
@pytest.mark.parametrize("len_q", [256, 16, 40])
def test_the_promise(dtype: torch.dtype, gear: int, len_q: int) -> None:
    q, k, v = random_qkv(1, len_q, 4096, 4, head_dim=128, device="cuda", seed=1)
    check([x.to(dtype) for x in (q, k, v)], gear, factor=1.0)


@pytest.mark.usefixtures("geforce")
@pytest.mark.parametrize("len_q", [256, 16, 40])
def test_the_promise_of_fp16_accumulators(len_q: int) -> None:
    q, k, v = random_qkv(1, len_q, 4096, 4, head_dim=128, device="cuda", seed=1)
    qkv = [x.half() for x in (q, k, v)]
    assert jitattn.explain(*qkv, gear=3).kernel["numerics"] == Numerics.F16_ACC
    check(qkv, 3, factor=1.0)


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.float16), (1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_masks(
    gear: int, dtype: torch.dtype, heads: tuple[int, int], name: str, request: Any
) -> None:
    if gear == 3 and dtype is torch.float16:
        request.getfixturevalue("geforce")
    for len_q, len_kv in ((200, 333), (5, 300)):
        check(tensors(dtype, len_q, len_kv, heads, 64), gear, **MASKS[name])


@pytest.mark.parametrize("dim", [7, 40, 80, 192, 256])
@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.float16), (1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_head_dims(gear: int, dtype: torch.dtype, dim: int, request: Any) -> None:
    if gear == 3 and dtype is torch.float16:
        request.getfixturevalue("geforce")
    check(tensors(dtype, 150, 200, (2, 1), dim), gear, mask=jitattn.Causal())


@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_sequences_and_pages(gear: int, dtype: torch.dtype, request: Any) -> None:
    if dtype is torch.float16:
        request.getfixturevalue("geforce")
    lengths = torch.tensor([130, 1, 0, 69], dtype=torch.int32, device="cuda")
    start = lengths.cumsum(0, dtype=torch.int32) - lengths
    seqs = jitattn.Ragged(start, lengths)
    q, k, v = (x[0] for x in tensors(dtype, 200, 200, (4, 2), 64))
    out = check([q, k, v], gear, mask=jitattn.Causal(), q_seqs=seqs, kv_seqs=seqs)
    pages = torch.full((40, 16, 2, 64), float("nan"), device="cuda", dtype=dtype)
    k_pages, v_pages = pages.clone(), pages.clone()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).view(4, 10).int()
    for b, (first, count) in enumerate(zip(start.tolist(), lengths.tolist(), strict=True)):
        for t in range(count):
            page, row = int(order[b, t // 16]), t % 16
            k_pages[page, row], v_pages[page, row] = k[first + t], v[first + t]
    paged = jitattn.attention(
        q, k_pages, v_pages, gear=gear, out_dtype=torch.float32, mask=jitattn.Causal(),
        q_seqs=seqs, kv_seqs=jitattn.Paged(order.cuda(), lengths),
    )  # fmt: skip
    assert rel_l2(paged, out) < GEARS[gear].rel_l2[DTYPES[dtype]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gear", [0, 1])
def test_weights_far_below_the_largest_keep_their_bits(
    gear: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key outweighs each other one by 10 nats, and has nothing to give."""
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)
    q, k, v = (x / 2 for x in tensors(dtype, 200, 512, (2, 2), 64))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, -1, :, 0], v[:, -1] = 10.0, 0.0
    check([q, k, v], gear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gear", [0, 1, 3])
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e7])
def test_scores_of_any_size(
    dtype: torch.dtype, gear: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scores have no fractions, weights are still weights."""
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)
    q, k, v = tensors(dtype, 130, 128, (2, 2), 64)
    out, lse = jitattn.attention(q, k, v, gear=gear, scale=scale, return_lse=True)
    assert (out.abs() <= v.abs().max() * 1.001).all()
    _, truth = jitattn.reference.reference(q, k, v, scale=scale, return_lse=True)
    assert ((lse - truth).abs() <= 1e-3 * truth.abs()).all()


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_all_gears_train_with_the_numerics_of_gear_2(dtype: torch.dtype) -> None:
    qkv = tensors(dtype, 100, 130, (4, 2), 128)
    own = [x.double().requires_grad_() for x in qkv]
    with torch.enable_grad():
        truth = jitattn.reference.reference(*own)
    d_out = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2)).to(qkv[0])
    wanted = torch.autograd.grad(truth, own, d_out.double())
    for gear in GEARS:
        leaves = [x.detach().requires_grad_() for x in qkv]
        with torch.enable_grad():
            out = jitattn.attention(*leaves, gear=gear)
        limit = ROUNDING[dtype] + GEARS[gear].rel_l2[DTYPES[dtype]]
        assert rel_l2(out, truth) < 2 * limit
        for one, other in zip(torch.autograd.grad(out, leaves, d_out), wanted, strict=True):
            assert rel_l2(one, other) < 4 * limit + 4 * ROUNDING[dtype]


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize(("len_q", "heads"), [(300, (2, 2)), (7, (4, 1))], ids=str)
@pytest.mark.parametrize("mask", [jitattn.Causal(), jitattn.LocalStride(16, 2, 3)], ids=str)
def test_a_tile_that_is_asked_for(
    tile_rows: int, len_q: int, heads: tuple[int, int], mask: Any
) -> None:
    qkv = tensors(torch.float16, len_q, 500, heads, 64)
    block_q = jitattn.explain(*qkv, mask=mask, tile_rows=tile_rows).kernel["block_q"]
    assert block_q in {16: (16, 64), 64: (64,), 128: (64, 128, 192)}[tile_rows]
    check(qkv, 2, mask=mask, tile_rows=tile_rows)


def test_the_default_of_the_process() -> None:
    qkv = tensors(torch.bfloat16, 100, 100, (2, 2), 64)
    expected = jitattn.attention(*qkv, gear=1, out_dtype=torch.float32)
    with jitattn.set_default_gear(1):
        assert torch.equal(jitattn.attention(*qkv, out_dtype=torch.float32), expected)
    assert not torch.equal(jitattn.attention(*qkv, out_dtype=torch.float32), expected)
    assert Dtype.BF16 in GEARS[1].rel_l2
