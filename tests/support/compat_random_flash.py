"""Random calls of FlashAttention's door with all their arguments, against dense fp64."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from jitattn.compat import flash_attn as flash

from . import compat_flash_attn
from .compat_random import LIMITS, compare, near

FLASH = ("func", "kvpacked_func", "qkvpacked_func", "varlen_func", "varlen_kvpacked_func",
         "varlen_qkvpacked_func")  # fmt: skip


def check_flash(name: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """One of FlashAttention's functions that have gradients."""
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
    """`flash_attn_with_kvcache`, with all that it appends and turns."""
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
