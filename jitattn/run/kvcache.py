"""Executes calls on a KV cache: validates arguments, appends, and attends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from jitattn.cpu.append import append_cpu, check_contents
from jitattn.errors import (
    NO_FORWARD_MODE,
    InvalidInputError,
    UnsupportedError,
    WithoutMemoryError,
)
from jitattn.request import problem as checks
from jitattn.request.request import find
from jitattn.request.scores import in_fp32
from jitattn.run.append import Append, append_cuda
from jitattn.run.forward import has_duals, run_request
from jitattn.values.given import integer
from jitattn.values.masks import Full
from jitattn.values.rotary import Rotary
from jitattn.values.sequences import Padded, Paged, Ragged, check_index
from jitattn.values.tensors import address_of, index_address, refuse_nested, strides_of

if TYPE_CHECKING:
    from jitattn.request.facts import Addresses
    from jitattn.request.problem import Call
    from jitattn.request.request import Request
    from jitattn.values.functions import Function
    from jitattn.values.sequences import KvSequences


class KvCache(NamedTuple):
    """The arguments of `attention_with_kvcache` beside those of `attention`."""

    k: Tensor | None
    v: Tensor | None
    length: Tensor | int
    rotary: Rotary | None
    left_pad: Tensor | None
    batch_idx: Tensor | None
    block_table: Tensor | None
    max_length: int | None


def check_captured(function: Function | None) -> None:
    """Check that no tensor that a function captures requires a gradient.

    Raises
    ------
    UnsupportedError
    """
    tensors = () if function is None else function.tensors
    if torch.is_grad_enabled() and any(one.requires_grad for one in tensors):
        raise UnsupportedError(
            "a tensor that a function captures requires grad: attention_with_kvcache writes in "
            "place and has no gradients; call under torch.no_grad(), or use attention"
        )


def check_kinds(
    q: object, k_cache: object, v_cache: object, cache: KvCache, q_seqs: object
) -> None:
    """Check the types of a call's arguments, and that none requires a gradient.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    k, v, rotary = cache.k, cache.v, cache.rotary
    given = {"q": q, "k_cache": k_cache, "v_cache": v_cache}
    given |= {name: value for name, value in (("k", k), ("v", v)) if value is not None}
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            raise InvalidInputError(
                f"{name} is a {type(tensor).__name__}: it must be a torch tensor"
            )
        if tensor.requires_grad and torch.is_grad_enabled():
            raise UnsupportedError(
                f"{name} requires grad: attention_with_kvcache writes in place and has no "
                "gradients; call under torch.no_grad(), or use attention"
            )
    if isinstance(q, Tensor) and q.dim() == 0:
        raise InvalidInputError("q has no dimensions: it must be [B, Lq, Hq, D]")
    if (k is None) != (v is None):
        raise InvalidInputError(
            f"{'k' if k is None else 'v'} is missing: k and v are given together, or neither"
        )
    if rotary is not None and not isinstance(rotary, Rotary):
        raise InvalidInputError(
            f"rotary is a {type(rotary).__name__}: it must be Rotary(cos, sin, interleaved=...)"
        )
    if rotary is not None and k is None:
        raise InvalidInputError(
            "rotary is given without k and v: positions are those of new tokens; turn q before the "
            "call"
        )
    if q_seqs is not None and not isinstance(q_seqs, Ragged):
        raise InvalidInputError(
            f"q_seqs is a {type(q_seqs).__name__}: it must be Ragged(...), or None for a batch"
        )


def checked_length(length: object) -> int:
    """Return a row count as an int; refuse other values.

    Raises
    ------
    InvalidInputError
    """
    number = integer(length)
    if number is None:
        raise InvalidInputError(f"length={length!r}: it must be an int or a tensor [B]")
    if not 0 <= number < 2**31:
        raise InvalidInputError(f"length={length}: it must be from 0 to 2**31 - 1")
    return number


class Prepared(NamedTuple):
    """A validated call, with the derived arguments of append and attention."""

    turned: Tensor  #: q, or the buffer for the rotated q
    new: Append | None  #: None: nothing is appended
    call: Call
    request: Request
    addresses: Addresses
    has_memory: bool  #: no tensor is a placeholder, or one of a transform on a GPU


