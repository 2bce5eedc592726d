"""The door of fast-ops, against dense attention of its documented semantics."""

from __future__ import annotations

import pytest
import torch

import jitattn
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import (
    FlashAttentionFunction,
    multi_head_attention,
)
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)
from tests.support.compare import rel_l2
from tests.support.compat_fast_ops import (
    LENGTHS_KV,
    LENGTHS_Q,
    H,
    dense_inputs,
    nested,
    parts,
)

FP32 = torch.float32
#: What torch says once of every strided nested tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def bias(*shape: int) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(9))
    return made.requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [None, (1, 1, 1, 50), (2, 1, 33, 50), (1, H, 33, 50), (2, H, 1, 50)], ids=str
)
def test_triton_values_and_gradients(shape: tuple[int, ...] | None, causal: bool) -> None:
    own = dense_inputs(FP32, "cpu")
    added = None if shape is None else bias(*shape)
    leaves = own if added is None else [*own, added]
    out = flash_attn_triton(*own, added, causal)
    truth, weights = attention_ref(
        *(x.double() for x in own), causal=causal, bias=added, upcast=False
    )
    assert out.shape == own[0].shape
    assert rel_l2(out, truth) < 1e-5
    assert weights.shape == (2, H, 33, 50)
    if causal:  # aligned to the top left
        assert not weights[..., 0, 1:].any()
    got = torch.autograd.grad(out.sum(), leaves)
    wanted = torch.autograd.grad(truth.sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert rel_l2(one, other) < 1e-3


def test_scale_and_arguments_by_position_only() -> None:
    own = dense_inputs(FP32, "cpu")
    usual = flash_attn_triton(*own)
    assert torch.equal(flash_attn_triton(*own, None, False, 0.0, 0.0), usual)
    other = flash_attn_triton(*own, None, False, 0.0, 0.5)
    assert rel_l2(other, jitattn.reference.reference(*own, scale=0.5)) < 1e-5
    with pytest.raises(TypeError):
        flash_attn_triton(*own, causal=True)  # type: ignore[call-arg]


def test_the_mask_is_the_one_used() -> None:
    own = dense_inputs(FP32, "cpu")
    torch.manual_seed(11)
    out = flash_attn_triton(*own, None, True, 0.25)
    torch.manual_seed(11)
    mask = triton_dropout_mask(0.25, 2, H, 33, 50, "cpu")
    assert mask.float().mean().sub(0.75).abs() < 0.03
    truth, _ = attention_ref(*own, dropout_p=0.25, dropout_mask=mask, causal=True)
    assert rel_l2(out, truth) < 1e-5
    again = flash_attn_triton(*own, None, True, 0.25)
    assert not torch.equal(out, again)


def test_expanded_heads_and_rows_that_see_nothing() -> None:
    q, k, v = dense_inputs(FP32, "cpu")
    one_k, one_v = (x[:, :, :1].expand(-1, -1, H, -1) for x in (k, v))
    truth, _ = attention_ref(q, one_k, one_v)
    assert rel_l2(flash_attn_triton(q, one_k, one_v), truth) < 1e-5
    hidden = torch.full((1, 1, 33, 50), float("-inf"))
    assert not flash_attn_triton(q, k, v, hidden).any()


def test_attention_ref_pads() -> None:
    own = dense_inputs(torch.bfloat16, "cpu")
    queries, keys = torch.arange(33).expand(2, -1) < 20, torch.arange(50).expand(2, -1) >= 10
    out, weights = attention_ref(*own, queries, keys, reorder_ops=True)
    assert out.dtype is weights.dtype is torch.bfloat16
    assert not out[:, 20:].any()
    assert not weights[:, :, 20:].any()
    assert not weights[..., :10].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout, causal: bool) -> None:
    sides = [
        parts(LENGTHS_Q, FP32, "cpu", 1),
        parts(LENGTHS_KV, FP32, "cpu", 2),
        parts(LENGTHS_KV, FP32, "cpu", 3),
    ]
    added = bias(1, H, max(LENGTHS_Q), max(LENGTHS_KV))
    out = FlashAttentionFunction.apply(*(nested(side, layout) for side in sides), added, causal)
    assert out.is_nested
    assert out.layout is layout
    results = out.unbind()
    truths = [
        attention_ref(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            causal=causal,
            bias=added[:, :, : q.shape[1], : k.shape[1]],
        )[0][0].transpose(0, 1)
        for q, k, v in zip(*sides, strict=True)
    ]
    for result, truth in zip(results, truths, strict=True):
        assert rel_l2(result, truth) < 1e-5
    leaves = [*sides[0], *sides[1], *sides[2], added]
    got = torch.autograd.grad(sum(x.square().sum() for x in results), leaves)
    wanted = torch.autograd.grad(sum(x.square().sum() for x in truths), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < 1e-4


def test_dense_heads_first() -> None:
    own = [x.transpose(1, 2) for x in dense_inputs(FP32, "cpu")]
    out = multi_head_attention(*own)
    truth, _ = attention_ref(*(x.transpose(1, 2) for x in own))
    assert rel_l2(out, truth.transpose(1, 2)) < 1e-5
    with pytest.raises(jitattn.InvalidInputError, match="all of them must be nested"):
        FlashAttentionFunction.apply(nested(parts((3, 4), FP32, "cpu", 1), torch.strided), *own[1:])
