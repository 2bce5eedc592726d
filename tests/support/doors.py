"""Typical calls of every door, by name, with their inputs on a device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)
from jitattn.compat.flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)
from jitattn.compat.warp_attention import warp_attention_forward

B, L, H, D = 2, 96, 2, 64


def calls(device: str, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return calls without arguments; packed tensors hold all tokens of the batch."""

    def random(*shape: int, kind: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(shape).to(device, kind)

    x = random(B, L, H, D)
    flat, turned = x.flatten(0, 1), x.transpose(1, 2)
    last, many = x[:, -1:], random(B, L, H, L)
    cu = torch.tensor([0, 40, B * L], device=device, dtype=torch.int32)
    start, length = cu[:-1].contiguous(), cu.diff()
    left, used = torch.tensor([3, 0], device=device), torch.tensor([60, 96], device=device)
    mask = torch.ones(B, L, dtype=torch.bool, device=device)
    rule = LocalStrideSparseAttention(H, 256, 16, 2, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        own = SparseAttention(16, (torch.rand(H, 16, 16) < 0.6).to(device))
        large = SparseAttention(256, torch.ones(1, 1, dtype=torch.bool, device=device))
    bias = many.transpose(1, 2)
    cosine, triton, warp = flash_cosine_sim_attention, flash_attn_triton, warp_attention_forward
    ragged = {
        "q_seq_start": start,
        "q_seq_len": length,
        "kv_seq_start": start,
        "kv_seq_len": length,
    }
    return {
        "cosine": lambda: cosine(turned, turned, turned),
        "cosine masked": lambda: cosine(turned, turned, turned, mask=mask, causal=True),
        "cosine bias": lambda: cosine(turned, turned, turned, attn_bias=bias[0]),
        "cosine as they are": lambda: cosine(turned, turned, turned, l2norm_qk=False, scale=0.1),
        "cosine plain": lambda: plain_cosine_sim_attention(turned, turned, turned, mask=mask),
        "fast_ops": lambda: triton(x, x, x, None, True),
        "fast_ops bias": lambda: triton(x, x, x, bias),
        "fast_ops dropout": lambda: triton(x, x, x, bias, True, 0.25),
        "fast_ops mask": lambda: triton_dropout_mask(0.25, B, H, L, L, device),
        "fast_ops class": lambda: FlashAttentionFunction.apply(turned, turned, turned, bias),
        "warp": lambda: warp(x, x, x, is_causal=True),
        "warp short": lambda: warp(last, x, x),
        "warp ragged": lambda: warp(flat, flat, flat, **ragged, q_max_seq_len=L),
        "warp ragged keys": lambda: warp(
            last, flat, flat, kv_seq_start=start, kv_seq_len=length, is_causal=True
        ),
        "dkernel": lambda: rule(x, x, x),
        "dkernel decode": lambda: rule(last, x, x, return_lse=True),
        "dkernel own": lambda: own(x, x, x),
        "dkernel large": lambda: large(x, x, x),
        "dkernel packed": lambda: rule(flat, flat, flat, cu_seqlen_k=cu),
        "dkernel packed own": lambda: own(flat, flat, flat, cu_seqlen_k=cu, cu_seqlen_q=cu),
        "dkernel packed bounds": lambda: rule(
            flat, flat, flat, cu_seqlen_k=cu, max_seqlen_q=152, max_seqlen_k=152
        ),
        "dkernel packed decode": lambda: rule(flat[:2], flat, flat, cu_seqlen_k=cu),
        "dkernel paddings": lambda: rule(x, x, x, left_paddings=left, seqlens=used - left),
        "dkernel left": lambda: rule(last, x, x, left_paddings=left),
    }
