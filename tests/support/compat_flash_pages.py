"""Checks FlashAttention's varlen function over pages against dense fp64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from jitattn.compat.flash_attn import flash_attn_varlen_func
from tests.support.compare import rel_l2
from tests.support.compat_flash_attn import CASES, HKV, D, H, dense

LENGTHS_Q, LENGTHS_KV = (7, 1, 0, 20), (30, 12, 9, 20)
#: Relative L2 errors of values and of gradients.
TOLERANCE = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 4e-3), torch.bfloat16: (8e-3, 2e-2)}


@dataclass(frozen=True)
class Pages:
    """Paged keys and values; sequences share some pages."""

    k: Tensor
    v: Tensor
    table: Tensor
    lengths: tuple[int, ...]

    def rows(self, store: Tensor, idx: int) -> Tensor:
        """Return the rows of a sequence, [L, Hkv, D], as a function of the pages."""
        return store[self.table[idx].long()].flatten(0, 1)[: self.lengths[idx]]

    def is_used(self) -> Tensor:
        """Return whether each row of each page belongs to a sequence, [num_pages, page_size]."""
        used = torch.zeros(self.k.shape[:2], dtype=torch.bool)
        page = used.shape[1]
        for own, length in zip(self.table.tolist(), self.lengths, strict=True):
            for number in range(-(-length // page)):
                used[own[number], : length - number * page] = True
        return used


def draw_pages(
    page: int, dtype: torch.dtype, lengths: tuple[int, ...] = LENGTHS_KV, seed: int = 7
) -> Pages:
    """Draw pages in random order on the CPU; sequences 0 and 3 share their first page."""
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-length // page) for length in lengths]
    order = torch.randperm(
        sum(counts) + 2, generator=generator
    ).tolist()  # two belong to no sequence
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for idx, count in enumerate(counts):
        table[idx, :count] = torch.tensor([order.pop() for _ in range(count)])
    table[3, 0] = table[0, 0]
    k, v = torch.randn(2, sum(counts) + 2, page, HKV, D, generator=generator).to(dtype)
    return Pages(k, v, table, lengths)


def cumulative(lengths: tuple[int, ...], device: str = "cpu") -> Tensor:
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def check_pages(
    name: str,
    device: str,
    dtype: torch.dtype = torch.float32,
    page: int = 4,
    used: bool = False,
    **more: Any,
) -> None:
    """Compare values, LSE and gradients; with `used`, lengths are given by `seqused_k`."""
    theirs, ours = CASES[name]
    generator = torch.Generator().manual_seed(1)
    host = draw_pages(page, dtype)
    q = torch.randn(sum(LENGTHS_Q), H, D, generator=generator).to(dtype)
    leaves = [x.clone().to(device).requires_grad_() for x in (q, host.k, host.v)]
    starts = cumulative(LENGTHS_KV, device)
    if used:
        more["seqused_k"], starts = starts.diff(), torch.zeros_like(starts)
    with torch.enable_grad():
        out, lse, dmask = flash_attn_varlen_func(
            *leaves,
            cumulative(LENGTHS_Q, device),
            starts,
            max(LENGTHS_Q),
            max(LENGTHS_KV),
            block_table=host.table.to(device),
            return_attn_probs=True,
            **theirs,
            **more,
        )
        wide = [x.double().requires_grad_() for x in (q, host.k, host.v)]
        own = wide[0].split(LENGTHS_Q)
        truths = [
            dense(own[b], host.rows(wide[1], b), host.rows(wide[2], b), **ours)  # type: ignore[arg-type]
            for b in range(len(LENGTHS_Q))
        ]
        truth = torch.cat([one[0] for one in truths])
        d_out = torch.randn(truth.shape, generator=generator).to(dtype)
        got = torch.autograd.grad(out, leaves, d_out.to(device))
        wanted = torch.autograd.grad(truth, wide, d_out.double())
    tolerance, grad_tolerance = TOLERANCE[dtype]
    assert dmask.numel() == 0
    assert rel_l2(out.cpu(), truth) < tolerance
    true_lse = torch.cat([one[1] for one in truths], dim=1)
    torch.testing.assert_close(lse.cpu(), true_lse.float(), atol=1e-3, rtol=1e-3)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert rel_l2(one.cpu(), other) < grad_tolerance
    for one in got[1:]:
        assert not one.cpu()[~host.is_used()].any()