def run_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: KvCache, call: Call
) -> Any:  # noqa: ANN401 - Tensor or (Tensor, Tensor)
    """Append and attend; `call` without the sequences of keys, which follow from the cache.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    turned, new, call, request, addresses, has_memory = prepare_with_kvcache(
        q, k_cache, v_cache, cache, call
    )
    if not has_memory:
        raise WithoutMemoryError
    if q.is_cuda:
        if has_duals((q, k_cache, v_cache, cache.k, cache.v)):
            raise UnsupportedError(NO_FORWARD_MODE)
        if new is not None:
            append_cuda(q, turned, new)
    else:
        room = _room(call.kv_seqs, k_cache, call.layout)
        check_contents(cache, call.kv_seqs, new, room, k_cache.shape[0])
        if new is not None:
            append_cpu(q, turned, new)
    return run_request(turned, k_cache, v_cache, request, addresses, call)


def prepare_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: KvCache, call: Call
) -> Prepared:
    """Validate a call and derive its further arguments; writes nothing.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    if q.is_cuda:
        call = call._replace(scores=in_fp32(call.scores))
    k, v, length = cache.k, cache.v, cache.length
    try:
        shape_q = q.shape
    except RuntimeError:  # a nested tensor has none
        refuse_nested((("q", q),))
        raise
    if cache.batch_idx is not None and cache.block_table is not None:
        raise InvalidInputError(
            "batch_idx and block_table are both given: with pages, the table says where the keys "
            "of each sequence are; index its rows instead"
        )
    q_seqs = call.q_seqs if isinstance(call.q_seqs, Ragged) else None  # other kinds are refused
    max_length = cache.max_length
    batch = shape_q[0] if q_seqs is None else q_seqs.batch
    num_new = 0
    if k is not None and q_seqs is None and k.dim() == 4:
        num_new = k.shape[checks.axes(call.layout)[0]]
    if isinstance(length, int) and max_length is None and q_seqs is None:
        max_length = length + num_new
    stop = _stop(batch, length, cache.left_pad, is_appended=k is not None, like=q)
    kv_seqs: Padded | Paged = (
        Padded.from_stop(stop, cache.left_pad, max_length, cache.batch_idx)
        if cache.block_table is None
        else Paged.from_stop(cache.block_table, stop, max_length, cache.left_pad)
    )
    call = call._replace(kv_seqs=kv_seqs)
    turned = q
    if cache.rotary is not None:
        turned = torch.empty_like(q, memory_format=torch.contiguous_format)
    request, addresses, has_memory = find(turned, k_cache, v_cache, call)
    new = None
    if k is not None and v is not None:
        follows = not isinstance(call.mask, Full)
        new = Append(
            k,
            v,
            k_cache,
            v_cache,
            length,
            stop,
            cache.rotary,
            follows,
            call.layout,
            q_seqs,
            kv_seqs,
        )
        has_memory = _check_new(q, new, num_new) and has_memory
    elif isinstance(length, int):
        _check_room(length, 0, _room(kv_seqs, k_cache, call.layout))
    return Prepared(turned, new, call, request, addresses, has_memory)


def _stop(
    batch: int,
    length: Tensor | int,
    left_pad: Tensor | None,
    *,
    is_appended: bool,
    like: Tensor,
) -> Tensor:
    """Return the tensor of cache lengths after the call, [B]: a new one, or the given one."""
    if isinstance(length, Tensor):
        check_index("length", length, 1)
        if len(length) != batch or length.device != like.device:
            raise InvalidInputError(
                f"length has {len(length)} entries on {length.device}: it must have one for each "
                f"of the {batch} sequences, on {like.device}"
            )
        if not is_appended:
            return length
    dtype = torch.int32 if left_pad is None else left_pad.dtype
    if isinstance(length, int) and not is_appended:
        return like.new_full((batch,), length, dtype=dtype)
    return like.new_empty(batch, dtype=dtype)


def _check_new(q: Tensor, new: Append, num_new: int) -> bool:
    """Check new tokens against q and the cache, and rotary tables against both.

    Returns
    -------
    bool
        True if all of them have memory.
    """
    addresses = []
    row, head = checks.axes(new.layout)
    for name, tensor, cache in (("k", new.k, new.k_cache), ("v", new.v, new.v_cache)):
        heads = cache.shape[2 if isinstance(new.kv_seqs, Paged) else head]
        if new.q_seqs is not None:
            shape = [q.shape[0], heads, cache.shape[-1]]
        else:
            shape = [q.shape[0], 0, 0, cache.shape[-1]]
            shape[row], shape[head] = num_new, heads
        if list(tensor.shape) != shape:
            raise InvalidInputError(
                f"{name} has shape {list(tensor.shape)}: with q {list(q.shape)} and a cache of "
                f"{list(cache.shape)} it must be {shape}"
            )
        if (tensor.dtype, tensor.device) != (q.dtype, q.device):
            raise InvalidInputError(
                f"{name} is {tensor.dtype} on {tensor.device}, q is {q.dtype} on {q.device}: they "
                "must be alike; cast or move it with .to()"
            )
        strides_of(name, tensor)
        addresses.append(address_of(name, tensor))
    strides_of("q", q)
    addresses.append(address_of("q", q))
    if isinstance(new.length, Tensor):
        addresses.append(index_address("length", new.length))
    room = _room(new.kv_seqs, new.k_cache, new.layout)
    if isinstance(new.length, int):
        _check_room(new.length, num_new, room)
    if new.rotary is None:
        return min(addresses) >= 0
    addresses.append(address_of("Rotary(cos)", new.rotary.cos))
    addresses.append(address_of("Rotary(sin)", new.rotary.sin))
    table = new.rotary.cos
    if table.dtype not in (q.dtype, torch.float32) or table.device != q.device:
        raise InvalidInputError(
            f"Rotary: the tables are {table.dtype} on {table.device}; they must be {q.dtype} or "
            f"float32, on {q.device}"
        )
    if new.rotary.rotary_dim > q.shape[-1]:
        raise InvalidInputError(
            f"Rotary: the tables turn {new.rotary.rotary_dim} columns, but head_dim is "
            f"{q.shape[-1]}; slice them to [:, : head_dim // 2]"
        )
    if table.shape[0] < room:
        raise InvalidInputError(
            f"Rotary: the tables have {table.shape[0]} positions, but a sequence has room for "
            f"{room} rows; make them longer"
        )
    return min(addresses) >= 0


def _room(kv_seqs: KvSequences, k_cache: Tensor, layout: str) -> int:
    """Return the cache capacity of a sequence, in rows."""
    if isinstance(kv_seqs, Paged):
        return kv_seqs.block_table.shape[1] * k_cache.shape[1]
    return k_cache.shape[checks.axes(layout)[0]]


def _check_room(length: int, num_new: int, room: int) -> None:
    if length + num_new > room:
        raise InvalidInputError(
            f"length={length}: the cache would hold {length + num_new} rows a sequence, but there "
            f"is room for {room}; make it larger, or drop its oldest rows"
        )
