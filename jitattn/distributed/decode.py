"""`decode_attention`: a few queries over a cache whose keys several ranks share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from jitattn.api.attention import attention
from jitattn.api.merge import merge
from jitattn.distributed.agreement import Signature, agree
from jitattn.distributed.attention import beside_sinks
from jitattn.distributed.call import text_of
from jitattn.distributed.compute import wide_dtype
from jitattn.distributed.members import host_group, members_of
from jitattn.distributed.options import split_mask
from jitattn.distributed.rules import bounds_of
from jitattn.distributed.transfers import gone
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.problem import axes, check_alike
from jitattn.values.masks import Causal, Full, MaskMod
from jitattn.values.rule_functions import Heads, pattern_of
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences

_FULL: Final = Full()


@torch.compiler.disable  # type: ignore[untyped-decorator]
def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    kv_seqs: KvSequences = None,
    kv_start: int | Tensor = 0,
    q_start: int | Tensor | None = None,
    mesh: DeviceMesh | None = None,
    group: ProcessGroup | None = None,
    mask: Mask = _FULL,
    scale: float | None = None,
    layout: str = "bshd",
    gear: int | None = None,
    out_dtype: torch.dtype | None = None,
    num_splits: int | None = None,
    return_lse: bool = False,
    alibi_slopes: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None = None,
) -> Any:  # noqa: ANN401 - out, or out and LSE
    """Compute attention of the same queries to keys that are spread over ranks.

    Each rank attends to its own keys; then all gather each other's results and merge them by LSE,
    in the order of ranks and in fp32, so that the result is bitwise equal on all ranks. One
    transfer of (Dv + 1) * 4 bytes per row and head from every rank.

    Parameters
    ----------
    q : Tensor, [B, Lq, Hq, D]
        Equal on all ranks.
    k, v : Tensor, [B, Lkv, Hkv, D or Dv], or pages with `kv_seqs`
        This rank's keys and values; ranks may have different numbers, or none.
    kv_seqs : Padded, Paged or Ragged, optional
        Where this rank's keys lie: lengths and block table are its own.
    kv_start : int or Tensor [B]
        Number of this rank's first key in each whole sequence.
    q_start : int or Tensor [B], optional
        Number of the first query in each whole sequence. Left out, queries are the last rows, and a
        mask that depends on positions costs a small sum over ranks.
    mesh, group
        As in `context_parallel_attention`; a mesh of one dimension.
    mask : Mask
        Of positions in the whole sequence: Full, Causal, Window, LocalStride, BlockSparse, PerHead
        or MaskMod, and products of these. Queries count from `q_start` in all of them.
    sinks : Tensor, [Hq], optional
        Counted once.
    alibi_slopes, score_mod
        As in `attention`, of positions in the whole sequence.
    scale, layout, gear, out_dtype, num_splits, return_lse, softcap
        As in `attention`.

    Returns
    -------
    out : Tensor, [B, Lq, Hq, Dv]
        The same on all ranks; 0 for rows that see no key on any.
    lse : Tensor, [B, Hq, Lq], fp32
        Over the keys of all ranks. Only with ``return_lse``.

    Raises
    ------
    InvalidInputError, UnsupportedError
        As `context_parallel_attention`.
    CommunicationError
        A rank has gone, or did not take part.

    Notes
    -----
    No gradients. The queries of a rank without keys cost nothing but the merge.

    Examples
    --------
    >>> import torch, jitattn
    >>> from jitattn.distributed import decode_attention
    >>> q, k, v = torch.randn(2, 1, 8, 64), *torch.randn(2, 2, 100, 2, 64)
    >>> decode_attention(q, k, v).shape
    torch.Size([2, 1, 8, 64])
    """
    members = members_of(mesh, group)
    whole = members.whole
    if whole is not None:
        agree(
            whole,
            lambda: _signature(q, k, v, mask, layout, out_dtype, sinks, kv_seqs),
            each_time=False,
        )
    else:
        _signature(q, k, v, mask, layout, out_dtype, sinks, kv_seqs)
    with torch.no_grad():
        bounds = bounds_of(split_mask(mask)[0])
        single_causal = isinstance(mask, Causal) and _rows(q, layout) == 1 and q_start is None
        needs_positions = not (
            (bounds.left is None and bounds.right is None and isinstance(mask, Full))
            or single_causal
        )
        needs_positions |= alibi_slopes is not None or score_mod is not None
        own_mask: Mask = _FULL
        score = None
        if needs_positions:
            if q_start is None:
                q_start = _last_rows(q, k, kv_seqs, layout, whole)
            heads = Heads(q.shape[axes(layout)[1]], _kv_heads(k, kv_seqs, layout))
            own_mask = _mask_at(mask, heads, q_start, kv_start, _rows(q, layout) == 1)
            score = _score_at(score_mod, alibi_slopes, q_start, kv_start)
        given: dict[str, Any] = {
            "mask": own_mask,
            "score_mod": score,
            "scale": scale,
            "layout": layout,
            "gear": gear,
            "num_splits": num_splits,
            "kv_seqs": kv_seqs,
            "softcap": softcap,
        }
        out, lse = attention(q, k, v, **given, out_dtype=wide_dtype(q.dtype), return_lse=True)
        if whole is not None:
            out, lse = _merged(out, lse, layout, whole)
        if sinks is not None:
            by_row = out if layout == "bshd" else out.transpose(1, 2)
            by_row = beside_sinks(by_row, lse, sinks)
            out = by_row if layout == "bshd" else by_row.transpose(1, 2)
        out = out.to(q.dtype if out_dtype is None else out_dtype)
    return (out, lse) if return_lse else out


def _rows(q: Tensor, layout: str) -> int:
    return q.shape[axes(layout)[0]]


def _kv_heads(k: Tensor, kv_seqs: KvSequences, layout: str) -> int:
    if isinstance(kv_seqs, Ragged):
        return k.shape[1]
    return k.shape[2] if isinstance(kv_seqs, Paged) else k.shape[axes(layout)[1]]


def _signature(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    layout: str,
    out_dtype: torch.dtype | None,
    sinks: Tensor | None,
    kv_seqs: KvSequences,
) -> Signature:
    """Check what the queries of ranks must share."""
    check_alike(q, k, v)
    _, padding, _ = split_mask(mask)
    if padding is not None:
        raise UnsupportedError(
            "mask has KeyPadding: say how many keys this rank has with kv_seqs=Padded(length)"
        )
    if q.dim() != 4:
        raise InvalidInputError(f"q has shape {list(q.shape)}: it must be [B, Lq, Hq, D]")
    axes(layout)
    heads = _kv_heads(k, kv_seqs, layout)
    alike = {
        "q": f"{q.dtype} {list(q.shape)}",
        "v": f"head_dim {v.shape[-1]}",
        "k": f"{heads} heads",
        "mask": text_of(mask),
        "out_dtype": str(out_dtype),
        "sinks": text_of(sinks),
    }
    return Signature(alike, (0, 0))


def _last_rows(
    q: Tensor, k: Tensor, kv_seqs: KvSequences, layout: str, group: ProcessGroup | None
) -> int | Tensor:
    """Return the number of the first query if queries are the last rows of all keys."""
    rows = _rows(q, layout)
    if isinstance(kv_seqs, Padded | Paged | Ragged):
        total = kv_seqs.length.to(torch.int32).clone()
    else:
        total = torch.tensor([k.shape[axes(layout)[0]]], dtype=torch.int32, device=q.device)
        total = total.expand(q.shape[0]).contiguous()
    if group is not None:
        _reduced(total, group)
    return total - rows


def _reduced(total: Tensor, group: ProcessGroup) -> None:
    try:
        dist.all_reduce(total, group=group)
    except RuntimeError as error:
        raise gone("the sum of lengths", error) from error


def _mask_at(
    mask: Mask, heads: Heads, q_start: int | Tensor, kv_start: int | Tensor, is_single: bool
) -> Mask:
    """Return a mask as a function of this rank's rows and keys."""
    rule, _, function = split_mask(mask)
    device = next((x.device for x in (q_start, kv_start) if isinstance(x, torch.Tensor)), None)
    found: MaskMod | None = None
    pattern = pattern_of(rule, heads, device)
    bounds = bounds_of(rule)
    left, right, keep_first = bounds[:3]
    is_bounded = left is not None or right is not None
    if pattern is not None:
        found = MaskMod(
            lambda b, h, q_idx, kv_idx: pattern(
                h, _plus(q_idx, q_start, b), _plus(kv_idx, kv_start, b), False
            )
        )
    elif is_bounded:
        if bounds.full_on_decode and is_single:
            left = None
        found = MaskMod(
            lambda b, h, q_idx, kv_idx: _between(
                _plus(q_idx, q_start, b), _plus(kv_idx, kv_start, b), left, right, keep_first
            )
        )
    if function is not None:
        moved = _function_at(function, q_start, kv_start)
        found = moved if found is None else found.both(moved)
    return _FULL if found is None else found


