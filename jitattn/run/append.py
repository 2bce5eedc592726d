"""Appending to a KV cache on the GPU: one launch of the append kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch import Tensor

from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.append import AppendSpec
from jitattn.request.problem import axes
from jitattn.run.forward import check_cuda
from jitattn.spec.enums import LENGTHS, Access, RotaryStyle
from jitattn.values.sequences import Paged
from jitattn.values.tensors import DTYPES

if TYPE_CHECKING:
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import Padded, Ragged

#: Rows (token and head) that a CTA takes at a time, and how many times it should at least.
_TEAMS: Final = AppendSpec.num_threads // 16
_ROUNDS: Final = 4
_MOST_CTAS: Final = 65536


class Append(NamedTuple):
    """What is to be appended, and where; every tensor is checked."""

    k: Tensor  #: [B, num_new, Hkv, D] in the layout of q, or flat as a ragged q
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    length: Tensor | int
    stop: Tensor  #: [B]: written by the append: rows in use afterwards
    rotary: Rotary | None
    follows: bool  #: query i is turned by the position of new token i; else all by that of token 0
    layout: str
    q_seqs: Ragged | None
    kv_seqs: Padded | Paged


def append_spec(dtype: torch.dtype, rotary: Rotary | None, access: Access, arch: str) -> AppendSpec:
    """Return the kernel that appends."""
    style = RotaryStyle.NONE
    if rotary is not None:
        style = RotaryStyle.INTERLEAVED if rotary.interleaved else RotaryStyle.HALF_SPLIT
    return AppendSpec(
        dtype=DTYPES[dtype],
        table_dtype=DTYPES[dtype if rotary is None else rotary.cos.dtype],
        rotary=style,
        access=access,
        arch=arch,
    )


def append_cuda(q: Tensor, turned: Tensor, new: Append) -> None:
    """Write the new tokens into the cache, the turned queries, and the rows in use afterwards."""
    check_cuda()
    index = q.get_device()
    with backend.active.on_device(index):
        _launch(q, turned, new, index)


def _launch(q: Tensor, turned: Tensor, new: Append, index: int) -> None:
    row, head = axes(new.layout)
    is_flat, is_paged = new.q_seqs is not None, isinstance(new.kv_seqs, Paged)
    tokens = (None, 0, 1) if is_flat else (0, row, head)
    cache = (0, 1, 2) if is_paged else (0, row, head)

    def strides(tensor: Tensor, dimensions: tuple[int | None, int, int]) -> tuple[int, ...]:
        return tuple(
            0 if dimension is None or tensor.shape[dimension] <= 1 else tensor.stride(dimension)
            for dimension in dimensions
        )

    steps = of_k, of_v, of_q, of_turned, of_k_cache, of_v_cache = (
        strides(new.k, tokens),
        strides(new.v, tokens),
        strides(q, tokens),
        strides(turned, tokens),
        strides(new.k_cache, cache),
        strides(new.v_cache, cache),
    )
    tensors = (new.k, new.v, q, turned, new.k_cache, new.v_cache)
    units = q.shape[-1] | new.v.shape[-1]
    for step in steps:
        units |= step[0] | step[1] | step[2]
    rotary = new.rotary
    if rotary is not None:
        units |= rotary.cos.shape[1]  # half of the columns that are turned
    units *= q.element_size()
    for tensor in tensors:
        units |= tensor.data_ptr()
    if rotary is not None:
        for angles in (rotary.cos, rotary.sin):
            units |= angles.data_ptr() | angles.stride(0) * angles.element_size()
    access = Access.VEC16 if units % 16 == 0 else Access.ELEMENT
    spec = append_spec(q.dtype, rotary, access, device(index).arch)
    batch = len(new.stop)
    if new.q_seqs is not None:
        num_new = len_q = min(new.q_seqs.max_length(), q.shape[0])
    else:
        num_new, len_q = new.k.shape[row], q.shape[row]
    heads_q, heads_kv = q.shape[tokens[2]], new.k.shape[tokens[2]]
    rows = max(2 * heads_kv * num_new, heads_q * len_q if rotary else 0)
    ctas = max(1, min(-(-rows // (_TEAMS * _ROUNDS)), max(16, _MOST_CTAS // max(batch, 1))))
    table, table_stride, table_word, table_width = 0, 0, 1, 1
    page_size, num_pages = new.k_cache.shape[cache[1]], new.k_cache.shape[0]
    block_table = None
    if isinstance(new.kv_seqs, Paged):
        block_table = new.kv_seqs.block_table
        table_width = block_table.shape[1]
    elif new.kv_seqs.batch_idx is not None:
        block_table = new.kv_seqs.batch_idx
    if block_table is not None:
        table, table_word = block_table.data_ptr(), block_table.element_size() // 4
        table_stride = block_table.stride(0) * table_word if batch > 1 else 0
    used, used_word = 0, 1
    if isinstance(new.length, Tensor):
        used, used_word = new.length.data_ptr(), new.length.element_size() // 4
    q_start, q_stop, q_word, q_kind = 0, 0, 1, LENGTHS
    if new.q_seqs is not None:
        q_start, q_stop, q_word, q_kind = new.q_seqs.addresses()
    if not batch:
        return
    loaded_kernel(spec, index).launch(
        batch * ctas,
        backend.active.stream(index),
        k_stride_batch=of_k[0],
        k_stride_row=of_k[1],
        k_stride_head=of_k[2],
        v_stride_batch=of_v[0],
        v_stride_row=of_v[1],
        v_stride_head=of_v[2],
        q_stride_batch=of_q[0],
        q_stride_row=of_q[1],
        q_stride_head=of_q[2],
        q_out_stride_batch=of_turned[0],
        q_out_stride_row=of_turned[1],
        q_out_stride_head=of_turned[2],
        k_cache_stride_page=of_k_cache[0],
        k_cache_stride_row=of_k_cache[1],
        k_cache_stride_head=of_k_cache[2],
        v_cache_stride_page=of_v_cache[0],
        v_cache_stride_row=of_v_cache[1],
        v_cache_stride_head=of_v_cache[2],
        k=new.k.data_ptr(),
        v=new.v.data_ptr(),
        q=q.data_ptr(),
        cos=0 if rotary is None else rotary.cos.data_ptr(),
        sin=0 if rotary is None else rotary.sin.data_ptr(),
        k_cache=new.k_cache.data_ptr(),
        v_cache=new.v_cache.data_ptr(),
        q_out=turned.data_ptr(),
        kv_stop=new.stop.data_ptr(),
        used=used,
        q_start=q_start,
        q_stop=q_stop,
        block_table=table,
        cos_stride=0 if rotary is None else rotary.cos.stride(0),
        sin_stride=0 if rotary is None else rotary.sin.stride(0),
        table_stride=table_stride,
        num_new=num_new,
        len_q=len_q,
        heads_q=heads_q,
        heads_kv=heads_kv,
        head_dim=q.shape[-1],
        head_dim_v=new.v.shape[-1],
        rotary_dim=0 if rotary is None else rotary.rotary_dim,
        q_follows=new.follows,
        table_rows=1 if rotary is None else rotary.cos.shape[0],
        table_width=table_width,
        num_pages=num_pages,
        page_size=max(1, page_size),
        used_by_all=new.length if isinstance(new.length, int) else 0,
        used_word=used_word,
        stop_word=new.stop.element_size() // 4,
        table_word=table_word,
        q_word=q_word,
        q_span_kind=q_kind,
        q_rows=q.shape[0],
        ctas_per_sequence=ctas,
    )
