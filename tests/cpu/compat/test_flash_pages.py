"""Tests the FlashAttention door over pages: gradients, and cache inputs that require them."""

from __future__ import annotations

import pytest
import torch

from jitattn.compat.flash_attn import flash_attn_with_kvcache
from tests.support.compat_flash_attn import CASES, HKV, D, H
from tests.support.compat_flash_pages import check_pages, cumulative, draw_pages


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("used", [False, True])
def test_values_and_gradients(name: str, used: bool) -> None:
    check_pages(name, "cpu", used=used)


@pytest.mark.parametrize("page", [1, 3, 16, 64])
def test_pages_of_any_size(page: int) -> None:
    check_pages("causal", "cpu", page=page)


@pytest.mark.parametrize("kind", ["rows", "pages", "padded"])
@pytest.mark.parametrize("appends", [False, True])
def test_a_cache_takes_what_requires_grad(kind: str, appends: bool) -> None:
    """Nothing is refused, the result has no gradient, and leaves are written to."""
    generator = torch.Generator().manual_seed(2)
    pages = draw_pages(4, torch.float32, lengths=(5, 11, 9, 20))
    length = cumulative(pages.lengths, "cpu").diff()
    given: dict[str, torch.Tensor] = {"cache_seqlens": length - 2}
    caches = [pages.k, pages.v]
    if kind == "pages":
        given["block_table"] = pages.table.clone()
        given["block_table"][3, 0] = 0 if 0 not in pages.table[:3] else pages.table.max() + 1
        caches = [torch.randn(40, 4, HKV, D, generator=generator) for _ in range(2)]
    else:
        caches = [torch.randn(6, 24, HKV, D, generator=generator) for _ in range(2)]
        given["cache_batch_idx"] = torch.tensor([5, 0, 3, 2], dtype=torch.int32)
    if kind == "padded":
        given["cache_leftpad"] = torch.tensor([1, 0, 3, 2], dtype=torch.int32)
    q = torch.randn(4, 2, H, D, generator=generator)
    new = [torch.randn(4, 2, HKV, D, generator=generator) for _ in range(2 * appends)]
    plain = [x.clone() for x in (q, *caches, *new)]
    wanted = flash_attn_with_kvcache(*plain, causal=True, **given)
    leaves = [x.clone().requires_grad_() for x in (q, *caches, *new)]
    out = flash_attn_with_kvcache(*leaves, causal=True, **given)
    assert not out.requires_grad
    for one, other in zip((out, *leaves), (wanted, *plain), strict=True):
        assert torch.equal(one, other)
