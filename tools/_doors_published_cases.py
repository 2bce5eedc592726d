"""Cases for the host time of sageattention, xformers, FlashAttention 3 and 4, with core calls."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from _doors_bench_cases import DoorCase

import jitattn
from jitattn.compat import flash_attn_interface as fa3
from jitattn.compat import sageattention as sage
from jitattn.compat.flash_attn import cute as fa4
from jitattn.compat.flash_attn.cute import interface as fa4_interface
from jitattn.compat.flash_attn_interface import _functions as fa3_functions
from jitattn.compat.flash_attn_interface import _kvcache as fa3_kvcache
from jitattn.compat.sageattention import core as sage_core
from jitattn.compat.xformers.ops import fmha
from jitattn.compat.xformers.ops.fmha import _attend, attn_bias

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Batch, tokens, heads, head dim, rows of a cache, and of a page.
_B, _L, _H, _D, _ROOM, _PAGE = 2, 64, 2, 64, 256, 16
#: Where the doors call the core.
_PLACES: tuple[tuple[Any, str], ...] = (
    (_attend, "attention"),
    (fa3_functions, "attention"),
    (fa3_kvcache, "attention_with_kvcache"),
    (fa4_interface, "attention"),
    (sage_core, "attention"),
)


def published_cases(device: str, dtype: torch.dtype = torch.float16) -> list[DoorCase]:
    """Return the cases of all these doors."""
    x = torch.randn(_B, _L, _H, _D).to(device, dtype)
    cu = torch.arange(0, _B * _L + 1, _L, dtype=torch.int32, device=device)
    return [*_sage(x, cu), *_xformers(x), *_fa3(x, cu), *_fa4(x, cu)]


def _sage(x: torch.Tensor, cu: torch.Tensor) -> Iterator[DoorCase]:
    turned, flat, attend = x.transpose(1, 2), x.flatten(0, 1), jitattn.attention
    top_left = jitattn.Causal("top_left")
    seqs = jitattn.Ragged.from_cu_seqlens(cu, _L)
    yield DoorCase(
        "sageattention",
        "plain",
        lambda: sage.sageattn(turned, turned, turned),
        lambda: attend(turned, turned, turned, layout="bhsd", gear=4),
    )
    yield DoorCase(
        "sageattention",
        "causal, NHD",
        lambda: sage.sageattn(x, x, x, "NHD", is_causal=True, smooth_k=False),
        lambda: attend(x, x, x, mask=top_left, gear=4),
    )
    yield DoorCase(
        "sageattention",
        "varlen",
        lambda: sage.sageattn_varlen(flat, flat, flat, cu, cu, _L, _L),
        lambda: attend(flat, flat, flat, q_seqs=seqs, kv_seqs=seqs, gear=4),
    )


def _xformers(x: torch.Tensor) -> Iterator[DoorCase]:
    attend: Any = jitattn.attention
    own, device = fmha.memory_efficient_attention, x.device
    bias = x.new_zeros(_B, _H, _L, _L)
    top_left = jitattn.Causal("top_left")
    flat, packed = x.flatten(0, 1), x.view(1, _B * _L, _H, _D)
    blocks = attn_bias.BlockDiagonalMask.from_seqlens([_L] * _B, device=device).make_causal()
    seqs = jitattn.Ragged.from_cu_seqlens(blocks.q_seqinfo.seqstart, _L)
    groups = x[:, :, :, None].expand(-1, -1, -1, 4, -1)
    queries = groups.contiguous()
    cache = torch.randn(1, _B * _ROOM, _H, _D).to(x)
    step = packed[:, :_B]
    padded_kind = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask
    padded = padded_kind.from_seqlens([1] * _B, _ROOM, [100] * _B, device=device)
    table = torch.arange(_B * _ROOM // _PAGE, dtype=torch.int32, device=device).view(_B, -1)
    paged_kind = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    paged = padded.make_paged(table, _PAGE, paged_kind)
    ones = jitattn.Ragged.from_cu_seqlens(padded.q_seqinfo.seqstart, 1)
    k = padded.k_seqinfo
    rows: Any = jitattn.Ragged(k.seqstart[:-1], k.seqlen, _ROOM)
    pages: Any = jitattn.Paged(table, k.seqlen)
    in_pages = cache[0].unflatten(0, (-1, _PAGE))
    calls: dict[str, tuple[Any, Any]] = {
        "plain": (lambda: own(x, x, x), lambda: attend(x, x, x)),
        "causal": (
            lambda: own(x, x, x, attn_bias.LowerTriangularMask()),
            lambda: attend(x, x, x, mask=top_left),
        ),
        "bias": (lambda: own(x, x, x, bias), lambda: attend(x, x, x, bias=bias)),
        "groups": (
            lambda: own(queries, groups, groups),
            lambda: attend(queries.flatten(2, 3), x, x),
        ),
        "sequences": (
            lambda: own(packed, packed, packed, blocks),
            lambda: attend(flat, flat, flat, mask=top_left, q_seqs=seqs, kv_seqs=seqs),
        ),
        "cache": (
            lambda: own(step, cache, cache, padded),
            lambda: attend(
                step[0], cache[0], cache[0], mask=jitattn.Causal(), q_seqs=ones, kv_seqs=rows
            ),
        ),
        "pages": (
            lambda: own(step, cache, cache, paged),
            lambda: attend(
                step[0], in_pages, in_pages, mask=jitattn.Causal(), q_seqs=ones, kv_seqs=pages
            ),
        ),
    }
    for name, (call, core) in calls.items():
        yield DoorCase("xformers", name, call, core)


def _fa3(x: torch.Tensor, cu: torch.Tensor) -> Iterator[DoorCase]:
    attend: Any = jitattn.attention
    causal, window, flat = jitattn.Causal(), jitattn.Window(16, 0), x.flatten(0, 1)
    seqs = jitattn.Ragged.from_cu_seqlens(cu, _L)
    cache, step = x.new_zeros(_B, _ROOM, _H, _D), x[:, :1].contiguous()
    used = torch.full((_B,), 100, dtype=torch.int32, device=x.device)
    calls: dict[str, tuple[Any, Any]] = {
        "plain": (lambda: fa3.flash_attn_func(x, x, x), lambda: attend(x, x, x)),
        "window, LSE": (
            lambda: fa3.flash_attn_func(
                x, x, x, causal=True, window_size=(16, 0), return_attn_probs=True
            ),
            lambda: attend(x, x, x, mask=window, return_lse=True),
        ),
        "varlen": (
            lambda: fa3.flash_attn_varlen_func(flat, flat, flat, cu, cu, _L, _L, causal=True),
            lambda: attend(flat, flat, flat, mask=causal, q_seqs=seqs, kv_seqs=seqs),
        ),
        "cache": (
            lambda: fa3.flash_attn_with_kvcache(
                step, cache, cache, cache_seqlens=used, causal=True
            ),
            lambda: jitattn.attention_with_kvcache(step, cache, cache, length=used, mask=causal),
        ),
    }
    for name, (call, core) in calls.items():
        yield DoorCase("flash_attn_interface", name, call, core)


def _fa4(x: torch.Tensor, cu: torch.Tensor) -> Iterator[DoorCase]:
    attend: Any = jitattn.attention
    causal, flat = jitattn.Causal(), x.flatten(0, 1)
    seqs = jitattn.Ragged.from_cu_seqlens(cu, _L)
    calls: dict[str, tuple[Any, Any]] = {
        "plain": (lambda: fa4.flash_attn_func(x, x, x), lambda: attend(x, x, x)),
        "causal, LSE": (
            lambda: fa4.flash_attn_func(x, x, x, causal=True, return_lse=True),
            lambda: attend(x, x, x, mask=causal, return_lse=True),
        ),
        "varlen": (
            lambda: fa4.flash_attn_varlen_func(flat, flat, flat, None, cu, cu, _L, _L, causal=True),
            lambda: attend(flat, flat, flat, mask=causal, q_seqs=seqs, kv_seqs=seqs),
        ),
    }
    for name, (call, core) in calls.items():
        yield DoorCase("flash_attn.cute", name, call, core)


@contextlib.contextmanager
def stubbed_published_core() -> Iterator[None]:
    """Stub the core below these doors, to time only their own overhead."""

    def stub(q: torch.Tensor, *_: Any, return_lse: bool = False, **__: Any) -> Any:
        return (q, q) if return_lse else q

    before = [getattr(module, name) for module, name in _PLACES]
    try:
        for module, name in _PLACES:
            setattr(module, name, stub)
        yield
    finally:
        for (module, name), function in zip(_PLACES, before, strict=True):
            setattr(module, name, function)
