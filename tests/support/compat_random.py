"""Checks random calls of the doors with all arguments against dense fp64 references."""

from __future__ import annotations

import random
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitattn.compat import flash_attn as flash
from jitattn.compat import flash_cosine_sim_attention as cosine
from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)

from . import compat_cosine, compat_dkernel, compat_fast_ops, compat_flash_attn
from .compare import rel_l2

#: Relative L2 tolerance of values; gradients may have twice the error.
LIMITS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 3e-2}
FLASH = ("func", "kvpacked_func", "qkvpacked_func", "varlen_func", "varlen_kvpacked_func",
         "varlen_qkvpacked_func")  # fmt: skip


def compare(
    result: Tensor,
    truth: Tensor,
    leaves: list[Tensor],
    dtype: torch.dtype,
    lses: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Compare values and the gradients of all leaves; with LSEs, gradients pass through both."""
    assert result.shape == truth.shape
    near(result, truth, LIMITS[dtype])
    results, truths = [result], [truth]
    if lses is not None:
        limit = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(lses[0], lses[1].float(), rtol=limit, atol=limit)
        results.append(lses[0])
        truths.append(lses[1])
    generator = torch.Generator().manual_seed(5)
    given = [torch.randn(x.shape, generator=generator).to(x) for x in results]
    got = torch.autograd.grad(results, leaves, given)
    wanted = torch.autograd.grad(truths, leaves, [x.double() for x in given])
    for one, other in zip(got, wanted, strict=True):
        near(one, other, 2 * LIMITS[dtype])


def near(one: Tensor, other: Tensor, limit: float) -> None:
    """Compare by relative L2 error, or by the largest difference if values are only rounding."""
    if one.numel():
        assert rel_l2(one, other) < limit or (one - other).abs().max() < limit / 2


def check_flash(name: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """Check one of FlashAttention's differentiable functions."""
    chance = random.Random(f"{name} {seed}")
    generator = torch.Generator().manual_seed(seed)
    batch, dim, heads_kv = chance.choice((1, 3)), chance.choice((8, 20, 64)), chance.choice((1, 2))
    is_packed, is_varlen = name.endswith("qkvpacked_func"), name.startswith("varlen")
    heads = heads_kv if is_packed else heads_kv * chance.choice((1, 3))
    lengths = [_lengths(chance, batch, is_varlen) for _ in range(2)]
    if is_packed:
        lengths[0] = lengths[1]
    len_q, len_kv = lengths

    def leaf(count: int, *rest: int) -> Tensor:
        x = torch.randn(count, *rest, dim, generator=generator).to(device, dtype)
        return x.requires_grad_()

    def shaped(x: Tensor, own: tuple[int, ...]) -> Tensor:
        return x if is_varlen else x.unflatten(0, (batch, own[0]))

    total_q, total_kv = sum(len_q), sum(len_kv)
    if is_packed:
        leaves = [leaf(total_kv, 3, heads)]
        q, k, v = leaves[0].unbind(1)
    elif "kvpacked" in name:
        leaves = [leaf(total_q, heads), leaf(total_kv, 2, heads_kv)]
        q, (k, v) = leaves[0], leaves[1].unbind(1)
    else:
        leaves = [leaf(total_q, heads), leaf(total_kv, heads_kv), leaf(total_kv, heads_kv)]
        q, k, v = leaves
    sides = [len_q] if is_packed else [len_q, *[len_kv] * (len(leaves) - 1)]
    arguments: list[Any] = [shaped(x, own) for x, own in zip(leaves, sides, strict=True)]
    parts = [slice(0, length) for length in len_kv]
    given: dict[str, Any] = {}
    if is_varlen:
        cu = [torch.tensor([0, *own], device=device).cumsum(0).int() for own in lengths]
        most = [max(own) for own in lengths]
        arguments += [cu[1], most[1]] if is_packed else [*cu, *most]
        if name == "varlen_func" and chance.random() < 0.5:
            used = [chance.randint(0, length) for length in len_kv]
            skipped = [chance.randint(0, length) for length in used]
            given["seqused_k"] = torch.tensor(used, dtype=torch.int32, device=device)
            given["leftpad_k"] = torch.tensor(skipped, dtype=torch.int32, device=device)
            parts = [slice(a, b) for a, b in zip(skipped, used, strict=True)]
    dropout_p = chance.choice((0.0, 0.0, 0.3))
    ours: dict[str, Any] = {
        "scale": chance.choice((None, 0.2)),
        "causal": chance.random() < 0.5,
        "window": (chance.choice((-1, 0, 7)), chance.choice((-1, 0, 5))),
        "softcap": chance.choice((0.0, 0.0, 3.0)),
        "keep_first": chance.choice((0, 2)),
        "force": chance.random() < 0.5,
    }
    slopes = None
    if chance.random() < 0.3:
        slopes = torch.rand((batch, heads) if seed % 2 else (heads,), generator=generator).to(
            device
        )
    wants = dropout_p > 0 or chance.random() < 0.5
    tail = (dropout_p, *ours.values(), slopes, chance.random() < 0.3, wants)
    found = getattr(flash, f"flash_attn_{name}")(*arguments, *tail, **given)
    out, lse, dmask = found if wants else (found, None, None)
    outs, lses = [], []
    starts = [[sum(own[:b]) for b in range(batch)] for own in lengths]
    for b, part in enumerate(parts):
        rows = slice(starts[0][b], starts[0][b] + len_q[b])
        keys = slice(starts[1][b] + part.start, starts[1][b] + part.stop)
        stays = None
        if dropout_p:
            stays = dmask[b, :, : len_q[b], : part.stop - part.start] >= 0
        own_slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        one, own_lse = compat_flash_attn.dense(
            q[rows], k[keys], v[keys], **ours, slopes=own_slopes, stays=stays, dropout_p=dropout_p,
            longest=max(len_kv),
        )  # fmt: skip
        outs.append(one)
        lses.append(own_lse)
    truth = torch.cat(outs)
    compare(out, truth if is_varlen else truth.view_as(out), leaves, dtype)
    if lse is not None:
        whole = torch.cat(lses, 1) if is_varlen else torch.stack(lses)
        limit = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(lse, whole.float(), rtol=limit, atol=limit)


def _lengths(chance: random.Random, batch: int, differ: bool) -> tuple[int, ...]:
    if differ:
        return tuple(chance.choice((0, 1, 5, 33, 70)) for _ in range(batch))
    return (chance.choice((1, 5, 33, 70)),) * batch


def check_flash_cache(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `flash_attn_with_kvcache`, with appending and rotary embedding."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, dim, heads_kv, room = 3, chance.choice((16, 64)), chance.choice((1, 2)), 48
    heads, num_new = heads_kv * chance.choice((1, 3)), chance.choice((0, 1, 4))
    len_q = num_new or chance.choice((1, 3))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dim, generator=generator).to(device, dtype)

    q = normal(batch, len_q, heads)
    new = [normal(batch, num_new, heads_kv) for _ in range(2)]
    is_number = chance.random() < 0.2
    used = [chance.randint(0, room - num_new) for _ in range(batch)]
    used = used[:1] * batch if is_number else used
    is_paged = chance.random() < 0.4
    lengths = torch.tensor(used, dtype=torch.int32, device=device)
    given: dict[str, Any] = {"cache_seqlens": used[0] if is_number else lengths}
    left = [0] * batch
    if is_paged:
        page = chance.choice((4, 16))
        count = batch * room // page
        caches = [normal(count, page, heads_kv) for _ in range(2)]
        table = torch.randperm(count, generator=generator).view(batch, -1).int().to(device)
        given["block_table"] = table

        def own(cache: Tensor, b: int) -> Tensor:
            return cache[table[b].long()].flatten(0, 1)
    else:
        rows = list(range(batch))
        is_named = chance.random() < 0.5
        caches = [normal(batch + 2 * is_named, room, heads_kv) for _ in range(2)]
        if is_named:
            rows = chance.sample(range(batch + 2), batch)
            given["cache_batch_idx"] = torch.tensor(rows, dtype=torch.int32, device=device)
        if chance.random() < 0.5:
            left = [chance.randint(0, length) for length in used]
            given["cache_leftpad"] = torch.tensor(left, dtype=torch.int32, device=device)

        def own(cache: Tensor, b: int) -> Tensor:
            return cache[rows[b]]

    ours: dict[str, Any] = {
        "scale": chance.choice((None, 0.2)),
        "causal": chance.random() < 0.6,
        "window": (chance.choice((-1, 3)), chance.choice((-1, 0))),
        "softcap": chance.choice((0.0, 3.0)),
        "keep_first": chance.choice((0, 2)),
        "force": chance.random() < 0.5,
    }
    histories = [[own(cache, b).clone() for b in range(batch)] for cache in caches]
    slopes = None
    if chance.random() < 0.3:
        shape = (batch, heads) if seed % 2 else (heads,)
        slopes = given["alibi_slopes"] = torch.rand(shape, generator=generator).to(device)
    turns = None
    if num_new:
        given |= {"k": new[0], "v": new[1]}
        if chance.random() < 0.5:
            columns, interleaved = chance.choice((16, dim)), chance.random() < 0.5
            angles = torch.rand(room, columns // 2, generator=generator) * 6.0
            tables = [table.to(device, dtype) for table in (angles.cos(), angles.sin())]
            given |= dict(zip(("rotary_cos", "rotary_sin"), tables, strict=True))
            given["rotary_interleaved"] = interleaved
            turns = (*tables, interleaved)
    names = ("softmax_scale", "causal", "window_size", "softcap", "keep_first", "force_fa_decode")
    out, lse = flash.flash_attn_with_kvcache(
        q, *caches, **given, **dict(zip(names, ours.values(), strict=True)),
        num_splits=chance.choice((0, 2)), return_softmax_lse=True,
    )  # fmt: skip
    for b in range(batch):
        stop, own_q, added = used[b] + num_new, q[b], [x[b] for x in new]
        if turns is not None:
            places = torch.arange(used[b], used[b] + len_q)
            is_local = ours["causal"] or max(ours["window"]) >= 0
            own_q = compat_flash_attn.turned(own_q, places if is_local else places[:1], *turns)
            added[0] = compat_flash_attn.turned(added[0], places[:num_new], *turns).to(dtype)
        for history, own_new, cache in zip(histories, added, caches, strict=True):
            history[b][used[b] : stop] = own_new
            near(own(cache, b), history[b], LIMITS[dtype])
        keys = [history[b][left[b] : stop] for history in histories]
        own_slopes = slopes if slopes is None or slopes.dim() == 1 else slopes[b]
        truth, true_lse = compat_flash_attn.dense(
            own_q, *keys, **ours, slopes=own_slopes, longest=room
        )
        near(out[b], truth, LIMITS[dtype])
        limit = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(lse[b], true_lse.float(), rtol=limit, atol=limit)


def check_cosine(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `flash_cosine_sim_attention` and its plain version."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim = chance.choice((1, 3)), chance.choice((1, 4)), chance.choice((16, 40, 80))
    len_q, len_kv = chance.choice((1, 33, 70)), chance.choice((20, 70))
    kind = chance.choice(("split", "single", "single v", "grouped", "merged"))
    front = (batch * heads,) if kind == "merged" else (batch, heads)
    kv_front = {
        "single": (batch,), "single v": (batch, 1), "grouped": (batch, max(1, heads // 2))
    }.get(kind, front)  # fmt: skip
    v_front = (batch,) if kind == "single v" else kv_front

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    leaves = [leaf(*front, len_q, dim), leaf(*kv_front, len_kv, dim), leaf(*v_front, len_kv, dim)]
    given: dict[str, Any] = {
        "scale": chance.choice((8, 3.5)),
        "groups": chance.choice((1, 4)),
        "causal": chance.random() < 0.5,
        "l2norm_qk": chance.random() < 0.8,
    }
    if not given["l2norm_qk"]:
        given |= {"scale": 0.3, "groups": 1}
    if chance.random() < 0.2:
        rows = chance.choice((1, 1 if kind == "merged" else heads))
        given["attn_bias"] = leaf(rows, 2 * chance.choice((0, 9, 100)) + 1)
        leaves.append(given["attn_bias"])
    elif chance.random() < 0.5:
        per_batch = kind == "merged" or chance.random() < 0.5
        rows = (batch * heads if kind == "merged" else batch) if per_batch else heads
        given["attn_bias"] = leaf(rows, len_q, len_kv)
        given["attn_bias_batch_dim"] = per_batch
        leaves.append(given["attn_bias"])
    if kind != "merged" and chance.random() < 0.5:
        keep = torch.rand(batch, len_kv, generator=generator) < 0.7
        given["mask"] = keep.to(device)
    truth = compat_cosine.dense(*leaves[:3], **given)
    compare(cosine.flash_cosine_sim_attention(*leaves[:3], **given), truth, leaves, dtype)
    if "mask" not in given or not given["causal"]:
        near(cosine.plain_cosine_sim_attention(*leaves[:3], **given), truth, 2 * LIMITS[dtype])


def check_fast_ops(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `flash_attn_triton`, and the class over batches and nested tensors."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, heads, dim = chance.choice((1, 3)), chance.choice((1, 3)), chance.choice((8, 24, 64))
    len_q, len_kv = chance.choice((1, 33, 70)), chance.choice((20, 70))

    def leaf(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, of).requires_grad_()

    sizes = ((batch, len_q), (batch, len_kv), (batch, len_kv))
    q, k, v = (leaf(*size, heads, dim) for size in sizes)
    leaves, bias = [q, k, v], None
    if chance.random() < 0.6:
        shape = (chance.choice((1, batch)), chance.choice((1, heads)), chance.choice((1, len_q)))
        bias = leaf(*shape, len_kv, of=chance.choice((dtype, torch.float32)))
        leaves.append(bias)
    causal, dropout_p = chance.random() < 0.5, chance.choice((0.0, 0.25))
    scale = chance.choice((None, 0, 0.2))
    torch.manual_seed(seed)
    out = flash_attn_triton(q, k, v, bias, causal, dropout_p, scale)
    torch.manual_seed(seed)
    stays = triton_dropout_mask(dropout_p, batch, heads, len_q, len_kv, device)
    factor = dim**0.5 * scale if scale else 1.0
    wide = [q.double() * factor, k.double(), v.double()]
    truth, _ = attention_ref(*wide, None, None, dropout_p, stays, causal, bias, upcast=False)
    compare(out, truth, leaves, dtype)

    turned = [x.transpose(1, 2) for x in (q, k, v)]
    truth, _ = attention_ref(
        *(x.double() for x in (q, k, v)), causal=causal, bias=bias, upcast=False
    )
    whole = FlashAttentionFunction.apply(*turned, bias, causal)
    compare(whole.transpose(1, 2), truth, leaves, dtype)

    _check_nested(chance, leaf, batch, heads, dim, dtype)


def _check_nested(
    chance: random.Random,
    leaf: Callable[..., Tensor],
    batch: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
) -> None:
    """Check the class over nested tensors, with a bias of the largest lengths and all gradients."""
    lengths = [[chance.choice((1, 7, 40)) for _ in range(batch)] for _ in range(2)]
    sides = [
        [leaf(heads, length, dim) for length in own] for own in (lengths[0], lengths[1], lengths[1])
    ]
    causal, layout = chance.random() < 0.5, chance.choice((torch.strided, torch.jagged))
    leaves, bias = [part for side in sides for part in side], None
    if chance.random() < 0.6:
        shape = (chance.choice((1, batch)), chance.choice((1, heads)))
        rows = chance.choice((1, max(lengths[0])))
        of = chance.choice((dtype, torch.float32))
        bias = leaf(*shape, rows, max(lengths[1]), of=of)
        leaves.append(bias)
    made = FlashAttentionFunction.apply(
        *(compat_fast_ops.nested(side, layout) for side in sides), bias, causal
    )
    assert made.layout is layout
    truths = []
    for b, one in enumerate(zip(*sides, strict=True)):
        wide = [x.double().transpose(0, 1)[None] for x in one]
        own = None
        if bias is not None:
            own = bias[b % bias.shape[0]][None, :, : lengths[0][b], : lengths[1][b]]
        truth, _ = attention_ref(*wide, causal=causal, bias=own, upcast=False)
        truths.append(truth[0])
    results = [part.transpose(0, 1) for part in made.unbind()]
    compare(torch.cat(results), torch.cat(truths), leaves, dtype)


#: Sequence layouts that `check_dkernel` draws from.
DKERNEL = ("whole", "history", "more queries", "one query", "left", "right", "both", "packed",
           "packed, one query", "packed, some queries")  # fmt: skip
_LONGEST = 96


def check_dkernel(where: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `SparseAttention` and `LocalStrideSparseAttention`."""
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
    """Draw the queries and keys of each sequence; equal for all sequences of 4-D tensors."""
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
    """Draw a local + stride module, its pattern [1 or heads, rows, columns], heads of q and k."""
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
    # Rows for all queries: if there are more queries than keys, they count from the first row.
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
    """Draw a module with a random pattern that has a row for every query."""
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
    """Add the sequence layout to the arguments; return the rows and keys of each sequence."""
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
