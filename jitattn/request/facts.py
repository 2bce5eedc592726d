"""Collects all facts of a call that its validation depends on, as a dictionary key.

Validation reads shapes, strides, dtypes, devices, alignments and the values of masks and options,
never tensor contents or addresses. Addresses are collected on the way, as every call needs them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, TypeAlias

import torch

from jitattn.request.block_list_cache import identity_of
from jitattn.request.scores import NO_CHANGES, TABLES
from jitattn.values.gears import get_default_gear
from jitattn.values.masks import (
    BY_VALUE,
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    FunctionBlocks,
    KeyPadding,
    PerHead,
)
from jitattn.values.norm import L2Norm
from jitattn.values.sequences import Padded, Paged, Ragged
from jitattn.values.tensors import LOW_ADDRESS, PLAIN

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.request.scores import Scores
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

#: Addresses by the plans' operand names. A run of a plan adds entries whose keys are no names.
Addresses: TypeAlias = dict[Any, Any]
Facts: TypeAlias = tuple[Any, ...]

_NUMBERS: Final = frozenset((type(None), int, float))
_INTEGERS: Final = frozenset((type(None), int))
#: Operands of the sequences of a side.
_OF_Q: Final = ("q_start", "q_stop")
_OF_KV: Final = ("kv_start", "kv_stop")
_SEQUENCES: Final = frozenset((Ragged, Padded, Paged))
#: Place of the mask's fact: its alignment, None or its type.
MASK: Final = 10
#: Number of facts of a call without options.
_NUM_PLAIN: Final = MASK + 1
#: Number of facts if there are options, but no more tensors: what is there, then the options.
_NUM_WITH_OPTIONS: Final = _NUM_PLAIN + 4 + 6
#: Place of the layout among them.
_LAYOUT: Final = _NUM_PLAIN + 5
#: Keys are counted in 32 bits.
_MAX_COUNT: Final = 2**31 - 1


def facts_of(q: Tensor, k: Tensor, v: Tensor, call: Call, addresses: Addresses) -> Facts | None:
    """Return all facts that validation depends on, and collect addresses; None: not cacheable."""
    given: tuple[Any, ...] = call
    (mask, scale, layout, gear, out, out_dtype, num_splits, return_lse, q_seqs, kv_seqs, scores,
     _, tile_rows) = given  # fmt: skip
    if type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return None
    try:
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if at_q < LOW_ADDRESS or at_k < LOW_ADDRESS or at_v < LOW_ADDRESS:
            return None
        dtype, index = q.dtype, q.get_device()
        if k.dtype is not dtype or v.dtype is not dtype or k.get_device() != index:
            return None
        if v.get_device() != index or q.is_neg() or k.is_neg() or v.is_neg():
            return None
        kind = type(mask)
        facts: Facts = (
            dtype, index, q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
            (at_q | at_k | at_v) & 15, get_default_gear(),
            # Cheaper to hash than the mask itself.
            None if kind is Full else mask.align if kind is Causal else kind,
        )  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensor, or sparse, nested or transformed
        return None
    addresses["q"], addresses["k"], addresses["v"] = at_q, at_k, at_v
    if (
        scale is gear is out is out_dtype is num_splits is q_seqs is kv_seqs is tile_rows is None
        and (kind is Full or kind is Causal)
        and scores is NO_CHANGES
        and layout == "bshd"
        and (return_lse is False or return_lse is True)
    ):
        return facts
    more: list[Any] = [out is None, q_seqs is None, kv_seqs is None, scores is NO_CHANGES]
    is_usual = scale is gear is out_dtype is num_splits is tile_rows is None and layout == "bshd"
    if is_usual and (return_lse is False or return_lse is True):
        more.append("usual")
    # Types come first: 2.0 and True equal 2 and 1 as dictionary keys.
    elif (
        type(scale) in _NUMBERS
        and type(gear) in _INTEGERS
        and type(num_splits) in _INTEGERS
        and type(tile_rows) in _INTEGERS
        and (out_dtype is None or type(out_dtype) is torch.dtype)
        and type(return_lse) is bool
        and type(layout) is str
    ):
        more += (scale, layout, gear, out_dtype, num_splits, tile_rows)
    else:
        return None
    try:
        if (
            (kind is Full or kind is Causal or _note_mask(mask, more, addresses))
            and (out is None or _note_tensor("out", out, more, addresses))
            and (q_seqs is None or _note_sequences(_OF_Q, q_seqs, more, addresses))
            and (
                kv_seqs is None
                or (kv_seqs is q_seqs and _note_same_sequences(kv_seqs, more, addresses))
                or _note_sequences(_OF_KV, kv_seqs, more, addresses)
            )
            and (scores is NO_CHANGES or _note_scores(scores, more, addresses))
        ):
            return (*facts, *more)
    except (AttributeError, RuntimeError):  # as above
        pass
    return None


def without_length(facts: Facts) -> tuple[Facts, int] | None:
    """Return the facts of a batched call without its key count, and that; None for other calls.

    Calls with sequences, score modifications, a result to fill or another mask than full or causal
    are excluded, and those with fewer than two keys: one has no row stride, none has no kernel.
    """
    dtype, index, of_q, of_k, of_v, steps_q, steps_k, steps_v, *more = facts
    if not len(of_k) == len(of_v) == 4:
        return None
    batch, num_keys, heads, dim = of_k
    batch_v, num_values, heads_v, dim_v = of_v
    batch_step, row, head, step = steps_k
    batch_step_v, row_v, head_v, step_v = steps_v
    if len(facts) != _NUM_PLAIN:
        mask, *are_none = facts[MASK : MASK + 5]
        if len(facts) != _NUM_WITH_OPTIONS or type(mask) is type or not all(are_none):
            return None
        if facts[_LAYOUT] != "bshd":
            num_keys, heads, row, head = heads, num_keys, head, row
            num_values, heads_v, row_v, head_v = heads_v, num_values, head_v, row_v
    if not 1 < num_keys == num_values <= _MAX_COUNT:
        return None
    if batch <= 1:  # the step to another sequence is of no account
        batch_step = batch_step_v = None
    but_length = (
        dtype, index, of_q, batch, heads, dim, batch_v, heads_v, dim_v, steps_q, batch_step, row,
        head, step, batch_step_v, row_v, head_v, step_v, *more,
    )  # fmt: skip
    return but_length, num_keys


def _note_tensor(
    name: str,
    tensor: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    """Collect the facts of a tensor; return whether it can be cached."""
    if type(tensor) not in PLAIN:  # some subclasses warn in data_ptr()
        return False
    address = tensor.data_ptr()
    if address < LOW_ADDRESS or tensor.is_neg():
        return False
    facts += (tensor.dtype, tensor.get_device(), tensor.shape, tensor.stride(), address & 15)
    addresses[name] = address
    return True


def _note_matrix(
    name: str,
    tensor: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    """Collect a matrix that is read 16 bytes at a time, possibly past its end."""
    if not _note_tensor(name, tensor, facts, addresses):
        return False
    shape, size = facts[-3], tensor.element_size()
    if not shape or shape[-1] * size & 15:
        facts.append(tensor.untyped_storage().nbytes() - tensor.storage_offset() * size)
    return True


def _note_mask(mask: Mask, facts: list[Any], addresses: Addresses) -> bool:
    kind: type[Any] = type(mask)
    facts.append(kind)
    if kind in BY_VALUE:
        facts.append(mask)
        return True
    if isinstance(mask, KeyPadding) and kind is KeyPadding:
        return _note_tensor("key_padding", mask.keep, facts, addresses)
    if isinstance(mask, Dense) and kind is Dense:
        return _note_matrix("dense", mask.keep, facts, addresses)
    if isinstance(mask, BlockSparse) and kind is BlockSparse:
        facts += (mask.block_size, mask.causal, mask.first_row)
        return _note_tensor("pattern", mask.pattern, facts, addresses)
    if isinstance(mask, FunctionBlocks) and kind is FunctionBlocks:
        facts += (mask.by_head, mask.len_q, mask.len_kv)
        return True
    if isinstance(mask, PerHead) and kind is PerHead:
        known: dict[Hashable, int] = {}  # GQA packing depends on which rules are equal
        facts += (known.setdefault(identity_of(rule), len(known)) for rule in mask.rules)
        return all(_note_mask(rule, facts, addresses) for rule in mask.rules)
    if isinstance(mask, Both) and kind is Both and mask.function is None:
        parts = (mask.rule, mask.key_padding, mask.dense)
        for part in parts:
            if part is None:
                facts.append(None)
            elif not _note_mask(part, facts, addresses):
                return False
        return True
    return False


def _note_sequences(
    names: tuple[str, str],
    seqs: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    """Collect the facts of sequences, whose operands have these names, as `_note_tensor`."""
    kind = type(seqs)
    if kind not in _SEQUENCES:
        return False
    longest = seqs._max_length
    if kind is Ragged and longest is None:  # validation computes it
        return False
    cumulative = seqs.cumulative
    start = None
    stop = cumulative
    if cumulative is None:
        start, stop = seqs._start, seqs._stop
    if type(stop) not in PLAIN:
        return False
    at_start, at_stop, dtype = 0, stop.data_ptr(), stop.dtype
    if at_stop < LOW_ADDRESS:
        return False
    if cumulative is not None:
        at_start = at_stop
        at_stop += stop.element_size()
    elif start is not None:
        if type(start) not in PLAIN:
            return False
        at_start = start.data_ptr()
        if at_start < LOW_ADDRESS:
            return False
    addresses[names[0]], addresses[names[1]] = at_start, at_stop
    facts += (
        kind, cumulative is None, start is None, dtype, stop.get_device(), stop.shape, longest,
        seqs.stop_is_length,
    )  # fmt: skip
    if kind is Ragged:
        return True
    table = seqs.block_table if kind is Paged else seqs.batch_idx
    if table is None:
        facts.append(None)
        return True
    return _note_tensor("block_table", table, facts, addresses)


def _note_same_sequences(
    seqs: QSequences | KvSequences, facts: list[Any], addresses: Addresses
) -> bool:
    """Collect ragged keys at the places of the queries, which are noted; refuse others."""
    if type(seqs) is not Ragged:  # others have a table, of the keys alone
        return False
    addresses["kv_start"], addresses["kv_stop"] = addresses["q_start"], addresses["q_stop"]
    facts.append("as q")
    return True


def _note_scores(scores: Scores, facts: list[Any], addresses: Addresses) -> bool:
    bias, relative, slopes, softcap, sinks, dropout, norm, function = scores
    if type(softcap) not in _NUMBERS:
        return False
    if bias is None:
        facts += (softcap, None)
    else:
        facts.append(softcap)
        if not _note_matrix("bias", bias, facts, addresses):
            return False
    if relative is slopes is sinks is None:
        facts.append("no tables")
    else:
        for name, table in zip(TABLES, (relative, slopes, sinks), strict=True):
            if table is None:
                facts.append(None)
            elif not _note_tensor(name, table, facts, addresses):
                return False
    if dropout is None:
        facts.append(None)
    else:
        if not _note_tensor("dropout_state", dropout.state, facts, addresses):
            return False
        facts.append(dropout.threshold)
    if function is not None:
        facts += (function.program, function.numbers)
        for idx, tensor in enumerate(function.tensors):
            if not _note_tensor(f"tensor{idx}", tensor, facts, addresses):
                return False
    if norm is None:
        facts.append(None)
        return True
    if type(norm) is not L2Norm:
        return False
    facts += (norm.groups, norm.bound, norm.normalize)
    if norm.head_scale is None:
        facts.append(None)
        return True
    return _note_tensor("head_scale", norm.head_scale, facts, addresses)
