"""Random calls of dkernel's door with all their arguments, against dense fp64."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention

from . import compat_dkernel
from .compat_random import LIMITS, compare, near

#: Where sequences lie, as `check_dkernel` draws it.
DKERNEL = ("whole", "history", "more queries", "one query", "left", "right", "both", "packed",
           "packed, one query", "packed, some queries")  # fmt: skip
_LONGEST = 96


def check_dkernel(where: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """`SparseAttention` and `LocalStrideSparseAttention`."""
    chance = random.Random(f"{where} {seed}")
    generator = torch.Generator().manual_seed(seed)
    batch, dim = chance.choice((1, 2)), chance.choice((16, 24, 40))
    dim_v = chance.choice((dim, dim, 16))
    size, causal = chance.choice((16, 16, 32, 64, 256)), chance.random() < 0.6
    is_packed, is_padded = where.startswith("packed"), where in ("left", "right", "both")
    len_q, len_kv = _dkernel_lengths(chance, where, batch)
    counts = is_packed or is_padded  # rows of patterns, by positions
    common: dict[str, Any] = {
        "causal": causal,
        "seq_dim": chance.choice((None, 1, 2)),
        "block_m": chance.choice((None, 128)) if causal else None,
        "block_n": chance.choice((None, 16)),
        "d_splits": chance.choice((None, 2)),
        "inference": chance.choice((None, False)),
    }
    draw = _dkernel_rule if chance.random() < 0.5 else _dkernel_pattern
    lengths = (1, max(len_kv)) if counts else (len_q[0], len_kv[0])
    layer, pattern, (heads, heads_kv) = draw(chance, generator, size, lengths, counts, common)

    # Tensors are made as [B, L, H, D] or [total, H, D], leaves as the call has them.
    turned = common["seq_dim"] == 2 and not is_packed

    def leaf(own: tuple[int, ...], *rest: int) -> Tensor:
        shape = (sum(own), *rest) if is_packed else (batch, own[0], *rest)
        x = torch.randn(shape, generator=generator).to(device, dtype)
        return (x.transpose(1, 2).contiguous() if turned else x).requires_grad_()

    def straight(x: Tensor) -> Tensor:
        return x.transpose(1, 2) if turned else x

    def split(x: Tensor, *counts: int) -> tuple[Tensor, ...]:
        return x.split(counts, 1 if turned else x.dim() - 2)

    given: dict[str, Any] = {"sm_scale": chance.choice((None, 0, 0.2))}
    fused = chance.choice(("no", "kv", "qkv")) if dim == dim_v else "no"
    if fused == "qkv" and len_q == len_kv:
        sizes = (heads, heads_kv, heads_kv)
        leaves = [leaf(len_q, sum(sizes), dim)]
        given["split_qkv"] = lambda x: split(x, *sizes)
        q, k, v = (straight(x) for x in split(leaves[0], *sizes))
    elif fused == "kv":
        leaves = [leaf(len_q, heads, dim), leaf(len_kv, 2 * heads_kv, dim)]
        given["split_qkv"] = lambda x: split(x, heads_kv, heads_kv)
        q, (k, v) = straight(leaves[0]), map(straight, split(leaves[1], heads_kv, heads_kv))
    else:
        leaves = [leaf(len_q, heads, dim), leaf(len_kv, heads_kv, dim)]
        leaves.append(leaf(len_kv, heads_kv, dim_v))
        q, k, v = map(straight, leaves)
    parts = _dkernel_parts(chance, where, (len_q, len_kv), device, given)
    begin = 0
    if not counts:
        begin = compat_dkernel.first_row(pattern.shape[1:], len_q[0], len_kv[0], causal)
    pattern = pattern.repeat_interleave(heads // len(pattern), 0) if len(pattern) > 1 else pattern
    truth = torch.zeros(*q.shape[:-1], v.shape[-1], dtype=torch.float64, device=device)
    true_lse = torch.full(truth.shape[:-1], float("-inf"), dtype=torch.float64, device=device)
    for rows, keys in parts:
        truth[rows], lse = compat_dkernel.dense(
            q[rows], k[keys], v[keys], pattern, size, causal, given["sm_scale"], begin
        )
        true_lse[rows] = lse.transpose(0, 1)
    true_lse = true_lse.transpose(-2, -1)
    found = layer(*leaves, return_lse=True, **given)
    compare(straight(found[0]), truth, leaves, dtype, (found[1], true_lse))
    with torch.no_grad():
        room = torch.full_like(found[0], 7.0)
        layer.kwargs["out"] = room
        assert layer(*leaves, **given) is room
    near(room, found[0], LIMITS[dtype])


def _dkernel_lengths(
    chance: random.Random, where: str, batch: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Queries and keys of each sequence; of 4-D tensors, as many in all of them."""
    if where.startswith("packed"):
        len_kv = (20, *(chance.choice((0, 1, 33, 70, _LONGEST)) for _ in range(batch - 1)))
        if where == "packed":
            return len_kv, len_kv
        if where == "packed, one query":
            return (1,) * batch, len_kv
        return (7, *(chance.choice((0, min(1, n), n // 2, n)) for n in len_kv[1:])), len_kv
    keys = chance.choice((33, 48, 70, _LONGEST))
    few = (1, 5, 17, 32, keys - 16)
    queries = {
        "whole": (keys,),
        "history": few,
        "more queries": (keys + 1, keys + 16, _LONGEST + 40),
        "one query": (1,),
    }
    len_q = chance.choice(queries.get(where, (keys, keys, *few)))
    if where == "more queries" and chance.random() < 0.3:
        len_q, keys = 64, chance.choice((1, 16, 40))
    return (len_q,) * batch, (keys,) * batch


def _dkernel_rule(
    chance: random.Random,
    generator: torch.Generator,
    size: int,
    lengths: tuple[int, int],
    counts: bool,
    common: dict[str, Any],
) -> tuple[SparseAttention, Tensor, tuple[int, int]]:
    """A local + stride module, its pattern [1 or heads, rows, columns], heads of q and of k."""
    del generator, counts
    causal, homo = common["causal"], chance.random() < 0.2
    all_kv, group = chance.choice((1, 2, 3)), chance.choice((1, 2))
    heads = all_kv * group
    stride = chance.choice((1, 2, 3, 5, 8))
    local: int | tuple[int, int] = chance.choice((1, 2, 3))
    if stride == 1 or not causal:
        local = chance.choice((0, local) if causal else (0, local, (1, 3), (2, 1)))
    given: dict[str, Any] = {
        "homo_head": homo,
        "num_dense_heads": 0 if homo else chance.choice((0, 0, 1)),
        "num_kv_heads": all_kv if group > 1 or chance.random() < 0.5 else None,
        "head_sliding_offset": chance.choice((0, 1, 3)),
        "active_head_range": None,
    }
    first, last = 0, heads
    if chance.random() < 0.3:
        first = chance.randrange(heads)
        last = chance.randint(first + 1, heads)
        given["active_head_range"] = (first, last)
    whole = first % group == last % group == 0 and chance.random() < 0.8
    # Room for all queries, where those that are more than keys count from the first row.
    longest = max(_LONGEST, lengths[0])
    layer = LocalStrideSparseAttention(heads, longest, size, local, stride, **given, **common)
    unit = max(size, 64, common["block_m"] or 1)
    blocks = -(-longest // unit) * unit // size
    both = local if isinstance(local, tuple) else (local, local)
    pattern = compat_dkernel.blocks(
        heads, blocks, blocks, both, stride,
        heads_kv=given["num_kv_heads"] or heads, offset=given["head_sliding_offset"],
        dense=given["num_dense_heads"], causal=causal, homo=homo,
    )  # fmt: skip
    pattern = pattern[first:last]
    return layer, pattern, (last - first, (last - first) // group if whole else last - first)


def _dkernel_pattern(
    chance: random.Random,
    generator: torch.Generator,
    size: int,
    lengths: tuple[int, int],
    counts: bool,
    common: dict[str, Any],
) -> tuple[SparseAttention, Tensor, tuple[int, int]]:
    """A module of any pattern, with a row for every query."""
    heads_kv = chance.choice((1, 2))
    heads = heads_kv * chance.choice((1, 3))
    len_q, len_kv = lengths
    fits: Callable[[int, int], bool] = lambda rows, columns: (  # noqa: E731
        len_kv - (0 if counts else compat_dkernel.first_row((rows, columns), *lengths, causal))
        <= rows * size
    )
    causal = common["causal"]
    most = -(-max(len_q, len_kv) // size) + 2
    columns = chance.randint(-(-len_kv // size), most)
    rows = chance.choice([rows for rows in range(1, most + 1) if fits(rows, columns)])
    pattern = torch.rand(chance.choice((1, heads_kv, heads)), rows, columns, generator=generator)
    pattern = pattern < 0.6
    kind = chance.choice((torch.bool, torch.uint8, torch.float16))
    as_given = pattern[0] if len(pattern) == 1 and chance.random() < 0.5 else pattern
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return SparseAttention(size, as_given.to(kind), **common), pattern, (heads, heads_kv)


def _dkernel_parts(
    chance: random.Random,
    where: str,
    lengths: tuple[tuple[int, ...], tuple[int, ...]],
    device: str,
    given: dict[str, Any],
) -> list[tuple[Any, Any]]:
    """Say where sequences lie; return the rows and keys of each."""
    (len_q, len_kv), batch = lengths, len(lengths[0])
    if where.startswith("packed"):
        cu = [torch.tensor([0, *own]).cumsum(0).to(device) for own in lengths]
        given["cu_seqlen_k"] = cu[1].to(chance.choice((torch.int32, torch.int64)))
        if where == "packed, some queries":
            given["cu_seqlen_q"] = cu[0].to(chance.choice((torch.int32, torch.int64)))
        starts = [x.tolist() for x in cu]
        return [
            tuple(slice(own[b], own[b + 1]) for own in starts)
            for b in range(batch)
        ]  # fmt: skip
    left, used = [0] * batch, list(len_kv)
    if where in ("left", "both"):
        left = [chance.choice((0, 3, 16, 32)) for _ in range(batch)]
        used = [len_kv[0] - n for n in left]
        place = chance.choice(("cpu", device))
        given["left_paddings"] = torch.tensor(left, dtype=torch.int32, device=place)
    if where in ("right", "both"):
        used = [chance.randint(int(b == 0), n) for b, n in enumerate(used)]
        given["seqlens"] = torch.tensor(used, device=chance.choice(("cpu", device)))
    parts = []
    for b, (begin, count) in enumerate(zip(left, used, strict=True)):
        keys = slice(begin, begin + count)
        is_alike = len_q == len_kv and where in ("left", "right", "both")
        parts.append(((b, keys if is_alike else slice(None)), (b, keys)))
    return parts
