"""Tests gradients of paged keys, and of batch rows named by `batch_idx`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.reference import reference
from tests.support.compare import rel_l2

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LIMIT = {FP16: 2e-3, BF16: 1e-2, FP32: 5e-6}
INT = torch.int32
ADDED = ("bias", "alibi_slopes", "relative_bias", "sinks")


def randn(*shape: int, dtype: torch.dtype = FP32, seed: int = 1) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def index(*values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=INT, device="cuda")


def check(qkv: list[torch.Tensor], limit: float, **arguments: Any) -> list[torch.Tensor]:
    """Compare gradients with true ones; return them."""
    found: list[list[torch.Tensor]] = []
    for is_true in (False, True):
        own = [x.detach().to(torch.float64 if is_true else x.dtype).requires_grad_() for x in qkv]
        others = {
            name: x.detach().requires_grad_() if name in ADDED else x
            for name, x in arguments.items()
        }
        with torch.enable_grad():
            out = (reference if is_true else jitattn.attention)(*own, **others)
        d_out = randn(*out.shape, seed=2).to(out.dtype)
        inputs = [*own, *(others[name] for name in ADDED if name in others)]
        found.append(list(torch.autograd.grad(out, inputs, d_out)))
    for got, true in zip(*found, strict=True):
        assert rel_l2(got, true) < limit
    return found[0]


@pytest.mark.parametrize("page_size", [1, 7, 16, 32])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_pages(dtype: torch.dtype, page_size: int) -> None:
    """Some pages are of two sequences, one of none, and some places of the table of no key."""
    lengths = [90, 33, 0, 120]
    width = -(-130 // page_size)
    num_pages = 3 * width + 2
    table = torch.randperm(num_pages, generator=torch.Generator().manual_seed(4))[: 2 * width]
    rows = [table[:width], table[width : 2 * width], table[:width], table[:width]]
    block_table = torch.stack(rows).to("cuda", INT)
    block_table[1, -1] = -5  # never read
    q = randn(4, 50, 4, 64, dtype=dtype)
    k = randn(num_pages, page_size, 2, 64, dtype=dtype, seed=5)
    v = randn(num_pages, page_size, 2, 64, dtype=dtype, seed=6)
    seqs = jitattn.Paged(block_table, index(*lengths))
    _, dk, dv = check([q, k, v], LIMIT[dtype], mask=jitattn.Causal(), kv_seqs=seqs)
    unused = torch.ones(num_pages, dtype=torch.bool)
    unused[table] = False
    assert not dk[unused.cuda()].any()
    assert not dv[unused.cuda()].any()


@pytest.mark.parametrize(
    "mask",
    [
        jitattn.Window(20, 5, keep_first=3),
        jitattn.LocalStride(64, 1, 2),
        jitattn.LocalStride(16, 1, 3),
    ],
    ids=str,
)
def test_masks_over_pages(mask: jitattn.Mask) -> None:
    table = torch.arange(20, dtype=INT, device="cuda").view(2, 10)
    table[1, :3] = table[0, :3]  # a shared prefix
    seqs = jitattn.Paged(table, index(150, 160))
    qkv = [
        randn(2, 70, 4, 64, dtype=BF16),
        *(randn(20, 16, 2, 64, dtype=BF16, seed=i) for i in (5, 6)),
    ]
    check(qkv, LIMIT[BF16], mask=mask, kv_seqs=seqs)


def test_everything_over_pages_that_begin_late() -> None:
    """Ragged queries, starts, biases, slopes, sinks, softcap and dropout; 8-byte indices."""
    table = torch.arange(24, device="cuda").view(3, 8)
    table[2] = table[0].flip(0)
    start, length = (torch.tensor(x, device="cuda") for x in ([3, 0, 17], [100, 60, 111]))
    kv_seqs = jitattn.Paged(table, length, start=start, max_length=112)
    q_seqs = jitattn.Ragged.from_cu_seqlens(index(0, 40, 75, 140), max_length=65)
    qkv = [
        randn(140, 4, 40, dtype=FP16),
        *(randn(24, 16, 2, 40, dtype=FP16, seed=i) for i in (5, 6)),
    ]
    check(
        qkv,
        4e-3,
        mask=jitattn.Causal(),
        q_seqs=q_seqs,
        kv_seqs=kv_seqs,
        bias=randn(3, 1, 65, 112),
        alibi_slopes=randn(4).abs(),
        relative_bias=randn(1, 5),
        sinks=randn(4),
        softcap=20.0,
        dropout_p=0.25,
        dropout_state=jitattn.dropout_state("cuda"),
    )


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_rows_that_sequences_name(layout: str) -> None:
    """Three sequences in two of three rows, with padding on the left."""
    seqs = jitattn.Padded(index(60, 80, 70), index(0, 5, 20), batch_idx=index(2, 0, 2))
    shapes = [(3, 50, 4, 64), (3, 100, 2, 64), (3, 100, 2, 48)]
    qkv = [randn(*shape, dtype=FP16, seed=i) for i, shape in enumerate(shapes)]
    if layout == "bhsd":
        qkv = [x.transpose(1, 2).contiguous() for x in qkv]
    _, dk, dv = check(qkv, LIMIT[FP16], mask=jitattn.Causal(), kv_seqs=seqs, layout=layout)
    assert not dk[1].any()
    assert not dv[1].any()
    assert dk[2].any()


def test_rows_that_are_not_there() -> None:
    seqs = jitattn.Padded(index(60, 80), batch_idx=index(1, 7))
    qkv = [randn(2, 50, 2, 64, dtype=FP16), *(randn(2, 80, 2, 64, dtype=FP16) for _ in "kv")]
    own = [x.requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = jitattn.attention(*own, kv_seqs=seqs)
    dq, dk, dv = torch.autograd.grad(out, own, torch.ones_like(out))
    assert not out[1].any()
    assert not dq[1].any()
    assert not dk[0].any()
    assert dk[1].any() or dv[1].any()
    assert all(torch.isfinite(x).all() for x in (dq, dk, dv))


@pytest.mark.real_gpu
def test_shared_pages_are_added_up_in_order() -> None:
    table = torch.zeros(16, 4, dtype=INT, device="cuda")
    table += torch.arange(4, dtype=INT, device="cuda")
    seqs = jitattn.Paged(table, index(*range(49, 65)))
    own = [randn(16, 200, 8, 64, dtype=BF16), *(randn(4, 16, 2, 64, dtype=BF16) for _ in "kv")]
    own = [x.requires_grad_() for x in own]
    made = []
    for _ in range(20):
        with torch.enable_grad():
            out = jitattn.attention(*own, kv_seqs=seqs, deterministic=True)
        made.append(torch.autograd.grad(out, own, torch.ones_like(out)))
    for again in made[1:]:
        assert all(torch.equal(one, other) for one, other in zip(made[0], again, strict=True))
