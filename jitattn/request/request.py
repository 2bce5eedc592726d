"""Caches requests, the validated form of calls, by all facts that validation depends on.

Calls with the same facts share a request and its cached plans; addresses are looked up at every
call. Unusual calls (numpy scalars, tensors that may have no address or no elements) are validated
every time. A batched call without tensors but q, k and v whose key count is new has a request
derived from that of another count.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from jitattn.errors import InternalError, WithoutMemoryError
from jitattn.request.facts import MASK, Addresses, Facts, facts_of, without_length
from jitattn.request.layouts import parse_any
from jitattn.request.outputs import check_out
from jitattn.request.scores import ADDED, added_of
from jitattn.values.masks import parts_of
from jitattn.values.sequences import Padded, Ragged
from jitattn.values.tensors import address_of, index_address

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import Problem

_MOST_REQUESTS: Final = 4096
#: Requests by the facts of a call, and one per kind of plain call for all key counts.
_requests: dict[Facts, Request] = {}


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
    facts = facts_of(q, k, v, call, addresses)
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
    return _checked(q, k, v, call, facts_of(q, k, v, call, addresses), addresses)


def _checked(
    q: Tensor, k: Tensor, v: Tensor, call: Call, facts: Facts | None, addresses: Addresses
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
        facts = facts_of(q, k, v, call, addresses)
    if facts is None:
        addresses = _addresses(q, k, v, call)
    elif parsed.has_memory:
        _make_room()
        _requests[facts] = request
        shorter = without_length(facts)
        if shorter is not None:
            _requests[shorter[0]] = request
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


def _longer(facts: Facts) -> Request | None:
    """Derive and keep the request of a call, given one of a like call with another key count."""
    shorter = without_length(facts)
    if shorter is None:
        return None
    but_length, num_keys = shorter
    known = _requests.get(but_length)
    if known is None:
        return None
    diagonal = known.diagonal
    if facts[MASK] == "bottom_right":
        diagonal += num_keys - known.len_kv
    if len(_requests) >= _MOST_REQUESTS:
        _make_room()
        _requests[but_length] = known
    request = _requests[facts] = known.with_keys(num_keys, diagonal)
    return request


def forget_requests() -> None:
    """Forget all requests and their plans: in a forked child, and in tests."""
    _requests.clear()


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
    if scores.function is not None:
        tensors |= {f"tensor{idx}": one for idx, one in enumerate(scores.function.tensors)}
    for name, tensor in tensors.items():
        if tensor is not None:
            found[name] = index_address(name, tensor)
    for side, seqs in (("q", call.q_seqs), ("kv", call.kv_seqs)):
        if seqs is not None:
            found[f"{side}_start"], found[f"{side}_stop"] = seqs.addresses()[:2]
    return found
