"""Random calls of sageattention's door against dense fp64, and data that its errors depend on."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

from jitattn.compat import sageattention as sage

from .compat_dense import around, dense
from .compat_random import near

#: Relative L2 tolerance of values: 8 bits on a GPU, and there fp32 with one TF32 pass.
LIMITS = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 2e-2}
#: Of gradients, which are computed at gear 2 of a result and an LSE of gear 4: differences between
#: dP and the row sums of dO * O magnify its errors, to 2.4e-3 in fp32 with one query.
GRADIENT_LIMITS = {torch.float32: 5e-3, torch.float16: 4e-2, torch.bfloat16: 4e-2}
#: Of both on the CPU path, in fp32.
EXACT = 2e-5
NAMED = (
    sage.sageattn_qk_int8_pv_fp16_cuda,
    sage.sageattn_qk_int8_pv_fp16_triton,
    sage.sageattn_qk_int8_pv_fp8_cuda,
    sage.sageattn_qk_int8_pv_fp8_cuda_sm90,
)


def _leaves(
    chance: random.Random,
    generator: torch.Generator,
    front: tuple[tuple[int, ...], tuple[int, ...]],
    dtype: torch.dtype,
    device: str,
) -> list[Tensor]:
    """Return q, k and v: rows first, then heads."""
    heads_kv, dim = chance.choice((1, 2)), chance.choice((16, 32, 40, 64, 128))
    heads = heads_kv * chance.choice((1, 3))
    shapes = [(*front[0], heads, dim), *[(*front[1], heads_kv, dim)] * 2]
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [x.to(device, dtype).requires_grad_() for x in drawn]


def check_sage(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `sageattn` in both layouts, with masks, and the functions with names of their own."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    batch, len_q, len_kv = (
        chance.choice((1, 3)),
        chance.choice((1, 33, 90)),
        chance.choice((20, 90)),
    )
    leaves = _leaves(chance, generator, ((batch, len_q), (batch, len_kv)), dtype, device)
    heads = leaves[0].shape[2]
    given: dict[str, Any] = {"is_causal": chance.random() < 0.5}
    if chance.random() < 0.5:
        given["sm_scale"] = 0.2
    seen = bias = None
    if given["is_causal"]:
        seen = around(len_q, len_kv, None, 0, bottom_right=False, device=device)
    more: dict[str, Any] = {}
    if chance.random() < 0.4:
        shape = (chance.choice((1, batch)), chance.choice((1, heads)), chance.choice((1, len_q)))
        if chance.random() < 0.5:
            keep = (torch.rand(*shape, len_kv, generator=generator) < 0.8).to(device)
            keep[..., 0] = True
            more["attn_mask"], seen = keep, keep if seen is None else seen & keep
        else:
            bias = torch.randn(*shape, len_kv, generator=generator).to(device, dtype)
            more["attn_mask"] = bias
    truth, lse = dense(*leaves, seen, scale=given.get("sm_scale"), bias=bias)
    layout = chance.choice(("HND", "NHD"))
    call = [x.transpose(1, 2) for x in leaves] if layout == "HND" else leaves
    copies = [x.detach().clone() for x in leaves]
    out, got = sage.sageattn(*call, tensor_layout=layout, return_lse=True, **given, **more)
    assert all(torch.equal(x, copy) for x, copy in zip(leaves, copies, strict=True))
    assert out.dtype is dtype
    turned = out.transpose(1, 2) if layout == "HND" else out
    _compare(turned, truth, leaves, dtype, got, lse)
    if not more:
        for function in NAMED:
            assert torch.equal(function(*call, tensor_layout=layout, **given), out)
        own, _ = NAMED[0](*call, layout, **given, return_lse=True, smooth_k=False)
        assert torch.equal(own, out)


def check_sage_varlen(seed: int, dtype: torch.dtype, device: str) -> None:
    """Check `sageattn_varlen`, every sequence causal from its own top left."""
    chance = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    lengths = [[chance.choice((1, 20, 90)) for _ in range(3)] for _ in range(2)]
    leaves = _leaves(chance, generator, ((sum(lengths[0]),), (sum(lengths[1]),)), dtype, device)
    cu = [torch.tensor([0, *own], device=device).cumsum(0).int() for own in lengths]
    causal = chance.random() < 0.5
    truths = []
    for (a, b), (c, d) in zip(*(zip(x.tolist(), x.tolist()[1:], strict=False) for x in cu),
                              strict=True):  # fmt: skip
        seen = around(b - a, d - c, None, 0, bottom_right=False, device=device) if causal else None
        own = leaves[0][None, a:b], leaves[1][None, c:d], leaves[2][None, c:d]
        truths.append(dense(*own, seen)[0][0])
    out = sage.sageattn_varlen(*leaves, *cu, *map(max, lengths), is_causal=causal)
    _compare(out, torch.cat(truths), leaves, dtype)


def _compare(
    out: Tensor,
    truth: Tensor,
    leaves: list[Tensor],
    dtype: torch.dtype,
    got: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Compare values within the promise of gear 4, and gradients within gear 2's."""
    assert out.shape == truth.shape
    is_exact = not out.is_cuda  # the CPU path quantizes nothing
    near(out, truth, EXACT if is_exact else LIMITS[dtype])
    flat, wanted = out.double().flatten(), truth.flatten()
    assert torch.cosine_similarity(flat, wanted, 0) >= 0.999
    if got is not None and lse is not None:
        assert got.dtype is torch.float32
        limit = 1e-4 if is_exact else 1e-3 if dtype is torch.float32 else 5e-2
        torch.testing.assert_close(got, lse.float(), rtol=limit, atol=limit)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(5)).to(out)
    results = torch.autograd.grad(out, leaves, grad, retain_graph=True)
    truths = torch.autograd.grad(truth, leaves, grad.double())
    for one, other in zip(results, truths, strict=True):
        near(one, other, EXACT if is_exact else GRADIENT_LIMITS[dtype])


def of_kind(kind: str, *shape: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Return q, k, v [B, L, H, D]: Gaussian, with channels that stand out, or with biased keys."""
    generator = torch.Generator().manual_seed(11)
    q, k, v = (torch.randn(shape, generator=generator) for _ in range(3))
    if kind == "outlier channels":
        k[..., :: shape[-1] // 4] *= 12.0
        q[..., :: shape[-1] // 4] *= 0.2
    elif kind == "biased keys":
        k += 8.0 * torch.randn(shape[-2:], generator=generator)
    return [x.to(device, dtype) for x in (q, k, v)]
