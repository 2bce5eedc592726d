"""Requests: calls checked once, and found again by the facts that every check depends on.

A check reads shapes, strides, dtypes, devices, alignments and the values of masks and options, and
nothing else: never contents, nor addresses. Calls with the same facts get the same request, and
with it the plans that are kept there. Addresses are looked up at every call. A call that is out of
the ordinary (a number of numpy's, an address that may be none, a tensor without elements) is
checked anew every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from jitattn.errors import WithoutMemoryError
from jitattn.request.block_list_cache import identity_of
from jitattn.request.layouts import parse_any
from jitattn.request.outputs import check_out
from jitattn.request.scores import NO_CHANGES
from jitattn.values.gears import get_default_gear
from jitattn.values.masks import (
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    PerHead,
    Window,
    parts_of,
)
from jitattn.values.norm import L2Norm
from jitattn.values.sequences import Padded, Paged, Ragged
from jitattn.values.tensors import LOW_ADDRESS, PLAIN, address_of, index_address

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.request.scores import Scores
    from jitattn.spec.kernel_spec import Problem
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

#: By the names that plans have for operands of a call.
Addresses: TypeAlias = dict[str, int]
_Facts: TypeAlias = "tuple[Hashable, ...]"

#: Masks that are equal by value.
_BY_VALUE: Final = frozenset((Full, Causal, Window, LocalStride))
_NUMBERS: Final = frozenset((type(None), int, float))
_MOST_REQUESTS: Final = 4096
_requests: dict[_Facts, Request] = {}


class Request:
    """A call that was checked: what it asks for, without tensors and addresses.

    Attributes
    ----------
    problem : Problem
        What changes machine code.
    runtime : Runtime
        What does not, without the rule that block lists are of. Addresses in it are of the call
        that was checked first.
    is_listed : bool
        The mask comes as block lists.
    plans : dict
        Plans by what else decides them; `run` keeps them here.
    """

    __slots__ = ("is_listed", "plans", "problem", "runtime")

    def __init__(self, problem: Problem, runtime: Runtime) -> None:
        self.problem = problem
        self.is_listed = runtime.listed is not None
        self.runtime = runtime._replace(listed=None)
        self.plans: dict[Hashable, Any] = {}

    def runtime_of(self, call: Call) -> Runtime:
        """Return the runtime with the rule of a call."""
        if not self.is_listed:
            return self.runtime
        return self.runtime._replace(listed=parts_of(call.mask).rule)


class Found(NamedTuple):
    """A request, and the addresses of one call."""

    request: Request
    addresses: Addresses
    has_memory: bool  #: no tensor is a placeholder, or one of a transform on a GPU


def request_of(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Request, Addresses]:
    """Return the request of a call, and the addresses of its tensors.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule. The message gives argument and value, the rule, the way out.
    UnsupportedError
        The request is legal, but nothing computes it yet: a gear, a dtype, a device.
    WithoutMemoryError
        A tensor is a placeholder, or is inside a transform and on a GPU.
    """
    addresses: Addresses = {}
    if call.out is None:  # the usual call, at little cost
        facts = _facts(q, k, v, call, addresses)
        known = None if facts is None else _requests.get(facts)
        if known is not None:
            return known, addresses
    request, addresses, has_memory = find(q, k, v, call)
    if not has_memory:
        raise WithoutMemoryError
    return request, addresses


def find(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Found:
    """Return the request of a call as `request_of` does, of placeholders too."""
    addresses: Addresses = {}
    facts = _facts(q, k, v, call, addresses)
    request = None if facts is None else _requests.get(facts)
    if request is not None:
        if call.out is not None:  # its memory may lie in that of an input
            shape = (*q.shape[:-1], v.shape[-1])
            check_out(call.out, (q, k, v), shape, call.out_dtype or q.dtype)
        return Found(request, addresses, True)
    parsed = parse_any(q, k, v, call)
    request = Request(parsed.problem, parsed.runtime)
    if facts is None:
        addresses = _addresses(q, k, v, call)
    elif parsed.has_memory:
        if len(_requests) >= _MOST_REQUESTS:
            _requests.clear()
        # Found out by the check itself: the largest length of ragged sequences.
        _requests[_facts(q, k, v, call, addresses) or facts] = request
    return Found(request, addresses, parsed.has_memory)


def forget_requests() -> None:
    """Forget all requests and their plans: in a forked child, and in tests."""
    _requests.clear()


def _facts(q: Tensor, k: Tensor, v: Tensor, call: Call, addresses: Addresses) -> _Facts | None:
    """Return what every check of a call depends on, and note addresses; None: check it anew."""
    mask, scale, layout, gear, out, out_dtype, num_splits, return_lse, q_seqs, kv_seqs = call[:10]
    tile_rows = call.tile_rows
    is_usual = (
        (scale is None or type(scale) in _NUMBERS)
        and (gear is None or type(gear) is int)
        and (num_splits is None or type(num_splits) is int)
        and (tile_rows is None or type(tile_rows) is int)
        and (out_dtype is None or type(out_dtype) is torch.dtype)
        and type(return_lse) is bool
        and type(layout) is str
    )
    if not is_usual or type(q) not in PLAIN or type(k) not in PLAIN or type(v) not in PLAIN:
        return None
    try:
        at_q, at_k, at_v = q.data_ptr(), k.data_ptr(), v.data_ptr()
        if at_q < LOW_ADDRESS or at_k < LOW_ADDRESS or at_v < LOW_ADDRESS:
            return None
        if q.is_neg() or k.is_neg() or v.is_neg():
            return None
        facts: list[Any] = [
            q.dtype, k.dtype, v.dtype, q.get_device(), k.get_device(), v.get_device(),
            q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
            (at_q | at_k | at_v) & 15, scale, layout,
            get_default_gear() if gear is None else gear, gear is None,
            out_dtype, num_splits, tile_rows,
            (out is None, q_seqs is None, kv_seqs is None, call.scores is NO_CHANGES),
        ]  # fmt: skip
    except (AttributeError, RuntimeError):  # no tensors; sparse, nested, inside a transform
        return None
    addresses["q"], addresses["k"], addresses["v"] = at_q, at_k, at_v
    if type(mask) in _BY_VALUE:
        facts.append(mask)
    elif not _note_mask(mask, facts, addresses):
        return None
    if out is not None and not _note_tensor("out", out, facts, addresses):
        return None
    if q_seqs is not None and not _note_sequences("q", q_seqs, facts, addresses):
        return None
    if kv_seqs is not None and not _note_sequences("kv", kv_seqs, facts, addresses):
        return None
    if call.scores is not NO_CHANGES and not _note_scores(call.scores, facts, addresses):
        return None
    return tuple(facts)


def _note_tensor(
    name: str,
    tensor: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    """Note the facts of a tensor, or that there is none; return whether it is an ordinary one."""
    if tensor is None:
        facts.append(None)
        return True
    if type(tensor) not in PLAIN:  # some warn when asked for an address
        return False
    try:
        address = tensor.data_ptr()
        if address < LOW_ADDRESS or tensor.is_neg():
            return False
        facts += [tensor.dtype, tensor.get_device(), tensor.shape, tensor.stride(), address & 15]
    except (AttributeError, RuntimeError):
        return False
    addresses[name] = address
    return True


def _note_matrix(
    name: str,
    tensor: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    """Note a tensor that is read in pieces of 16 bytes, of which the last may end beyond it."""
    if not _note_tensor(name, tensor, facts, addresses):
        return False
    if tensor is not None:
        rest = tensor.untyped_storage().nbytes() - tensor.storage_offset() * tensor.element_size()
        facts.append(rest)
    return True


def _note_mask(mask: Mask, facts: list[Any], addresses: Addresses) -> bool:
    kind: type[Any] = type(mask)
    facts.append(kind)
    if kind in _BY_VALUE:
        facts.append(mask)
        return True
    if isinstance(mask, KeyPadding) and kind is KeyPadding:
        return _note_tensor("key_padding", mask.keep, facts, addresses)
    if isinstance(mask, Dense) and kind is Dense:
        return _note_matrix("dense", mask.keep, facts, addresses)
    if isinstance(mask, BlockSparse) and kind is BlockSparse:
        facts += [mask.block_size, mask.causal, mask.first_row]
        return _note_tensor("pattern", mask.pattern, facts, addresses)
    if isinstance(mask, PerHead) and kind is PerHead:
        known: dict[Hashable, int] = {}  # which rules are the same decides how heads are packed
        facts += [known.setdefault(identity_of(rule), len(known)) for rule in mask.rules]
        return all(_note_mask(rule, facts, addresses) for rule in mask.rules)
    if isinstance(mask, Both) and kind is Both:
        parts = (mask.rule, mask.key_padding, mask.dense)
        for part in parts:
            if part is None:
                facts.append(None)
            elif not _note_mask(part, facts, addresses):
                return False
        return True
    return False


def _note_sequences(
    side: str, seqs: QSequences | KvSequences, facts: list[Any], addresses: Addresses
) -> bool:
    if not isinstance(seqs, Ragged | Padded | Paged):
        return False
    if isinstance(seqs, Ragged) and not seqs.knows_max_length():
        return False
    first, stop, words, kind = seqs.addresses()
    if stop < LOW_ADDRESS or 0 < first < LOW_ADDRESS:
        return False
    addresses[f"{side}_start"], addresses[f"{side}_stop"] = first, stop
    facts += [
        type(seqs), first == 0, words, kind, seqs.batch, seqs.device, seqs._max_length,
        seqs.stop_is_length,
    ]  # fmt: skip
    if isinstance(seqs, Paged):
        return _note_tensor("block_table", seqs.block_table, facts, addresses)
    if isinstance(seqs, Padded):
        return _note_tensor("block_table", seqs.batch_idx, facts, addresses)
    return True


def _note_scores(scores: Scores, facts: list[Any], addresses: Addresses) -> bool:
    bias, relative, slopes, softcap, sinks, dropout, norm = scores
    if type(softcap) not in _NUMBERS:
        return False
    facts.append(softcap)
    if not _note_matrix("bias", bias, facts, addresses):
        return False
    tables = {"relative_bias": relative, "alibi_slopes": slopes, "sinks": sinks}
    for name, table in tables.items():
        if not _note_tensor(name, table, facts, addresses):
            return False
    if dropout is None:
        facts.append(None)
    else:
        if not _note_tensor("dropout_state", dropout.state, facts, addresses):
            return False
        facts.append(dropout.threshold)
    if norm is None:
        facts.append(None)
        return True
    if type(norm) is not L2Norm:
        return False
    facts += [norm.groups, norm.bound, norm.normalize]
    return _note_tensor("head_scale", norm.head_scale, facts, addresses)


def _addresses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Addresses:
    """Return the addresses of a call that `parse_any` has checked; negative for placeholders."""
    found = {name: address_of(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if call.out is not None:
        found["out"] = address_of("out", call.out)
    parts = parts_of(call.mask)
    scores = call.scores
    tensors = {
        "key_padding": None if parts.key_padding is None else parts.key_padding.keep,
        "dense": None if parts.dense is None else parts.dense.keep,
        "bias": scores.bias,
        "relative_bias": scores.relative_bias,
        "alibi_slopes": scores.alibi_slopes,
        "sinks": scores.sinks,
        "dropout_state": None if scores.dropout is None else scores.dropout.state,
        "block_table": getattr(call.kv_seqs, "block_table", None),
    }
    if isinstance(call.kv_seqs, Padded):
        tensors["block_table"] = call.kv_seqs.batch_idx
    for name, tensor in tensors.items():
        if tensor is not None:
            found[name] = index_address(name, tensor)
    for side, seqs in (("q", call.q_seqs), ("kv", call.kv_seqs)):
        if seqs is not None:
            found[f"{side}_start"], found[f"{side}_stop"] = seqs.addresses()[:2]
    return found
