"""Random calls of xformers' door, with every bias and layout, against dense fp64."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from jitattn.compat.xformers.ops import fmha
from jitattn.compat.xformers.ops.fmha import attn_bias as biases

from .compat_dense import around, dense
from .compat_random import LIMITS, compare, near

#: Biases of positions: name → (arguments, left, right, bottom right).
POSITIONAL: dict[str, tuple[tuple[int, ...], int | None, int | None, bool]] = {
    "LowerTriangularMask": ((), None, 0, False),
    "LowerTriangularFromBottomRightMask": ((), None, 0, True),
    "LowerTriangularFromBottomRightLocalAttentionMask": ((5,), 4, 0, True),
    "LocalAttentionFromBottomRightMask": ((3, 6), 3, 6, True),
}
#: Biases over sequences: name → (left, right, bottom right).
BLOCKS: dict[str, tuple[int | None, int | None, bool]] = {
    "BlockDiagonalMask": (None, None, True),
    "BlockDiagonalCausalMask": (None, 0, False),
    "BlockDiagonalCausalFromBottomRightMask": (None, 0, True),
    "BlockDiagonalCausalLocalAttentionMask": (4, 0, False),
    "BlockDiagonalCausalLocalAttentionFromBottomRightMask": (4, 0, True),
    "BlockDiagonalPaddedKeysMask": (None, None, True),
    "BlockDiagonalCausalWithOffsetPaddedKeysMask": (None, 0, True),
    "BlockDiagonalLocalAttentionPaddedKeysMask": (3, 6, True),
    "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (4, 0, True),
    "BlockDiagonalGappyKeysMask": (None, None, True),
    "BlockDiagonalCausalWithOffsetGappyKeysMask": (None, 0, True),
    "PagedBlockDiagonalPaddedKeysMask": (None, None, True),
    "PagedBlockDiagonalCausalWithOffsetPaddedKeysMask": (None, 0, True),
    "PagedBlockDiagonalGappyKeysMask": (None, None, True),
    "PagedBlockDiagonalCausalWithOffsetGappyKeysMask": (None, 0, True),
}
PAGE, ROOM = 4, 48


def check_batched(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check a batch: one head, heads, or groups; no bias, one of positions, or a tensor."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, dims = chance.choice((1, 3)), chance.choice((3, 4, 5))
    groups, heads = (1, 1) if dims == 3 else (chance.choice((1, 2)), chance.choice((1, 3)))
    dim, dim_v = chance.choice((8, 20, 64)), chance.choice((16, 64))
    len_q, len_kv = chance.choice((1, 33, 70)), chance.choice((20, 70))
    shares = dims == 5 and chance.random() < 0.6

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    def shaped(x: Tensor) -> Tensor:
        """Of a leaf [B, L, G, H, D]: as the call takes it."""
        x = x.expand(-1, -1, -1, heads, -1) if shares and x is not q else x
        return x if dims == 5 else x.flatten(2, 3) if dims == 4 else x[:, :, 0, 0]

    own = 1 if shares else heads
    q = leaf(batch, len_q, groups, heads, dim)
    k, v = leaf(batch, len_kv, groups, own, dim), leaf(batch, len_kv, groups, own, dim_v)
    leaves: list[Tensor] = [q, k, v]
    kind = chance.choice(("none", "tensor", "causal tensor", *POSITIONAL))
    if dims == 3 and kind not in ("none", "tensor", "LowerTriangularMask"):
        kind = "tensor"
    bias: Any = None
    seen = added = None
    if "tensor" in kind:
        shape = (batch, groups * heads, len_q, len_kv)
        cut = chance.choice((shape, (1, 1, *shape[2:]), (shape[0], 1, 1, shape[3])))
        own_bias = leaf(*cut)
        leaves.append(own_bias)
        added = own_bias.expand(shape)
        given = added.unflatten(1, (groups, heads)) if dims == 5 else added
        given = given[:, 0] if dims == 3 else given
        bias = given
        if kind == "causal tensor":
            bias = biases.LowerTriangularMask().add_bias(given)
            seen = around(len_q, len_kv, None, 0, bottom_right=False, device=device)
    elif kind != "none":
        arguments, left, right, bottom_right = POSITIONAL[kind]
        bias = getattr(biases, kind)(*arguments)
        seen = around(len_q, len_kv, left, right, bottom_right=bottom_right, device=device)
    scale = chance.choice((None, 0.3))
    call = (shaped(q), shaped(k), shaped(v))
    truth, lse = dense(*(x.flatten(2, 3) for x in (q, k, v)), seen, scale=scale, bias=added)
    lse_shape = (batch, groups, heads, len_q) if dims == 5 else (batch, groups * heads, len_q)
    truth = truth.reshape(*call[0].shape[:-1], dim_v)
    out, got = fmha.memory_efficient_attention_forward_requires_grad(*call, bias, 0.0, scale)
    assert got.shape == lse_shape
    compare(out, truth, leaves, dtype, (got, lse.reshape(lse_shape)))
    plain = fmha.memory_efficient_attention(*call, bias, 0.0, scale, op=fmha.ALL_FW_OPS[0])
    assert torch.equal(plain, out)
    grad = torch.randn(out.shape, generator=generator).to(out)
    truth, _ = dense(*(x.flatten(2, 3) for x in (q, k, v)), seen, scale=scale, bias=added)
    wanted = torch.autograd.grad(truth.reshape(out.shape), leaves[:3], grad.double())
    with torch.no_grad():
        given = fmha.memory_efficient_attention_backward(grad, out, got, *call, bias, 0.0, scale)
    for one, x, other, own_leaf in zip(given, call, wanted, leaves, strict=False):
        assert one.shape == x.shape
        summed = one.sum(3, keepdim=True) if own_leaf is not q and shares else one
        near(summed.reshape(other.shape), other, 2 * LIMITS[dtype])


def check_blocks(name: str, seed: int, dtype: torch.dtype, device: str) -> None:
    """Check sequences of a bias, forward and backward, and what the bias is as a tensor."""
    chance = random.Random(f"{name} {seed}")
    generator = torch.Generator().manual_seed(seed)
    count, dims = chance.choice((1, 4)), chance.choice((4, 5))
    groups, heads = (1, 2) if dims == 4 else (2, 3)
    len_kv = [chance.choice((0, 7, 30)) for _ in range(count)]
    len_q = [chance.choice((0, 1, 20)) for _ in range(count)]
    if "Paged" in name or "Padded" in name or "Gappy" in name:
        pass
    elif "FromBottomRight" in name:
        len_kv = [length + chance.choice((0, 9)) for length in len_q]
    elif "Local" in name:
        len_kv = [max(length, 1) + chance.choice((-1, 0, 9)) for length in len_q]
    bias, rows, total = _bias(name, chance, len_q, len_kv, device)

    def leaf(rows: int, heads: int) -> Tensor:
        shape = (1, rows, groups, heads, 16) if dims == 5 else (1, rows, heads, 16)
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    q, (k, v) = leaf(sum(len_q), heads), (leaf(total, 1 if dims == 5 else heads) for _ in "kv")
    call = [q, *(x.expand(-1, -1, -1, heads, -1) if dims == 5 else x for x in (k, v))]
    left, right, bottom_right = BLOCKS[name]
    outs, lses, begin = [], [], 0
    for length, own in zip(len_q, rows, strict=True):
        seen = around(length, len(own), left, right, bottom_right=bottom_right, device=device)
        parts = [q[:, begin : begin + length], k[:, own], v[:, own]]
        begin += length
        if dims == 5:
            parts = [x.flatten(2, 3) for x in parts]
        if not len(own):
            out = parts[0].double() * 0.0
            lse = torch.full((1, groups * heads, length), float("-inf"), device=device).double()
        else:
            out, lse = dense(*parts, seen)
        outs.append(out)
        lses.append(lse)
    nothing = 0.0 * sum(x.double().sum() for x in (q, k, v))  # gradients where no key is visible
    truth, lse = torch.cat(outs, 1).reshape(q.shape) + nothing, torch.cat(lses, 2) + nothing
    out, got = fmha.memory_efficient_attention_forward_requires_grad(*call, bias)
    assert got.shape == ((1, groups, heads, sum(len_q)) if dims == 5 else (1, heads, sum(len_q)))
    compare(out, truth, [q, k, v], dtype, (got, lse.reshape(got.shape)))
    assert torch.equal(fmha.memory_efficient_attention(*call, bias), out)
    again = fmha.memory_efficient_attention(*call, bias.to(device))
    assert torch.equal(again, out)
    _check_materialized(bias, len_q, rows, total, (left, right, bottom_right))


def _bias(
    name: str, chance: random.Random, len_q: list[int], len_kv: list[int], device: str
) -> tuple[Any, list[list[int]], int]:
    """Return a bias, the rows of k of each sequence in their order, and how many rows k has."""
    kind, where = getattr(biases, name), torch.device(device)
    count = len(len_q)
    if "Paged" in name:
        numbers = list(range(count * ROOM // PAGE + 3))
        chance.shuffle(numbers)
        per = ROOM // PAGE
        table = [numbers[b * per : (b + 1) * per] for b in range(count)]
        starts = [0] * count
        tensor = torch.tensor(table, dtype=torch.int32, device=device)
        if "Gappy" in name:
            starts = [chance.randint(0, ROOM - length - 1) for length in len_kv]
            bias = kind.from_seqlens(len_q, starts, len_kv, tensor, PAGE)
        else:
            bias = kind.from_seqlens(len_q, len_kv, tensor, PAGE)
        rows = [
            [table[b][t // PAGE] * PAGE + t % PAGE for t in range(start, start + length)]
            for b, (start, length) in enumerate(zip(starts, len_kv, strict=True))
        ]
        return bias, rows, len(numbers) * PAGE
    if "Padded" in name:
        starts, total = [b * ROOM for b in range(count)], count * ROOM
        more = {
            "BlockDiagonalLocalAttentionPaddedKeysMask": (3, 6),
            "BlockDiagonalCausalLocalAttentionPaddedKeysMask": (5,),
        }.get(name)
        if more is None:
            bias = kind.from_seqlens(len_q, ROOM, len_kv, device=where)
        else:
            bias = kind.from_seqlens_local(len_q, ROOM, len_kv, *more).to(where)
    elif "Gappy" in name:
        starts, total = [], 0
        for length in len_kv:
            total += chance.randint(0, 3)
            starts.append(total)
            total += length
        total += 2
        bias = kind.from_seqlens(len_q, [*starts, total], len_kv, device=where)
    else:
        starts, total = [sum(len_kv[:b]) for b in range(count)], sum(len_kv)
        bias = biases.BlockDiagonalMask.from_seqlens(len_q, len_kv, device=where)
        bias = {
            "BlockDiagonalMask": lambda: bias,
            "BlockDiagonalCausalMask": bias.make_causal,
            "BlockDiagonalCausalFromBottomRightMask": bias.make_causal_from_bottomright,
            "BlockDiagonalCausalLocalAttentionMask": lambda: bias.make_local_attention(5),
            "BlockDiagonalCausalLocalAttentionFromBottomRightMask": lambda: (
                bias.make_local_attention_from_bottomright(5)
            ),
        }[name]()
    assert type(bias) is kind
    rows = [list(range(s, s + length)) for s, length in zip(starts, len_kv, strict=True)]
    return bias, rows, total


def _check_materialized(
    bias: Any,
    len_q: list[int],
    rows: list[list[int]],
    total: int,
    reach: tuple[int | None, int | None, bool],
) -> None:
    """Check the bias as a tensor: 0 for visible keys, -inf for all others."""
    left, right, bottom_right = reach
    wanted, begin = torch.full((sum(len_q), total), float("-inf")), 0
    for length, own in zip(len_q, rows, strict=True):
        seen = around(length, len(own), left, right, bottom_right=bottom_right)
        part = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))
        wanted[begin : begin + length, own] = part
        begin += length
    keys = len(len_q) * ROOM if hasattr(bias, "page_size") else total
    got = bias.materialize((2, sum(len_q), keys), dtype=torch.float32)
    assert got.shape[0] == 2
    used = got.shape[-1]  # of pages: those that are in use
    assert torch.equal(got[1], wanted[:, :used])
    assert torch.isneginf(wanted[:, used:]).all()