def _function_at(mask: MaskMod, q_start: int | Tensor, kv_start: int | Tensor) -> MaskMod:
    kind, parts = mask.parts
    if kind:
        moved = [_function_at(one, q_start, kv_start) for one in parts]
        if kind == "not":
            return ~moved[0]
        return moved[0].both(moved[1]) if kind == "and" else moved[0] | moved[1]
    function = mask.function
    return MaskMod(
        lambda b, h, q_idx, kv_idx: function(
            b, h, _plus(q_idx, q_start, b), _plus(kv_idx, kv_start, b)
        )
    )


def _plus(index: Any, start: Any, b: Any) -> Any:  # noqa: ANN401 - symbols
    """Return an index from a start on, which may differ by sequence."""
    return index + (start if isinstance(start, int) else start[b])


def _between(
    position: Any,  # noqa: ANN401 - symbols
    key: Any,  # noqa: ANN401
    left: int | None,
    right: int | None,
    keep_first: int,
) -> Any:  # noqa: ANN401
    seen = key >= 0
    if left is not None:
        seen = (key >= position - left) | (key < keep_first)
    return seen if right is None else seen & (key <= position + right)


def _score_at(
    function: Callable[..., Any] | None,
    slopes: Tensor | None,
    q_start: int | Tensor | None,
    kv_start: int | Tensor,
) -> Callable[..., Any] | None:
    """Return slopes and a score function as a function of this rank's rows and keys."""
    if function is None and slopes is None:
        return None
    by_batch = slopes is not None and slopes.dim() == 2

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        position, key = _plus(q_idx, q_start, b), _plus(kv_idx, kv_start, b)
        if slopes is not None:
            s = s - (slopes[b, h] if by_batch else slopes[h]) * (key - position).abs()
        return s if function is None else function(s, b, h, position, key)

    return score


def _merged(out: Tensor, lse: Tensor, layout: str, group: ProcessGroup) -> tuple[Tensor, Tensor]:
    """Gather the ranks' results, out and LSE side by side, and merge them in the ranks' order."""
    by_row = lse.transpose(1, 2) if layout == "bshd" else lse
    own = torch.cat([out, by_row[..., None]], dim=-1).contiguous()
    host_group(group)  # of NCCL: connected before its first transfer
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(group))]
    try:
        dist.all_gather(parts, own, group=group)
    except RuntimeError as error:
        raise gone("the merge of a decoding step", error) from error
    outs = [one[..., :-1].contiguous() for one in parts]
    lses = [one[..., -1] for one in parts]
    if layout == "bshd":
        lses = [one.transpose(1, 2) for one in lses]
    return merge(outs, [one.contiguous() for one in lses], layout=layout)
