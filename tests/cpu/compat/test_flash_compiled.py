"""Tests FlashAttention's functions under torch.compile: one graph, same results and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from jitattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from tests.support.inputs import drawn

Q, KV = drawn(2, 16, 4, 16), drawn(2, 32, 4, 16, seed=1)
CU = torch.tensor([0, 10, 32], dtype=torch.int32)
PAGES = drawn(8, 8, 4, 16, seed=2)
TABLE = torch.arange(8, dtype=torch.int32).reshape(2, 4)
USED = torch.tensor([3, 5], dtype=torch.int32)
ANGLES = drawn(64, 8, seed=3)
NEW = Q[:, :1]

CASES: dict[str, Callable[[Tensor], Any]] = {
    "causal": lambda q: flash_attn_func(q, KV, KV, causal=True),
    "window": lambda q: flash_attn_func(q, KV, KV, causal=True, window_size=(3, 0), keep_first=1),
    "lse": lambda q: flash_attn_func(q, KV, KV, return_attn_probs=True)[:2],
    "packed": lambda q: flash_attn_qkvpacked_func(torch.stack((q, q, q), dim=2)),
    "columns apart": lambda q: flash_attn_func(q.mT.contiguous().mT, KV, KV),
    "varlen": lambda q: flash_attn_varlen_func(
        q.flatten(0, 1), Q.flatten(0, 1), Q.flatten(0, 1), CU, CU, 22, 22, causal=True
    ),
    "pages": lambda q: flash_attn_varlen_func(
        q.flatten(0, 1), PAGES, PAGES, CU, CU, 22, 22, causal=True, block_table=TABLE
    ),
    "cache": lambda q: flash_attn_with_kvcache(
        q[:, :2], KV.clone(), KV.clone(), cache_seqlens=USED, causal=True
    ),
    "cache, int length": lambda q: flash_attn_with_kvcache(
        q[:, :2], KV.clone(), KV.clone(), cache_seqlens=7, return_softmax_lse=True
    ),
    "appending": lambda q: flash_attn_with_kvcache(
        q[:, :1], KV.clone(), KV.clone(), NEW, NEW, ANGLES, ANGLES, USED, causal=True
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_one_graph_with_the_same_results(name: str) -> None:
    function, q = CASES[name], Q.clone().requires_grad_()
    torch._dynamo.reset()
    found, wanted = torch.compile(function, fullgraph=True, backend="aot_eager")(q), function(q)
    for got, true in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, wanted)),
                         strict=True):  # fmt: skip
        torch.testing.assert_close(got, true)
        assert got.requires_grad == true.requires_grad
        if got.requires_grad:
            gradients = [torch.autograd.grad(x.sum(), q, retain_graph=True)[0] for x in (got, true)]
            torch.testing.assert_close(*gradients)
