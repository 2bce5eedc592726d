"""Tests flash_attn.modules.mha against the same attention written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jitattn
from jitattn.compat.flash_attn import flash_attn_with_kvcache
from jitattn.compat.flash_attn.modules import mha
from tests.support.compare import rel_l2


def inputs(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(6))


@pytest.mark.parametrize("causal", [False, True])
def test_inner_modules(causal: bool) -> None:
    qkv = inputs(2, 9, 3, 4, 8)
    mask = jitattn.Causal() if causal else jitattn.Full()
    expected = jitattn.attention(*qkv.unbind(2), mask=mask)
    for kind in (mha.FlashSelfAttention, mha.SelfAttention):
        assert rel_l2(kind(causal=causal)(qkv), expected) < 1e-6
        assert rel_l2(kind()(qkv, causal=causal), expected) < 1e-6
    q, kv = inputs(2, 5, 4, 8), inputs(2, 9, 2, 2, 8)
    expected = jitattn.attention(q, *kv.unbind(2), mask=mask)
    for cross in (mha.FlashCrossAttention, mha.CrossAttention):
        assert rel_l2(cross(causal=causal)(q, kv), expected) < 1e-6
    keep = torch.ones(2, 9, dtype=torch.bool)
    keep[1, 4:] = False
    expected = jitattn.attention(q, *kv.unbind(2), mask=mask & jitattn.KeyPadding(keep))
    found = mha.CrossAttention(causal=causal)(q, kv, key_padding_mask=keep)
    assert rel_l2(found, expected) < 1e-6


def test_lengths() -> None:
    stops = torch.tensor([0, 4, 9], dtype=torch.int32)
    qkv = inputs(9, 3, 2, 8)
    module = mha.FlashSelfAttention(causal=True)
    found = module(qkv, cu_seqlens=stops, max_seqlen=5)
    parts = [module(part[None])[0] for part in qkv.split((4, 5))]
    assert rel_l2(found, torch.cat(parts)) < 1e-6
    with pytest.raises(jitattn.InvalidInputError, match="max_seqlen"):
        module(qkv, cu_seqlens=stops)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"num_heads_kv": 2, "causal": True},
        {"use_flash_attn": True, "causal": True, "window_size": (3, 0)},
        {"use_flash_attn": True, "use_alibi": True},
        {"rotary_emb_dim": 8, "causal": True},
        {"rotary_emb_dim": 4, "num_heads_kv": 1, "use_flash_attn": True},
        {"cross_attn": True, "num_heads_kv": 2},
    ],
    ids=str,
)
def test_mha(given: dict[str, Any]) -> None:
    """Its parameters have the original's names; all of them have gradients."""
    torch.manual_seed(0)
    module = mha.MHA(32, 4, **given)
    x = inputs(2, 7, 32)
    names = {name for name, _ in module.named_parameters()}
    projections = ("Wq", "Wkv") if given.get("cross_attn") else ("Wqkv",)
    assert names == {f"{p}.{x}" for p in (*projections, "out_proj") for x in ("weight", "bias")}
    more = {"x_kv": inputs(2, 5, 32)} if given.get("cross_attn") else {}
    out = module(x, **more)
    heads_kv = given.get("num_heads_kv", 4)
    if given.get("cross_attn"):
        q = module.Wq(x)
        k, v = module.Wkv(more["x_kv"]).unflatten(-1, (2, heads_kv, 8)).unbind(2)
    else:
        q, k, v = module.Wqkv(x).split([32, 8 * heads_kv, 8 * heads_kv], -1)
        k, v = (one.unflatten(-1, (heads_kv, 8)) for one in (k, v))
    q = q.unflatten(-1, (4, 8))
    if dim := given.get("rotary_emb_dim"):
        angles = torch.outer(torch.arange(7.0), 10000.0 ** (-torch.arange(0, dim, 2) / dim))
        q, k = (turned(one, angles) for one in (q, k))
    mask: Any = jitattn.Causal() if given.get("causal") else jitattn.Full()
    if "window_size" in given:
        mask = jitattn.Window(3, 0)
    slopes = torch.tensor(mha.get_alibi_slopes(4)) if given.get("use_alibi") else None
    inner = jitattn.attention(q, k, v, mask=mask, alibi_slopes=slopes)
    assert rel_l2(out, module.out_proj(inner.flatten(-2))) < 1e-5
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


def turned(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary embedding of the first 2 n columns, in halves."""
    half = angles.shape[1]
    cos, sin = angles.cos()[:, None], angles.sin()[:, None]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], -1)


def test_slopes_of_alibi() -> None:
    assert mha.get_alibi_slopes(4) == [0.25, 0.0625, 0.015625, 0.00390625]
    assert len(mha.get_alibi_slopes(6)) == 6


@pytest.mark.parametrize("name", ["dwconv", "checkpointing", "fused_bias_fc"])
def test_what_is_refused(name: str) -> None:
    with pytest.raises(jitattn.UnsupportedError, match=name):
        mha.MHA(32, 4, **{name: True})


def test_arguments_that_do_not_go_together() -> None:
    x = inputs(2, 7, 32)
    with pytest.raises(jitattn.InvalidInputError, match="use_flash_attn=True"):
        mha.MHA(32, 4, window_size=(3, 0))
    with pytest.raises(jitattn.InvalidInputError, match="num_heads_kv=3"):
        mha.MHA(32, 4, num_heads_kv=3)
    with pytest.raises(jitattn.UnsupportedError, match="inference_params"):
        mha.MHA(32, 4)(x, inference_params=object())
    with pytest.raises(jitattn.InvalidInputError, match="bert_padding"):
        mha.MHA(32, 4, use_flash_attn=True)(x, key_padding_mask=torch.ones(2, 7).bool())
    with pytest.raises(jitattn.InvalidInputError, match="cu_seqlens needs"):
        mha.MHA(32, 4)(x, cu_seqlens=torch.tensor([0, 7]))


def test_names_beside() -> None:
    assert mha.flash_attn_with_kvcache is flash_attn_with_kvcache
    with pytest.raises(jitattn.UnsupportedError, match="parallelize_module"):
        mha.ParallelMHA(32, 4, None)


def test_under_its_old_name() -> None:
    with jitattn.compat.alias("flash_attn"):
        from flash_attn.modules.mha import MHA

    assert MHA is mha.MHA
    assert isinstance(MHA(32, 4, return_residual=True)(inputs(1, 2, 32))[1], Tensor)
    assert issubclass(MHA, nn.Module)
