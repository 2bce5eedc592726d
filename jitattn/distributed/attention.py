"""`context_parallel_attention`: attention over a sequence that several ranks share."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from jitattn.api.attention import attention
from jitattn.distributed import dtensor
from jitattn.distributed.agreement import agree
from jitattn.distributed.blocks import Facts, blocks_of
from jitattn.distributed.call import Call, Method, options_of, signature
from jitattn.distributed.compute import wide_dtype
from jitattn.distributed.dropout import after_dropout, dropped
from jitattn.distributed.heads import Exchange, head_ranges, read_heads, to_heads, to_rows
from jitattn.distributed.members import host_group, members_of, rank_of, size_of
from jitattn.distributed.options import Options
from jitattn.distributed.ring import job_of, ring_attention
from jitattn.distributed.segments import contiguous, count_of, together
from jitattn.distributed.whole import is_native, whole_attention
from jitattn.errors import InternalError
from jitattn.values.autocast import outside_autocast
from jitattn.values.dropout import threshold_of
from jitattn.values.masks import Full
from jitattn.values.norm import L2Norm

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from jitattn.distributed.members import Members
    from jitattn.distributed.segments import Segments
    from jitattn.distributed.sharding import Plan
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

_FULL: Final = Full()
#: Up to this many ranks, all keys and values are gathered at once.
_FEW_RANKS: Final = 4


@torch.compiler.disable  # type: ignore[untyped-decorator]
def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    mask: Mask = _FULL,
    method: Method = "auto",
    plan: Plan | None = None,
    scale: float | None = None,
    layout: str = "bshd",
    gear: int | None = None,
    out_dtype: torch.dtype | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    q_seqs: QSequences = None,
    kv_seqs: KvSequences = None,
    bias: Tensor | None = None,
    relative_bias: Tensor | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_state: Tensor | None = None,
    qk_norm: L2Norm | None = None,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
    q_offset: QOffset | None = None,
    deterministic: bool = False,
    tile_rows: int | None = None,
) -> Any:  # noqa: ANN401 - out, or out and LSE
    """Compute exact attention over a sequence that the ranks of a group share.

    Each rank passes its rows of q, k and v and gets its rows of the result, as `jitattn.attention`
    would compute them of the whole sequence, forward and backward.

    Parameters
    ----------
    q : Tensor, [B, rows, Hq, D]
        This rank's rows; or a DTensor whose placement is Shard of the sequence dimension, as k and
        v then, on `mesh` or its own; the results are DTensors too. Ranks' lengths may differ, and a
        rank may hold none. Packed sequences: [rows, Hq, D].
    k, v : Tensor, [B, keys, Hkv, D or Dv]
        This rank's keys and values.
    mesh : DeviceMesh, optional
        Of one dimension; or of two, ("ring", "ulysses"), for ``method="hybrid"``: a rank's number
        is ring rank * size of ulysses + ulysses rank.
    group : ProcessGroup, default the default group
        In place of `mesh`. Without any group, or with one rank, this is `attention`.
    mask : Mask
        Of the whole sequence: positions are global, and `KeyPadding` is [B, all keys], in order of
        positions. `Dense` is refused.
    method : "auto", "ring", "allgather", "ulysses" or "hybrid"
        Ring: the other ranks' keys arrive one rank's after the other's while the previous ones are
        computed with; keys that no local row sees do not travel. All-gather: as a ring, but all at
        once, while the rank's own keys are computed with. Ulysses: ranks exchange rows for heads,
        and compute all rows of theirs; Hq must be at least the number of ranks. Hybrid: Ulysses
        along one dimension of a mesh and a ring along the other. Auto: hybrid for a mesh of two
        dimensions; Ulysses where its shards are contiguous, kv heads divide by ranks, and the mask
        is not even so; else all-gather up to 4 ranks, and ring.
    plan : Plan, optional
        The layout of the shards, made by `jitattn.distributed.plan`; q and k are laid out alike.
        Without it, shards are contiguous, in the order of ranks.
    q_seqs, kv_seqs : Ragged, optional
        Packed sequences in the rows of all ranks, one after another and apart; the same on every
        rank. Lengths are read from the device once for each value.
    sinks : Tensor, [Hq], optional
        Counted once.
    relative_bias, alibi_slopes, score_mod, q_offset
        As in `attention`, of positions in the whole sequence. `q_offset` is the position of the
        first query of the whole sequence; across ranks, a tensor moves functions only.
    dropout_p, dropout_state
        The same state on every rank, which is required; bits are those of `attention` of the whole
        sequence, whatever the method. It takes twice the time and more: one call of all keys, one
        of the kept ones, whose bits a traced function draws.
    deterministic : bool
        Make dq bitwise reproducible too. All else always is, for the same method, plan and ranks.
    scale, layout, gear, out_dtype, num_splits, return_lse, softcap, qk_norm, tile_rows
        As in `attention`.

    Returns
    -------
    out : Tensor, [B, rows, Hq, Dv]
        This rank's rows.
    lse : Tensor, [B, Hq, rows], or [Hq, rows] of packed sequences; fp32
        Only with ``return_lse``.

    Raises
    ------
    InvalidInputError, UnsupportedError
        On all ranks: an argument breaks a rule, or differs between ranks. With a plan, ranks are
        compared when a rank makes a call that it has not made before (with ``JITATTN_DEBUG=1``,
        at every call); without one, at every call.
    CommunicationError
        A rank has gone, or made no such call within the group's timeout.

    Notes
    -----
    Gradients of q, k and v are those of this rank's rows of the whole; those of `sinks`,
    `relative_bias`, `alibi_slopes` and captured tensors are this rank's part, to be summed over
    ranks, as for every parameter. First derivatives only. Under torch.compile the call is a break
    in the graph. Papers: Liu et al., arXiv:2310.01889 (ring); Jacobs et al., arXiv:2309.14509
    (Ulysses); Brandon et al., arXiv:2311.09431 (stripes).

    Examples
    --------
    >>> import torch, jitattn
    >>> from jitattn.distributed import context_parallel_attention
    >>> q = k = v = torch.randn(1, 64, 4, 32)
    >>> context_parallel_attention(q, k, v, mask=jitattn.Causal()).shape
    torch.Size([1, 64, 4, 32])
    """
    if dtensor.are_dtensors(q, k, v):
        local, mesh = dtensor.to_local(q, k, v, mesh, layout, q_seqs)
        wrap = dtensor.wrapper(q, v, layout, q_seqs)
    else:
        local, wrap = (q, k, v), None
    local = _in_autocast(local)
    call = Call(
        mask, method, plan, scale, layout, gear, out_dtype, num_splits, return_lse, q_seqs,
        kv_seqs, bias, relative_bias, alibi_slopes, softcap, sinks, dropout_p, dropout_state,
        qk_norm, score_mod, q_offset, deterministic, tile_rows,
    )  # fmt: skip
    members = members_of(mesh, group)
    found = _alone(*local, call) if members.size == 1 else _shared(*local, call, members)
    return found if wrap is None else wrap(found)


def _in_autocast(tensors: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Cast q, k and v as autocast asks, if they are tensors of torch."""
    first = tensors[0]
    if not isinstance(first, Tensor) or first.dtype is torch.float64:
        return tensors
    kind = first.device.type
    if not torch.is_autocast_enabled(kind):
        return tensors
    q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in tensors)
    return q, k, v


