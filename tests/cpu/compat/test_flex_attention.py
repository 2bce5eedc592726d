"""Tests FlexAttention's names against torch's own, run eagerly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torchs

import jitattn
from jitattn.compat import flex_attention as ours
from tests.support.functions import FUNCTIONS

SIZES = (2, 4, 150, 200)
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile"),
    pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask"),  # transformers'
    pytest.mark.skipif(not hasattr(torchs, "AuxRequest"), reason="needs torch 2.9"),
]


def drawn() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    shapes = ((2, 4, 150, 16), (2, 2, 200, 16), (2, 2, 200, 8))
    return [torch.randn(shape, generator=generator) for shape in shapes]


@pytest.mark.parametrize("kind", ["ours", "torch's"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, kind: str) -> None:
    score_mod, mask_mod = FUNCTIONS[name]("cpu", *SIZES)
    if mask_mod is None and kind == "torch's":
        pytest.skip("has no mask")
    theirs = None
    mask: Any = None
    if mask_mod is not None:
        theirs = torchs.create_block_mask(mask_mod, *SIZES, device="cpu")
        mask = theirs
        if kind == "ours":
            mask = ours.create_block_mask(mask_mod, *SIZES, device="cpu")
    qkv = drawn()
    out, lse = ours.flex_attention(*qkv, score_mod, mask, enable_gqa=True, return_lse=True)
    wanted, aux = torchs.flex_attention(
        *qkv, score_mod, theirs, enable_gqa=True, return_aux=torchs.AuxRequest(lse=True)
    )
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse, aux.lse, rtol=1e-4, atol=1e-5)


def test_a_block_mask_has_what_torchs_has() -> None:
    _, mask_mod = FUNCTIONS["prefix"]("cpu", *SIZES)
    mine = ours.create_block_mask(mask_mod, *SIZES, device="cpu", BLOCK_SIZE=64)
    theirs = torchs.create_block_mask(mask_mod, *SIZES, device="cpu", BLOCK_SIZE=64)
    assert mine.shape == theirs.shape
    assert mine.sparsity() == theirs.sparsity()
    assert mine.numel() == theirs.numel()
    assert torch.equal(mine.to_dense(), theirs.to_dense())
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(mine, name), getattr(theirs, name))
    assert str(mine) == str(theirs)
    assert isinstance(mine.to_torch(), torchs.BlockMask)
    assert torch.equal(mine[:, :, :1].kv_indices, theirs[:, :, :1].kv_indices)


def test_blocks_of_the_callers_own() -> None:
    """Full blocks are visible as they are, whatever the function says of them."""
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    indices = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32)[None, None]
    full = torch.tensor([[1, 0], [0, 1]], dtype=torch.int32)[None, None]
    block_mask = torchs.BlockMask.from_kv_blocks(
        counts, indices, counts, full, BLOCK_SIZE=64, mask_mod=lambda b, h, q, k: q >= k
    )
    q = torch.randn(1, 1, 128, 8)
    out = ours.flex_attention(q, q, q, block_mask=block_mask)
    keep = torch.arange(128)[:, None] >= torch.arange(128)
    keep[:64, 64:] = keep[64:, :64] = True
    wanted = torch.nn.functional.scaled_dot_product_attention(q, q, q, attn_mask=keep)
    torch.testing.assert_close(out, wanted)


def test_auxiliary_outputs() -> None:
    q, k, v = drawn()
    out, aux = ours.flex_attention(q, k, v, enable_gqa=True, return_aux=torchs.AuxRequest(lse=True))
    plain, lse = ours.flex_attention(q, k, v, enable_gqa=True, return_lse=True)
    assert torch.equal(out, plain)
    assert torch.equal(aux.lse, lse)
    with pytest.raises(jitattn.UnsupportedError, match="max_scores"):
        ours.flex_attention(q, k, v, enable_gqa=True, return_aux=torchs.AuxRequest(max_scores=True))
    with pytest.raises(RuntimeError, match="enable_gqa"):
        ours.flex_attention(q, k, v)


def test_under_torchs_name() -> None:
    before = torchs.flex_attention
    with ours.activated():
        assert torchs.flex_attention is ours.flex_attention
    assert torchs.flex_attention is before


def test_transformers_flex_road() -> None:
    pytest.importorskip("transformers", minversion="5.0")
    from tests.support.models import model_of, tokens

    ids, keep = tokens(2, 40), torch.ones(2, 40, dtype=torch.long)
    keep[1, :9] = 0
    wanted = model_of("llama", "eager")(input_ids=ids, attention_mask=keep).logits
    with ours.activated():
        model = model_of("llama", "flex_attention")
        found = model(input_ids=ids, attention_mask=keep).logits
    seen = keep.bool()
    torch.testing.assert_close(found[seen], wanted[seen], rtol=1e-3, atol=1e-3)
