"""Calls whose saved tensors are written to between forward and backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch

import jitattn

BATCH, HEADS, DIM = 2, 2, 32


class Case(NamedTuple):
    """Call with q, k, v and another tensor among its arguments, made on a device."""

    name: str
    make: Callable[[torch.device, int], tuple[dict[str, Any], torch.Tensor]]
    is_flat: bool = False
    is_paged: bool = False
    dtype: torch.dtype = torch.float16


def _key_padding(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    keep = torch.ones(BATCH, length, dtype=torch.bool, device=device)
    return {"mask": jitattn.KeyPadding(keep) & jitattn.Causal()}, keep


def _dense(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    keep = torch.ones(1, 1, length, length, dtype=torch.bool, device=device)
    return {"mask": jitattn.Dense(keep)}, keep


def _blocks(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    pattern = torch.ones(32, 32, dtype=torch.bool, device=device)
    return {"mask": jitattn.BlockSparse(pattern, 16)}, pattern


def _blocks_of_a_head(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    arguments, pattern = _blocks(device, length)
    return {"mask": jitattn.PerHead([jitattn.Full(), arguments["mask"]])}, pattern


def _padded(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    used = torch.full((BATCH,), length - 8, dtype=torch.int32, device=device)
    return {"kv_seqs": jitattn.Padded(used)}, used


def _padded_q_start(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    used = torch.full((BATCH,), length - 8, dtype=torch.int64, device=device)
    start = torch.ones(BATCH, dtype=torch.int64, device=device)
    return {"q_seqs": jitattn.Padded(used, start)}, start


def _ragged(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    cu = torch.tensor([0, length - 8, 2 * length], dtype=torch.int32, device=device)
    seqs = jitattn.Ragged.from_cu_seqlens(cu, max_length=2 * length)
    return {"q_seqs": seqs, "kv_seqs": seqs}, cu


def _block_table(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    pages = -(-length // 16)
    table = torch.arange(BATCH * pages, dtype=torch.int32, device=device).view(BATCH, pages)
    used = torch.full((BATCH,), length - 8, dtype=torch.int32, device=device)
    return {"kv_seqs": jitattn.Paged(table, used)}, table


def _pages_of_cu_seqlens(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    pages = -(-length // 16)
    table = torch.arange(BATCH * pages, dtype=torch.int32, device=device).view(BATCH, pages)
    cu = torch.tensor([0, length - 8, 2 * length - 9], dtype=torch.int32, device=device)
    return {"kv_seqs": jitattn.Paged.from_cu_seqlens(table, cu)}, cu


def _batch_idx(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    rows = torch.tensor([1, 0], dtype=torch.int32, device=device)
    used = torch.full((BATCH,), length - 8, dtype=torch.int32, device=device)
    return {"kv_seqs": jitattn.Padded(used, batch_idx=rows)}, rows


def _dropout_state(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    state = jitattn.dropout_state(device)
    return {"dropout_p": 0.5, "dropout_state": state}, state


def _bias(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    bias = torch.randn(1, HEADS, length, length, device=device)
    return {"bias": bias}, bias


def _relative(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    table = torch.randn(HEADS, 33, device=device)
    return {"relative_bias": table}, table


def _slopes(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    slopes = torch.rand(HEADS, device=device)
    return {"alibi_slopes": slopes}, slopes


def _sinks(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    sinks = torch.rand(HEADS, device=device)
    return {"sinks": sinks}, sinks


def _head_scale(device: torch.device, length: int) -> tuple[dict[str, Any], torch.Tensor]:
    scale = torch.rand(HEADS, device=device)
    return {"qk_norm": jitattn.L2Norm(head_scale=scale)}, scale


CASES = (
    Case("key_padding", _key_padding),
    Case("dense", _dense),
    Case("block_sparse", _blocks),
    Case("block_sparse_of_a_head", _blocks_of_a_head),
    Case("padded", _padded),
    Case("padded_start", _padded_q_start),
    Case("ragged", _ragged, is_flat=True),
    Case("block_table", _block_table, is_paged=True),
    Case("pages_of_cu_seqlens", _pages_of_cu_seqlens, is_paged=True),
    Case("batch_idx", _batch_idx),
    Case("dropout_state", _dropout_state),
    Case("bias", _bias),
    Case("relative_bias", _relative),
    Case("alibi_slopes", _slopes),
    Case("sinks", _sinks),
    Case("head_scale", _head_scale),
    Case("fp32", _key_padding, dtype=torch.float32),
)


def inputs_of(case: Case, device: torch.device, length: int) -> list[torch.Tensor]:
    """Return q, k and v of a case, which require grad."""
    rows = (BATCH, length)
    shapes = [(BATCH * length, HEADS, DIM)] * 3 if case.is_flat else [(*rows, HEADS, DIM)] * 3
    if case.is_paged:
        shapes[1:] = [(BATCH * -(-length // 16), 16, HEADS, DIM)] * 2
    return [
        torch.randn(shape, device=device, dtype=case.dtype, requires_grad=True) for shape in shapes
    ]


def check_that_a_write_raises(case: Case, device: torch.device, length: int) -> None:
    """Assert that backward raises after a write to any tensor of a call."""
    with torch.enable_grad():
        for target in ("nothing", "argument", "q", "k", "v"):
            qkv = inputs_of(case, device, length)
            arguments, tensor = case.make(device, length)
            out = jitattn.attention(*qkv, **arguments)
            written = {"argument": tensor, "nothing": None}.get(target)
            if target in "qkv":
                written = qkv["qkv".index(target)]
            if written is None:
                out.sum().backward()
                continue
            with torch.no_grad():
                written.copy_(written.clone())
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                out.sum().backward()
