"""What a context-parallel call is made of: its arguments, their checks, what ranks must share."""

from __future__ import annotations

import dataclasses
import zlib
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, TypeAlias, get_args

import torch
from torch import Tensor

from jitattn.cpu.norm import unit_vectors
from jitattn.distributed.agreement import Signature
from jitattn.distributed.members import size_of
from jitattn.distributed.options import (
    Options,
    check_offset,
    numbers_of,
    packed_spans,
    split_mask,
)
from jitattn.distributed.pieces import Span
from jitattn.distributed.segments import count_of
from jitattn.errors import InternalError, InvalidInputError, UnsupportedError
from jitattn.request.problem import axes, check_alike
from jitattn.request.score_checks import softcap_of
from jitattn.values.dropout import check_state, threshold_of
from jitattn.values.norm import DEFAULT_SCALE, L2Norm, check_kind
from jitattn.values.rule_functions import Heads
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.distributed.members import Members
    from jitattn.distributed.segments import Segments
    from jitattn.distributed.sharding import Plan
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

Method: TypeAlias = Literal["auto", "ring", "allgather", "ulysses", "hybrid"]
_METHODS: Final = get_args(Method)


class Call(NamedTuple):
    """The arguments of a call, unchecked."""

    mask: Mask
    method: str
    plan: Plan | None
    scale: float | None
    layout: str
    gear: int | None
    out_dtype: torch.dtype | None
    num_splits: int | None
    return_lse: bool
    q_seqs: QSequences
    kv_seqs: KvSequences
    bias: Tensor | None
    relative_bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    dropout_p: float
    dropout_state: Tensor | None
    qk_norm: L2Norm | None
    score_mod: Callable[..., Any] | None
    q_offset: QOffset | None
    deterministic: bool
    tile_rows: int | None


def signature(q: Tensor, k: Tensor, v: Tensor, call: Call, members: Members) -> Signature:
    """Check this rank's arguments; return what other ranks' must equal, and its lengths."""
    check_alike(q, k, v)
    rule, padding, _ = split_mask(call.mask)
    is_flat = call.q_seqs is not None or call.kv_seqs is not None
    if call.bias is not None:
        raise UnsupportedError(
            "bias is a matrix of all pairs: a rank would need rows of all ranks' positions; say it "
            "as relative_bias or score_mod"
        )
    dims = 3 if is_flat else 4
    row, head = (0, 1) if is_flat else axes(call.layout)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != dims:
            raise InvalidInputError(
                f"{name} has shape {list(x.shape)}: it must have {dims} dimensions "
                + ("(rows, heads, head_dim) with packed sequences" if is_flat else "")
            )
    if k.shape[row] != v.shape[row] or k.shape[head] != v.shape[head]:
        raise InvalidInputError(f"k is {list(k.shape)} and v {list(v.shape)}: they must match")
    if not is_flat and not q.shape[0] == k.shape[0] == v.shape[0]:
        raise InvalidInputError(
            f"q, k and v have the batch sizes {q.shape[0]}, {k.shape[0]} and {v.shape[0]}"
        )
    if q.shape[-1] != k.shape[-1] or not k.shape[head] or q.shape[head] % k.shape[head]:
        raise InvalidInputError(
            f"q is {list(q.shape)} and k {list(k.shape)}: head_dim must be the same, and the heads "
            "of q a multiple of those of k"
        )
    _check_method(call, members, q.shape[head])
    _check_options(q, call, is_flat)
    check_offset(call.q_offset, rule, is_flat)
    if padding is not None and is_flat:
        raise UnsupportedError("KeyPadding with packed sequences: leave the rows out of q_seqs")
    _check_plan(call.plan, members, q.shape[row], k.shape[row])
    return Signature(_alike(q, k, v, call, row), (q.shape[row], k.shape[row]))


def _check_method(call: Call, members: Members, heads_q: int) -> None:
    method = call.method
    if method not in _METHODS:
        raise InvalidInputError(f"method={method!r}: it must be one of {', '.join(_METHODS)}")
    if members.is_mesh != (method == "hybrid") and method != "auto":
        raise InvalidInputError(
            f'method={method!r}: a mesh of two dimensions ("ring", "ulysses") is for "hybrid" '
            "alone, and it needs one with several ranks in each; pass method='auto'"
        )
    ranks = size_of(members.ulysses) if members.is_mesh else members.size
    if (method == "ulysses" or members.is_mesh) and heads_q < ranks:
        raise UnsupportedError(
            f"method={method!r} over {ranks} ranks with {heads_q} query heads: every rank needs "
            'one; pass method="ring"'
        )


def _check_options(q: Tensor, call: Call, is_flat: bool) -> None:
    check_kind(call.qk_norm)
    if call.softcap is not None:
        softcap_of(call.softcap)
    if call.out_dtype not in (None, q.dtype, torch.float32):
        raise UnsupportedError(
            f"out_dtype={call.out_dtype}: the result has the dtype of q ({q.dtype}) or float32"
        )
    if type(call.return_lse) is not bool:
        raise InvalidInputError(f"return_lse={call.return_lse!r}: it must be True or False")
    if is_flat:
        for name, seqs in (("q_seqs", call.q_seqs), ("kv_seqs", call.kv_seqs)):
            if not isinstance(seqs, Ragged):
                packed_spans(call.q_seqs, call.kv_seqs, (0, 0))
                raise InternalError(f"{name} was not refused")
    if not threshold_of(call.dropout_p):
        return
    if call.dropout_state is None:
        raise InvalidInputError(
            "dropout_p without dropout_state: ranks would draw different ones; make one with "
            "jitattn.dropout_state() and broadcast it"
        )
    check_state(call.dropout_state, q.device)


