"""Caches requests, the validated form of calls, by all facts that validation depends on.

Validation reads shapes, strides, dtypes, devices, alignments and the values of masks and options,
never tensor contents or addresses. Calls with the same facts share a request and its cached plans;
addresses are looked up at every call. Unusual calls (numpy scalars, tensors that may have no
address or no elements) are validated every time.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeAlias

import torch

from jitattn.errors import InternalError, WithoutMemoryError
from jitattn.request.block_list_cache import identity_of
from jitattn.request.layouts import parse_any
from jitattn.request.outputs import check_out
from jitattn.request.scores import ADDED, NO_CHANGES, TABLES, added_of
from jitattn.values.gears import get_default_gear
from jitattn.values.masks import (
    BY_VALUE,
    BlockSparse,
    Both,
    Causal,
    Dense,
    Full,
    KeyPadding,
    PerHead,
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

#: Addresses by the plans' operand names. A run of a plan adds entries whose keys are no names.
Addresses: TypeAlias = dict[Any, Any]
_Facts: TypeAlias = tuple[Any, ...]

_NUMBERS: Final = frozenset((type(None), int, float))
_INTEGERS: Final = frozenset((type(None), int))
_SEQUENCES: Final = frozenset((Ragged, Padded, Paged))
_MOST_REQUESTS: Final = 4096
#: Requests by the facts of a call, and one per kind of plain call for all key counts.
_requests: dict[_Facts, Request] = {}
#: Number of facts of a call without options.
_NUM_PLAIN: Final = 11
#: Keys are counted in 32 bits.
_MAX_COUNT: Final = 2**31 - 1


class Request:
    """A validated call, without its tensors and addresses.

    Attributes
    ----------
    problem : Problem
        Facts that select the machine code.
    len_kv, diagonal : int
        As in the runtime.
    has_rows : bool
        Whether there is a row to compute.
    is_listed : bool
        Whether the mask is computed by block lists.
    base : Request, optional
        The request from which this one was derived: of a like call with another key count.
    plans : dict
        Cached plans, by the further facts that select them; maintained by `run`.
    plans_of_lengths : dict
        Those that serve all requests derived from this one; maintained by `run`.
    """

    __slots__ = ("_runtime", "base", "diagonal", "has_rows", "is_listed", "len_kv", "plans",
                 "plans_of_lengths", "problem")  # fmt: skip

    def __init__(self, problem: Problem, runtime: Runtime) -> None:
        self.problem = problem
        self.has_rows = runtime.batch * runtime.heads_q * runtime.len_q > 0
        self.is_listed = runtime.listed is not None
        self._runtime: Runtime | None = runtime._replace(listed=None)
        self.len_kv, self.diagonal = runtime.len_kv, runtime.diagonal
        self.base: Request | None = None
        self.plans: dict[Hashable, Any] = {}
        self.plans_of_lengths: dict[Hashable, Any] = {}

    def with_keys(self, len_kv: int, diagonal: int) -> Request:
        """Return the request of a like call without block lists, with another key count."""
        other = Request.__new__(Request)
        other.problem, other.has_rows, other.is_listed = self.problem, self.has_rows, False
        other.len_kv, other.diagonal = len_kv, diagonal
        other._runtime, other.base, other.plans = None, self, {}
        return other

    @property
    def runtime(self) -> Runtime:
        """Facts that do not select the machine code, without the rule of block lists.

        Addresses in it are those of the call that was validated first.
        """
        runtime = self._runtime
        if runtime is None:
            if self.base is None:
                raise InternalError("a request without sizes")
            runtime = self.base.runtime._replace(len_kv=self.len_kv, diagonal=self.diagonal)
            self._runtime = runtime
        return runtime

    def runtime_of(self, call: Call) -> Runtime:
        """Return the runtime with the block-list rule of a call."""
        if not self.is_listed:
            return self.runtime
        return self.runtime._replace(listed=parts_of(call.mask).rule)


class Found(NamedTuple):
    """A request with the addresses of one call."""

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
    facts = _facts(q, k, v, call, addresses)
    if facts is not None:
        request = _requests.get(facts) or _longer(facts)
        if request is not None and call.out is None:  # the fast path
            return request, addresses
    request, addresses, has_memory = _checked(q, k, v, call, facts, addresses)
    if not has_memory:
        raise WithoutMemoryError
    return request, addresses


def find(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Found:
    """Return the request of a call as `request_of` does, but accept placeholders."""
    addresses: Addresses = {}
    return _checked(q, k, v, call, _facts(q, k, v, call, addresses), addresses)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, call: Call, facts: _Facts | None, addresses: Addresses
) -> Found:
    """Return the cached request of these facts, or validate the call."""
    request = None if facts is None else _requests.get(facts) or _longer(facts)
    if request is not None:
        if call.out is not None:  # it may alias an input
            shape = (*q.shape[:-1], v.shape[-1])
            check_out(call.out, (q, k, v), shape, call.out_dtype or q.dtype)
        return Found(request, addresses, True)
    seqs = [one for one in (call.q_seqs, call.kv_seqs) if isinstance(one, Ragged)]
    was_known = all(one.knows_max_length() for one in seqs)
    parsed = parse_any(q, k, v, call)
    request = Request(parsed.problem, parsed.runtime)
    if parsed.has_memory and not was_known:
        # The longest of the ragged sequences is computed by the validation itself.
        facts = _facts(q, k, v, call, addresses)
    if facts is None:
        addresses = _addresses(q, k, v, call)
    elif parsed.has_memory:
        _make_room()
        _requests[facts] = request
        but_length = _without_length(facts)
        if but_length is not None:
            _requests[but_length] = request
    return Found(request, addresses, parsed.has_memory)


def _make_room() -> None:
    """Forget requests if there are too many, those of other key counts first."""
    if len(_requests) + 2 <= _MOST_REQUESTS:
        return
    for facts, request in list(_requests.items()):
        if request.base is not None:
            _requests.pop(facts, None)
    if len(_requests) > _MOST_REQUESTS // 2:
        forget_requests()


def _without_length(facts: _Facts) -> _Facts | None:
    """Return the facts of a plain call without its key count; None for any other call.

    Calls with fewer than two keys are excluded: one key has no row stride, none has no kernel.
    """
    if len(facts) != _NUM_PLAIN:
        return None
    dtype, index, of_q, of_k, of_v, steps_q, steps_k, steps_v, alignment, gear, mask = facts
    if not len(of_k) == len(of_v) == 4:
        return None
    batch, num_keys, heads, dim = of_k
    batch_v, num_values, heads_v, dim_v = of_v
    if not 1 < num_keys == num_values <= _MAX_COUNT:
        return None
    batch_step, row, head, step = steps_k
    batch_step_v, row_v, head_v, step_v = steps_v
    if batch <= 1:  # the step to another sequence is of no account
        batch_step = batch_step_v = None
    return (
        dtype, index, of_q, batch, heads, dim, batch_v, heads_v, dim_v, steps_q, batch_step, row,
        head, step, batch_step_v, row_v, head_v, step_v, alignment, gear, mask,
    )  # fmt: skip


def _longer(facts: _Facts) -> Request | None:
    """Derive and keep the request of a plain call, given one with another key count."""
    but_length = _without_length(facts)
    known = None if but_length is None else _requests.get(but_length)
    if known is None or but_length is None:
        return None
    num_keys, diagonal = facts[3][1], known.diagonal
    if facts[-1] == "bottom_right":
        diagonal += num_keys - known.len_kv
    if len(_requests) >= _MOST_REQUESTS:
        _make_room()
        _requests[but_length] = known
    request = _requests[facts] = known.with_keys(num_keys, diagonal)
    return request


def forget_requests() -> None:
    """Forget all requests and their plans: in a forked child, and in tests."""
    _requests.clear()


def _facts(q: Tensor, k: Tensor, v: Tensor, call: Call, addresses: Addresses) -> _Facts | None:
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
        facts: _Facts = (
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
    # Types come first: 2.0 and True equal 2 and 1 as dictionary keys.
    if not (
        type(scale) in _NUMBERS
        and type(gear) in _INTEGERS
        and type(num_splits) in _INTEGERS
        and type(tile_rows) in _INTEGERS
        and (out_dtype is None or type(out_dtype) is torch.dtype)
        and type(return_lse) is bool
        and type(layout) is str
    ):
        return None
    more: list[Any] = [
        scale, layout, gear, out_dtype, num_splits, tile_rows, out is None, q_seqs is None,
        kv_seqs is None, scores is NO_CHANGES,
    ]  # fmt: skip
    try:
        if (
            (kind is Full or kind is Causal or _note_mask(mask, more, addresses))
            and (out is None or _note_tensor("out", out, more, addresses))
            and (q_seqs is None or _note_sequences("q", q_seqs, more, addresses))
            and (kv_seqs is None or _note_sequences("kv", kv_seqs, more, addresses))
            and (scores is NO_CHANGES or _note_scores(scores, more, addresses))
        ):
            return (*facts, *more)
    except (AttributeError, RuntimeError):  # as above
        pass
    return None


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
    if isinstance(mask, PerHead) and kind is PerHead:
        known: dict[Hashable, int] = {}  # GQA packing depends on which rules are equal
        facts += (known.setdefault(identity_of(rule), len(known)) for rule in mask.rules)
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
    side: str,
    seqs: Any,  # noqa: ANN401 - any value
    facts: list[Any],
    addresses: Addresses,
) -> bool:
    kind = type(seqs)
    if kind not in _SEQUENCES:
        return False
    longest, is_length = seqs._max_length, seqs.stop_is_length
    if kind is Ragged and longest is None:  # validation computes it
        return False
    cumulative = seqs.cumulative
    if cumulative is None:
        start, stop = seqs._start, seqs._stop
    else:
        start = stop = cumulative
    if type(stop) not in PLAIN:
        return False
    at_stop, dtype = stop.data_ptr(), stop.dtype
    at_start = 0
    if start is not None:
        if type(start) not in PLAIN:
            return False
        at_start = start.data_ptr()
        if at_start < LOW_ADDRESS:
            return False
    if at_stop < LOW_ADDRESS:
        return False
    if cumulative is not None:
        at_stop += cumulative.element_size()
    addresses[f"{side}_start"], addresses[f"{side}_stop"] = at_start, at_stop
    facts += (
        kind, cumulative is None, start is None, dtype, stop.get_device(), stop.shape, longest,
        is_length,
    )  # fmt: skip
    if kind is Ragged:
        return True
    table = seqs.block_table if kind is Paged else seqs.batch_idx
    if table is None:
        facts.append(None)
        return True
    return _note_tensor("block_table", table, facts, addresses)


def _note_scores(scores: Scores, facts: list[Any], addresses: Addresses) -> bool:
    bias, relative, slopes, softcap, sinks, dropout, norm = scores
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


def _addresses(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Addresses:
    """Return the addresses of a validated call; negative for placeholders."""
    found = {name: address_of(name, x) for name, x in (("q", q), ("k", k), ("v", v))}
    if call.out is not None:
        found["out"] = address_of("out", call.out)
    parts = parts_of(call.mask)
    scores = call.scores
    tensors = {
        "key_padding": None if parts.key_padding is None else parts.key_padding.keep,
        "dense": None if parts.dense is None else parts.dense.keep,
        **dict(zip(ADDED, added_of(scores), strict=True)),
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
