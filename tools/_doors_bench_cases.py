"""Cases for the host time of compatibility functions, each with the equivalent core call.

A function may cost 10 us more than the core. FlashAttention's cases are in `_doors.py`.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

import jitattn
from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import flash_attn_triton
from jitattn.compat.flash_cosine_sim_attention import flash_cosine_sim_attention
from jitattn.compat.warp_attention import warp_attention_forward

if TYPE_CHECKING:
    from collections.abc import Callable

#: Batch, tokens, heads and head dim: so short that host time dominates.
_B, _L, _H, _D = 2, 64, 2, 64
_SCALE: Final = 8.0


class DoorCase(NamedTuple):
    """Call of a compatibility function and the core call, both without arguments."""

    door: str
    name: str
    call: Callable[[], Any]
    core: Callable[[], Any]


def cases(device: str = "cuda", dtype: torch.dtype = torch.float16) -> list[DoorCase]:
    """Return the cases of all compatibility functions except FlashAttention's."""
    x = torch.randn(_B, _L, _H, _D).to(device, dtype)
    return [*_cosine(x), *_fast_ops(x), *_warp(x), *_dkernel(x)]


def _cosine(x: torch.Tensor) -> list[DoorCase]:
    q = x.transpose(1, 2)
    bias = q.new_zeros(_H, _L, _L)
    mask = torch.ones(_B, _L, dtype=torch.bool, device=x.device)
    table = torch.zeros(_H, 21, device=x.device)
    norm, causal = jitattn.L2Norm(), jitattn.Causal()

    def case(name: str, given: dict[str, Any], core: dict[str, Any]) -> DoorCase:
        whole = {"layout": "bhsd", "scale": _SCALE, "qk_norm": norm, **core}
        return DoorCase(
            "cosine",
            name,
            lambda: flash_cosine_sim_attention(q, q, q, **given),
            lambda: jitattn.attention(q, q, q, **whole),
        )

    return [
        case("plain", {}, {}),
        case("causal", {"causal": True}, {"mask": causal}),
        case("mask", {"mask": mask}, {"mask": jitattn.KeyPadding(mask)}),
        case("bias", {"attn_bias": bias}, {"bias": bias[None]}),
        case("by distance", {"attn_bias": table}, {"relative_bias": table}),
        case("as they are", {"l2norm_qk": False}, {"qk_norm": None}),
    ]


def _fast_ops(x: torch.Tensor) -> list[DoorCase]:
    bias = x.new_zeros(_B, _H, _L, _L)
    top_left = jitattn.Causal("top_left")
    turned = x.transpose(1, 2)
    return [
        DoorCase(
            "fast_ops",
            "causal",
            lambda: flash_attn_triton(x, x, x, None, True),
            lambda: jitattn.attention(x, x, x, mask=top_left),
        ),
        DoorCase(
            "fast_ops",
            "bias",
            lambda: flash_attn_triton(x, x, x, bias),
            lambda: jitattn.attention(x, x, x, bias=bias),
        ),
        DoorCase(
            "fast_ops",
            "dropout",
            lambda: flash_attn_triton(x, x, x, None, False, 0.1),
            lambda: jitattn.attention(x, x, x, dropout_p=0.1),
        ),
        DoorCase(
            "fast_ops",
            "class, bias",
            lambda: FlashAttentionFunction.apply(turned, turned, turned, bias),
            lambda: jitattn.attention(turned, turned, turned, layout="bhsd", bias=bias),
        ),
    ]


def _warp(x: torch.Tensor) -> list[DoorCase]:
    flat = x.flatten(0, 1)
    start = torch.arange(_B, device=x.device) * _L
    length = torch.full_like(start, _L)
    ragged: dict[str, Any] = {
        "q_seq_start": start,
        "q_seq_len": length,
        "kv_seq_start": start,
        "kv_seq_len": length,
        "q_max_seq_len": _L,
        "kv_max_seq_len": _L,
    }

    def core() -> Any:
        seqs = jitattn.Ragged(start, length, _L)
        return jitattn.attention(flat, flat, flat, gear=4, q_seqs=seqs, kv_seqs=seqs)

    return [
        DoorCase(
            "warp",
            "batched",
            lambda: warp_attention_forward(x, x, x),
            lambda: jitattn.attention(x, x, x, gear=4),
        ),
        DoorCase(
            "warp", "ragged", lambda: warp_attention_forward(flat, flat, flat, **ragged), core
        ),
    ]


def _dkernel(x: torch.Tensor) -> list[DoorCase]:
    flat = x.flatten(0, 1)
    ends = (torch.arange(_B + 1, device=x.device) * _L).int()
    used = torch.full((_B,), _L - 4, device=x.device)
    blocks = torch.ones(1, 16, 16, dtype=torch.bool, device=x.device).tril()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own = SparseAttention(16, blocks)
    rule = LocalStrideSparseAttention(_H, 256, 64, 2, 3)
    ours = jitattn.LocalStride(64, 2, 3, head_step=1)
    pattern = jitattn.BlockSparse(blocks, 16, causal=True)

    def packed_core() -> Any:
        seqs = jitattn.Ragged.from_cu_seqlens(ends, _L)
        return jitattn.attention(flat, flat, flat, mask=ours, q_seqs=seqs, kv_seqs=seqs)

    def padded_core() -> Any:
        seqs = jitattn.Padded(used)
        return jitattn.attention(x, x, x, mask=ours, q_seqs=seqs, kv_seqs=seqs)

    return [
        DoorCase(
            "dkernel",
            "local + stride",
            lambda: rule(x, x, x),
            lambda: jitattn.attention(x, x, x, mask=ours),
        ),
        DoorCase(
            "dkernel",
            "own pattern",
            lambda: own(x, x, x),
            lambda: jitattn.attention(x, x, x, mask=pattern),
        ),
        DoorCase(
            "dkernel",
            "packed",
            lambda: rule(flat, flat, flat, cu_seqlen_k=ends, max_seqlen_k=_L),
            packed_core,
        ),
        DoorCase("dkernel", "padded", lambda: rule(x, x, x, seqlens=used), padded_core),
    ]
