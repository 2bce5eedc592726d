"""Random calls of the doors of FlashAttention 3 and 4 against dense fp64, forward and backward."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitattn.compat import flash_attn_interface as fa3
from jitattn.compat.flash_attn import cute as fa4

from .compat_dense import around, dense
from .compat_flash_attn import turned
from .compat_random import LIMITS, compare, near

FA3 = ("func", "qkvpacked", "qkvpacked heads", "varlen", "varlen used")
FA4 = ("func", "varlen", "varlen used", "padded", "pages", "functions")
PAGE = 4


class Drawn:
    """Lengths, leaves and options of a call."""

    def __init__(self, name: str, seed: int, dtype: torch.dtype, device: str) -> None:
        self.chance = chance = random.Random(f"{name} {seed}")
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device
        self.batch, self.heads_kv = chance.choice((1, 3)), chance.choice((1, 2))
        self.dim, self.dim_v = chance.choice((8, 20, 64)), chance.choice((16, 64))
        self.heads = self.heads_kv * chance.choice((1, 3))
        is_one = name not in ("varlen", "varlen used")
        self.len_q, self.len_kv = (self._lengths(is_one) for _ in range(2))
        if "packed" in name:
            self.len_kv, self.dim_v = self.len_q, self.dim
            self.heads = self.heads if "heads" in name else self.heads_kv

    def _lengths(self, is_one: bool) -> list[int]:
        if is_one:
            return [self.chance.choice((1, 5, 33, 70))] * self.batch
        return [self.chance.choice((0, 1, 5, 33, 70)) for _ in range(self.batch)]

    def leaf(self, *shape: int) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.device, self.dtype).requires_grad_()

    def ints(self, *numbers: int) -> Tensor:
        return torch.tensor(numbers, dtype=torch.int32, device=self.device)

    def cu(self, lengths: list[int]) -> Tensor:
        return torch.tensor([0, *lengths], device=self.device).cumsum(0).int()

    def flat(self) -> list[Tensor]:
        """Leaves one sequence after another."""
        total, total_k = sum(self.len_q), sum(self.len_kv)
        return [
            self.leaf(total, self.heads, self.dim),
            self.leaf(total_k, self.heads_kv, self.dim),
            self.leaf(total_k, self.heads_kv, self.dim_v),
        ]

    def check(
        self,
        out: Tensor,
        lse: Tensor | None,
        leaves: list[Tensor],
        truth_of: Callable[[int, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
        qkv: list[Tensor],
        used: tuple[list[int], list[int]] | None = None,
    ) -> None:
        """Compare a result with the truth of each sequence, of which some rows may be used."""
        outs, lses, q_row, k_row = [], [], 0, 0
        used_q, used_k = used or (self.len_q, self.len_kv)
        for b, (len_q, len_kv) in enumerate(zip(self.len_q, self.len_kv, strict=True)):
            own_q = qkv[0][q_row : q_row + used_q[b]]
            own_k, own_v = (x[k_row : k_row + used_k[b]] for x in qkv[1:])
            one, own_lse = truth_of(b, own_q[None], own_k[None], own_v[None])
            rest = len_q - used_q[b]
            outs.append(torch.nn.functional.pad(one[0], (0, 0, 0, 0, 0, rest)))
            lses.append(torch.nn.functional.pad(own_lse[0], (0, rest), value=float("-inf")))
            q_row, k_row = q_row + len_q, k_row + len_kv
        nothing = 0.0 * sum(x.double().sum() for x in leaves)
        truth, true_lse = torch.cat(outs) + nothing, torch.cat(lses, 1) + nothing
        if out.dim() == 4:
            true_lse = torch.stack(true_lse.split(self.len_q[0], 1))
        lses_of_both = None if lse is None else (lse, true_lse)
        compare(out, truth.view_as(out), leaves, self.dtype, lses_of_both)


def check_fa3(name: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """Check one of FlashAttention 3's functions that have gradients."""
    call = Drawn(name, seed, dtype, device)
    chance = call.chance
    given: dict[str, Any] = {
        "softmax_scale": chance.choice((None, 0.2)),
        "causal": chance.random() < 0.5,
        "window_size": (chance.choice((-1, -1, 0, 7)), chance.choice((-1, -1, 0, 5))),
        "attention_chunk": chance.choice((0, 0, 8)),
        "softcap": chance.choice((0.0, 0.0, 3.0)),
        "deterministic": chance.random() < 0.3,
        "sm_margin": chance.choice((0, 4)),
    }

    def truth_of(b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (None if x < 0 else x for x in given["window_size"])
        right = 0 if given["causal"] else right
        size = given["attention_chunk"]
        seen = around(q.shape[1], k.shape[1], left, right, chunk=size, device=device)
        return dense(q, k, v, seen, scale=given["softmax_scale"], softcap=given["softcap"])

    if "packed" in name:
        total = sum(call.len_q)
        shape = (call.heads + 2 * call.heads_kv,) if "heads" in name else (3, call.heads)
        leaf = call.leaf(total, *shape, call.dim)
        sizes = [call.heads, call.heads_kv, call.heads_kv]
        qkv = list(leaf.split(sizes, 1) if "heads" in name else leaf.unbind(1))
        more = {"num_heads_q": call.heads} if "heads" in name else {}
        batched = leaf.unflatten(0, (call.batch, -1))
        found = fa3.flash_attn_qkvpacked_func(batched, **given, **more, return_attn_probs=True)
        call.check(*found, [leaf], truth_of, qkv)
        return
    leaves = call.flat()
    steering = {"num_splits": chance.choice((0, 1, 3)), "pack_gqa": chance.choice((None, True))}
    if name == "func":
        batched = [x.unflatten(0, (call.batch, -1)) for x in leaves]
        found = fa3.flash_attn_func(*batched, **given, **steering, return_attn_probs=True)
        assert torch.equal(fa3.flash_attn_func(*batched, **given), found[0])
        call.check(*found, leaves, truth_of, leaves)
        return
    used, more = None, {}
    if name == "varlen used":
        used = ([chance.randint(0, x) for x in call.len_q], [chance.randint(0, x) for x in
                                                              call.len_kv])  # fmt: skip
        more = {"seqused_q": call.ints(*used[0]), "seqused_k": call.ints(*used[1])}
    lengths = (call.cu(call.len_q), call.cu(call.len_kv), max(call.len_q), max(call.len_kv))
    found = fa3.flash_attn_varlen_func(
        *leaves, *lengths, **more, **given, **steering, return_attn_probs=True
    )
    call.check(*found, leaves, truth_of, leaves, used)


def check_fa3_cache(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `flash_attn_with_kvcache` with new keys, rotary tables, pages and packed queries."""
    call = Drawn("cache", seed, dtype, device)
    chance, batch, room = call.chance, 3, 48
    is_packed, has_new = chance.random() < 0.4, chance.random() < 0.6
    lengths = [chance.choice((1, 2, 5)) for _ in range(batch)] if is_packed else (
        [chance.choice((1, 4))] * batch)  # fmt: skip
    q = call.leaf(sum(lengths), call.heads, call.dim).detach()
    new = [call.leaf(sum(lengths), call.heads_kv, d).detach() for d in (call.dim, call.dim_v)]
    used = [chance.randint(5, room - 5) for _ in range(batch)]
    given: dict[str, Any] = {"cache_seqlens": call.ints(*used)}
    if chance.random() < 0.5:
        table = torch.randperm(batch * room // PAGE, generator=call.generator).view(batch, -1)
        given["page_table"] = table.int().to(device)
        shape = (batch * room // PAGE, PAGE)
        rows = (table[:, :, None] * PAGE + torch.arange(PAGE)).flatten(1).to(device)
    else:
        shape, rows = (batch, room), torch.arange(batch * room, device=device).view(batch, -1)
    caches = [call.leaf(*shape, call.heads_kv, d).detach() for d in (call.dim, call.dim_v)]
    histories = [cache.flatten(0, 1)[rows] for cache in caches]
    options = {
        "causal": chance.random() < 0.6,
        "window_size": (chance.choice((-1, 7)), chance.choice((-1, 2))),
        "attention_chunk": chance.choice((0, 0, 8)),
        "softcap": chance.choice((0.0, 2.0)),
    }
    turns: tuple[Any, ...] | None = None
    parts = [slice(sum(lengths[:b]), sum(lengths[: b + 1])) for b in range(batch)]

    def shaped(x: Tensor) -> Tensor:
        return x if is_packed else x.unflatten(0, (batch, -1))

    if is_packed:
        given |= {"cu_seqlens_q": call.cu(lengths), "max_seqlen_q": max(lengths)}
    if has_new:
        given |= {"k": shaped(new[0]), "v": shaped(new[1])}
        if is_packed:
            given["cu_seqlens_k_new"] = given["cu_seqlens_q"]
        if chance.random() < 0.5 and call.dim >= 16:
            angles = torch.rand(room + 8, 8, generator=call.generator) * 6.0
            tables = [x.to(device, dtype) for x in (angles.cos(), angles.sin())]
            given |= {"rotary_cos": tables[0], "rotary_sin": tables[1]}
            given["rotary_interleaved"] = chance.random() < 0.5
            turns = (*tables, given["rotary_interleaved"])
    out, lse = fa3.flash_attn_with_kvcache(
        shaped(q), *caches, **given, **options, return_softmax_lse=True
    )
    for b, part in enumerate(parts):
        own_q, stop = q[part], used[b] + (lengths[b] if has_new else 0)
        added = [x[part] for x in new]
        if turns is not None:
            places = torch.arange(used[b], used[b] + lengths[b])
            is_full = not options["causal"] and max(*options["window_size"], -1) < 0
            is_full = is_full and not options["attention_chunk"]
            own_q = turned(own_q, places[:1] if is_full else places, *turns)
            added[0] = turned(added[0], places, *turns).to(dtype)
        for history, own_new, cache in zip(histories, added, caches, strict=True):
            if has_new:
                history[b, used[b] : stop] = own_new
            near(cache.flatten(0, 1)[rows[b]], history[b], LIMITS[dtype])
        left, right = (None if x < 0 else x for x in options["window_size"])
        right, size = 0 if options["causal"] else right, options["attention_chunk"]
        seen = around(lengths[b], stop, left, right, chunk=size, device=device)
        keys = [history[b : b + 1, :stop] for history in histories]
        truth, true_lse = dense(own_q[None], *keys, seen, softcap=options["softcap"])
        own_out, own_lse = (out[part], lse[:, part]) if is_packed else (out[b], lse[b])
        near(own_out, truth[0], LIMITS[dtype])
        limit = 1e-4 if dtype is torch.float32 else 2e-2
        torch.testing.assert_close(own_lse, true_lse[0].float(), rtol=limit, atol=limit)


def check_fa4(name: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """Check FlashAttention 4's functions over each layout of sequences."""
    call = Drawn(name, seed, dtype, device)
    chance = call.chance
    bounds = (None, None, -1, 0, 5)
    given: dict[str, Any] = {
        "softmax_scale": chance.choice((None, 0.2)),
        "causal": chance.random() < 0.5,
        "window_size": (chance.choice(bounds), chance.choice(bounds)),
        "softcap": chance.choice((0.0, 0.0, 3.0)),
        "pack_gqa": chance.choice((None, False)),
        "num_splits": chance.choice((1, 3)),
    }
    leaves = call.flat()
    every, sinks = list(leaves), None
    if chance.random() < 0.4:
        sinks = given["learnable_sink"] = call.leaf(call.heads)
        every.append(sinks)
    slope = chance.uniform(0.1, 0.5)
    if name == "functions":
        given["score_mod"] = lambda score, b, h, i, j: score - slope * (i - j) * (h + 1)
        if chance.random() < 0.5:
            given["mask_mod"] = lambda b, h, i, j: (i + j + b) % 3 != 0

    def truth_of(b: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        left, right = (None if x is None or x < 0 else x for x in given["window_size"])
        right = 0 if given["causal"] else right
        seen, bias = around(q.shape[1], k.shape[1], left, right, device=device), None
        if name == "functions":
            i = torch.arange(q.shape[1], device=device)[:, None]
            j = torch.arange(k.shape[1], device=device)
            heads = torch.arange(1, call.heads + 1, device=device)[:, None, None]
            bias = -slope * (i - j) * heads
            seen = (i + j + b) % 3 != 0 if "mask_mod" in given else seen
        numbers = {"scale": given["softmax_scale"], "softcap": given["softcap"]}
        out, lse = dense(q, k, v, seen, bias=bias, sinks=sinks, **numbers)
        return out, lse if sinks is None else torch.logaddexp(lse, sinks.double()[:, None])

    batched = [x.unflatten(0, (call.batch, -1)) for x in leaves] if "varlen" not in name else []
    if name in ("func", "functions"):
        out, nothing = fa4.flash_attn_func(*batched, **given)
        found = fa4.flash_attn_func(*batched, **given, return_lse=True)
        assert nothing is None
        assert torch.equal(found[0], out)
        call.check(*found, every, truth_of, leaves)
        return
    used = None
    more: dict[str, Any] = {}
    if name in ("varlen used", "padded"):
        used = ([chance.randint(0, x) for x in call.len_q], [chance.randint(0, x) for x in
                                                              call.len_kv])  # fmt: skip
        more = {"seqused_q": call.ints(*used[0]), "seqused_k": call.ints(*used[1])}
    if used is not None:  # rows that belong to no sequence have no sink
        given["learnable_sink"] = sinks = None
        every = list(leaves)
    cu = {"cu_seqlens_q": call.cu(call.len_q), "cu_seqlens_k": call.cu(call.len_kv)}
    if chance.random() < 0.5:
        cu |= {"max_seqlen_q": max(call.len_q), "max_seqlen_k": max(call.len_kv)}
    tensors = leaves
    if name == "padded":
        tensors, cu = batched, {}
    elif name == "pages":
        count = -(-call.len_kv[0] // PAGE)
        table = torch.randperm(call.batch * count, generator=call.generator).view(call.batch, -1)
        room = count * PAGE - call.len_kv[0]
        pages = [
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, room)).unflatten(1, (-1, PAGE)).flatten(0, 1)
            for x in batched[1:]
        ]
        place = torch.argsort(table.flatten()).to(device)
        tensors = [leaves[0], *(x[place] for x in pages)]
        more = {"page_table": table.int().to(device), "seqused_k": call.ints(*call.len_kv)}
        del cu["cu_seqlens_k"]
    found = fa4.flash_attn_varlen_func(*tensors, **cu, **more, **given, return_lse=True)
    call.check(*found, every, truth_of, leaves, used)