def _alone(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:  # noqa: ANN401
    """Compute the call of a single rank."""
    given = call._asdict()
    for name in ("method", "plan"):
        del given[name]
    if call.q_offset is None:
        del given["q_offset"]
    return attention(q, k, v, **given)


@outside_autocast
def _shared(q: Tensor, k: Tensor, v: Tensor, call: Call, members: Members) -> Any:  # noqa: ANN401
    """Compute the call of several ranks."""
    whole = members.whole
    if whole is None:
        raise InternalError("several ranks without a group")
    lengths = agree(whole, lambda: signature(q, k, v, call, members), each_time=call.plan is None)
    if call.plan is not None:
        rows = keys = call.plan.segments
    elif lengths is not None:
        rows, keys = (contiguous([one[side] for one in lengths]) for side in (0, 1))
    else:
        raise InternalError("lengths of other ranks are not known")
    is_flat = call.q_seqs is not None
    if not is_flat and call.layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    elif is_flat:
        q, k, v = (x[None] for x in (q, k, v))
    q, k, options = options_of(q, k, call, (rows, keys))
    out_dtype = q.dtype if call.out_dtype is None else call.out_dtype
    method = _method(call, members, options, rows)
    run = functools.partial(_run, q, k, v, method=method, members=members, shards=(rows, keys))
    threshold, state = threshold_of(call.dropout_p), call.dropout_state
    lse: Tensor | None
    if threshold and state is not None:
        out, lse = _with_dropout(run, options, threshold, state, out_dtype)
    else:
        out, lse = run(options, return_lse=call.return_lse, out_dtype=out_dtype)
    if is_flat:
        out, lse = out[0], None if lse is None else lse[0]
    elif call.layout == "bhsd":
        out = out.transpose(1, 2)
    out = out.contiguous()
    return (out, lse) if call.return_lse else out


def _with_dropout(
    run: Callable[..., tuple[Tensor, Tensor | None]],
    options: Options,
    threshold: int,
    state: Tensor,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute a call with dropout, by one of all keys and one of those that it keeps."""
    drop = dropped(threshold, state, options.heads.heads_q)
    plain = options._replace(sinks=None)
    _, lse = run(plain, return_lse=True, out_dtype=out_dtype)
    kept, lse_kept = run(plain._replace(kept=drop.kept), return_lse=True, out_dtype=out_dtype)
    if lse is None or lse_kept is None:
        raise InternalError("the LSE is missing")
    out = after_dropout(kept, lse_kept, lse, drop.scale)
    if options.sinks is not None:
        out = beside_sinks(out, lse, options.sinks)
    return out, lse


def beside_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """Return out [B, L, H, D] with sinks [H]: the others keep sigmoid(lse - sink) of the weight."""
    left = torch.sigmoid(lse - sinks.to(lse.dtype)[None, :, None])
    return (out * left.transpose(1, 2)[..., None]).to(out.dtype)


def _method(call: Call, members: Members, options: Options, rows: tuple[Segments, ...]) -> str:
    """Choose a method for "auto"."""
    if call.method != "auto":
        return call.method
    if members.is_mesh:
        return "hybrid"
    size, heads = members.size, options.heads
    is_contiguous = rows == contiguous([count_of(one) for one in rows])
    bounds = options.bounds
    is_even = bounds.right is None or bounds.left is not None
    if is_contiguous and not is_even and heads.heads_kv % size == 0:
        return "ulysses"
    return "allgather" if size <= _FEW_RANKS else "ring"


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    *,
    method: str,
    members: Members,
    shards: tuple[tuple[Segments, ...], tuple[Segments, ...]],
    return_lse: bool,
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor | None]:
    """Compute out [B, rows, Hq, Dv] and LSE [B, Hq, rows]."""
    if method in ("ring", "allgather"):
        return _over_ring(q, k, v, options, method, members.whole, shards, out_dtype)
    group = members.whole if method == "ulysses" else members.ulysses
    if group is None:
        raise InternalError(f"{method} without a group")
    size, rank = size_of(group), rank_of(group)
    ring = None if method == "ulysses" else members.ring
    for one in (group, ring):
        if one is not None:
            host_group(one)  # of NCCL: connected before its first transfer between some ranks
    # The shards of the ranks along the dimension of heads, for each rank of the ring.
    by_ring = [
        [side[idx * size : (idx + 1) * size] for idx in range(size_of(ring))] for side in shards
    ]
    here = rank_of(ring)
    ranges = head_ranges(options.heads.heads_q, options.heads.heads_kv, size)
    own = ranges[rank]
    of_q = Exchange(group, rank, tuple(by_ring[0][here]), tuple(one[:2] for one in ranges))
    of_kv = Exchange(group, rank, tuple(by_ring[1][here]), tuple(one[2:] for one in ranges))
    q, k, v = to_heads((q, k, v), (of_q, of_kv, of_kv))
    reads = read_heads(own, options.heads.heads_q // options.heads.heads_kv)
    if reads is not None:  # its query heads read kv heads unevenly: one for each
        k, v = (torch.stack([x[:, :, idx] for idx in reads], dim=2) for x in (k, v))
    whole = tuple(tuple(together(tuple(one)) for one in side) for side in by_ring)
    options = options.of_heads(own.first, own.size, own.first_kv, k.shape[2], reads is None)
    out, lse = _over_ring(q, k, v, options, "ring", ring, (whole[0], whole[1]), out_dtype)
    if not return_lse:
        return to_rows((out,), (of_q,))[0], None
    out, wide = to_rows((out, lse.transpose(1, 2)[..., None]), (of_q, of_q))
    return out, wide[..., 0].transpose(1, 2).contiguous()


def _over_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    method: str,
    group: ProcessGroup | None,
    shards: tuple[tuple[Segments, ...], tuple[Segments, ...]],
    out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Compute attention to the keys of the ranks of a ring, or of this rank alone; add sinks."""
    rows, keys = shards
    are_whole = all(side[0] == contiguous([count_of(side[0])])[0] for side in shards)
    if group is None and are_whole and is_native(options):
        return whole_attention(q, k, v, options, out_dtype)
    own_dtype = out_dtype if options.sinks is None else wide_dtype(q.dtype)
    facts = Facts(
        rows, keys, options.bounds, options.spans, options.is_flat, options.depends_on_distance,
        options.follows_order, method,
    )  # fmt: skip
    blocks = blocks_of(facts, rank_of(group))
    job = job_of(group, blocks, options, own_dtype, rank_of(group))
    out, lse = ring_attention(q, k, v, job)
    if options.sinks is not None:
        out = beside_sinks(out, lse, options.sinks).to(out_dtype)
    return out, lse
