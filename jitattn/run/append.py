"""Appends to a KV cache on the GPU by one launch of the append kernel."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from torch import Tensor

from jitattn.jit.device import device
from jitattn.kernels.append import AppendSpec
from jitattn.plan.append import AppendFacts, append
from jitattn.request.problem import axes
from jitattn.run.execute import KeptPlans
from jitattn.run.forward import check_cuda
from jitattn.spec.enums import Access, RotaryStyle
from jitattn.values.sequences import Paged
from jitattn.values.tensors import DTYPES

if TYPE_CHECKING:
    import torch

    from jitattn.plan.step import Plan
    from jitattn.request.problem import Strides
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import Padded, Ragged

_plans: Final = KeptPlans()


class Append(NamedTuple):
    """The checked arguments of an append: new tokens, cache, lengths and rotary tables."""

    k: Tensor  #: [B, num_new, Hkv, D] in the layout of q, or flat as a ragged q
    v: Tensor
    k_cache: Tensor
    v_cache: Tensor
    length: Tensor | int
    stop: Tensor  #: [B]: cache lengths afterwards, written by the append
    rotary: Rotary | None
    follows: bool  #: rotate query i by new token i's position; else all by token 0's
    layout: str
    q_seqs: Ragged | None
    kv_seqs: Padded | Paged


def append_spec(dtype: torch.dtype, rotary: Rotary | None, access: Access, arch: str) -> AppendSpec:
    """Return the spec of the append kernel."""
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
    """Write new tokens to the cache, rotated queries, and the cache lengths afterwards."""
    check_cuda()
    row, head = axes(new.layout)
    is_flat, is_paged = new.q_seqs is not None, isinstance(new.kv_seqs, Paged)
    tokens = (None, 0, 1) if is_flat else (0, row, head)
    cache = (0, 1, 2) if is_paged else (0, row, head)
    tensors = {
        "k": (new.k, tokens),
        "v": (new.v, tokens),
        "q": (q, tokens),
        "q_out": (turned, tokens),
        "k_cache": (new.k_cache, cache),
        "v_cache": (new.v_cache, cache),
    }
    of_k, of_v, of_q, of_turned, of_k_cache, of_v_cache = steps = [
        _strides(tensor, dimensions) for tensor, dimensions in tensors.values()
    ]
    addresses = {name: tensor.data_ptr() for name, (tensor, _) in tensors.items()}
    units = q.shape[-1] | new.v.shape[-1]
    for batch_step, row_step, head_step in steps:
        units |= batch_step | row_step | head_step
    rotary, of_rotary = new.rotary, None
    if rotary is not None:
        units |= rotary.cos.shape[1]  # half of the rotated columns
    units *= q.element_size()
    for address in addresses.values():
        units |= address
    if rotary is not None:
        cos, sin = rotary.cos, rotary.sin
        addresses["cos"], addresses["sin"] = cos.data_ptr(), sin.data_ptr()
        of_rotary = (rotary.rotary_dim, cos.shape[0], cos.stride(0), sin.stride(0))
        units |= (cos.stride(0) | sin.stride(0)) * cos.element_size()
        units |= addresses["cos"] | addresses["sin"]
    access = Access.VEC16 if units % 16 == 0 else Access.ELEMENT
    batch = new.stop.shape[0]
    if new.q_seqs is not None:
        num_new = len_q = min(new.q_seqs.max_length(), q.shape[0])
    else:
        num_new, len_q = new.k.shape[row], q.shape[row]
    block_table, table_width, table_stride, table_word = None, 1, 0, 0
    if isinstance(new.kv_seqs, Paged):
        block_table = new.kv_seqs.block_table
        table_width = block_table.shape[1]
    elif new.kv_seqs.batch_idx is not None:
        block_table = new.kv_seqs.batch_idx
    if block_table is not None:
        addresses["block_table"] = block_table.data_ptr()
        table_word = block_table.element_size() // 4
        table_stride = block_table.stride(0) * table_word if batch > 1 else 0
    addresses["kv_stop"] = new.stop.data_ptr()
    used_word = addresses["used_by_all"] = 0
    if isinstance(new.length, Tensor):
        addresses["used"], used_word = new.length.data_ptr(), new.length.element_size() // 4
    else:
        addresses["used_by_all"] = new.length
    q_span = None
    if new.q_seqs is not None:
        addresses["q_start"], addresses["q_stop"], word, kind = new.q_seqs.addresses()
        q_span = (word, kind, addresses["q_start"] > 0)
    facts = AppendFacts(
        batch, num_new, len_q, q.shape[tokens[2]], new.k.shape[tokens[2]], q.shape[-1],
        new.v.shape[-1], of_k, of_v, of_q, of_turned, of_k_cache, of_v_cache,
        new.k_cache.shape[0], new.k_cache.shape[cache[1]], table_width, table_stride, table_word,
        used_word, new.stop.element_size() // 4, q.shape[0], q_span, of_rotary, new.follows,
    )  # fmt: skip
    index = q.get_device()

    def plan() -> Plan:
        return append(append_spec(q.dtype, rotary, access, device(index).arch), facts)

    of_tables = None if rotary is None else (rotary.interleaved, rotary.cos.dtype)
    _plans.run((q.dtype, access, of_tables, facts), plan, addresses, index)


def _strides(tensor: Tensor, dimensions: tuple[int | None, int, int]) -> Strides:
    """Return the strides of these dimensions; 0 for size-1 dimensions."""
    shape, stride = tensor.shape, tensor.stride()
    first, row, head = dimensions
    return (
        0 if first is None or shape[first] <= 1 else stride[first],
        stride[row] if shape[row] > 1 else 0,
        stride[head] if shape[head] > 1 else 0,
    )