def _check_plan(plan: Plan | None, members: Members, rows: int, keys: int) -> None:
    if plan is None:
        return
    if (plan.ranks, plan.rank) != (members.size, members.rank):
        raise InvalidInputError(
            f"plan is of {plan.ranks} ranks, this being {plan.rank}: the call has {members.size}, "
            f"this being {members.rank}; make the plan for the same mesh or group"
        )
    for name, got in (("q", rows), ("k", keys)):
        if got != plan.local_length:
            raise InvalidInputError(
                f"{name} has {got} rows: the plan gives rank {plan.rank} {plan.local_length} of "
                f"{plan.length}; use shard(x, plan)"
            )


def _alike(q: Tensor, k: Tensor, v: Tensor, call: Call, row: int) -> dict[str, str]:
    """Return what must be equal on every rank, as text."""
    found = {}
    for name, x in (("q", q), ("k", k), ("v", v)):
        shape: list[Any] = list(x.shape)
        shape[row] = "rows"
        found[name] = f"{str(x.dtype).removeprefix('torch.')} {shape} on {x.device.type}"
    for name, value in call._asdict().items():
        if name == "plan":
            plan = call.plan
            found[name] = "None" if plan is None else f"{plan.layout} {_digest(plan.segments)}"
        else:
            found[name] = text_of(value)
    return found


def _digest(value: object) -> str:
    return f"{zlib.crc32(repr(value).encode()):08x}"


def text_of(value: Any) -> str:  # noqa: ANN401
    """Return a value as text that does not name this process's objects."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    if isinstance(value, Ragged):
        return f"Ragged of {value.batch} sequences {_digest(numbers_of(value))}"
    if dataclasses.is_dataclass(value):
        names = [one.name for one in dataclasses.fields(value)]
        inner = ", ".join(f"{name}={text_of(getattr(value, name))}" for name in names)
        return f"{type(value).__name__}({inner})"
    if isinstance(value, tuple):
        return f"({', '.join(map(text_of, value))})"
    if callable(value):
        return str(getattr(value, "__qualname__", type(value).__name__))
    return repr(value)


def options_of(
    q: Tensor, k: Tensor, call: Call, shards: tuple[tuple[Segments, ...], ...]
) -> tuple[Tensor, Tensor, Options]:
    """Return q and k, normalised if asked, and the options of the whole call."""
    rule, padding, function = split_mask(call.mask)
    totals = tuple(sum(map(count_of, side)) for side in shards)
    is_flat = call.q_seqs is not None
    if is_flat:
        spans = packed_spans(call.q_seqs, call.kv_seqs, (totals[0], totals[1]))
    else:
        spans = (Span(0, totals[0], 0, totals[1]),)
    if padding is not None and list(padding.keep.shape) != [q.shape[0], totals[1]]:
        raise InvalidInputError(
            f"KeyPadding has shape {list(padding.keep.shape)}: across ranks it is of the whole "
            f"sequence, [{q.shape[0]}, {totals[1]}]"
        )
    scale, norm = call.scale, call.qk_norm
    if norm is not None:
        scale = DEFAULT_SCALE if scale is None else scale
        q, k, norm = _normalized(q, k, norm)
    return q, k, Options(
        rule=rule,
        key_padding=padding,
        function=function,
        scale=scale,
        gear=call.gear,
        softcap=call.softcap,
        relative_bias=call.relative_bias,
        alibi_slopes=call.alibi_slopes,
        sinks=call.sinks,
        score_mod=call.score_mod,
        q_offset=call.q_offset,
        kept=None,
        qk_norm=norm,
        deterministic=call.deterministic,
        num_splits=call.num_splits,
        tile_rows=call.tile_rows,
        heads=Heads(q.shape[2], k.shape[2]),
        spans=spans,
        is_flat=is_flat,
        q_seqs=call.q_seqs,
        kv_seqs=call.kv_seqs,
    )  # fmt: skip


def _normalized(q: Tensor, k: Tensor, norm: L2Norm) -> tuple[Tensor, Tensor, L2Norm | None]:
    """Normalise q and k, each on its own rank; return what is left for kernels to know."""
    if not norm.normalize:
        return q, k, norm
    wide_q, wide_k = unit_vectors(q, norm.groups), unit_vectors(k, norm.groups)
    if norm.head_scale is None:
        return wide_q.to(q.dtype), wide_k.to(k.dtype), L2Norm(norm.groups, normalize=False)
    wide_q = wide_q * norm.head_scale.to(wide_q.dtype)[:, None]
    rest = None if norm.bound is None else L2Norm(norm.groups, None, norm.bound, normalize=False)
    return wide_q.to(q.dtype), wide_k.to(k.dtype), rest
