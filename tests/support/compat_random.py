"""Checks random calls of the cosine and fast-ops doors against dense fp64 references."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from jitattn.compat import flash_cosine_sim_attention as cosine
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)

from . import compat_cosine, compat_fast_ops
from .compare import rel_l2

#: Relative L2 tolerance of values; gradients may have twice the error.
LIMITS = {torch.float32: 2e-5, torch.float16: 6e-3, torch.bfloat16: 3e-2}


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
