"""Tests the xformers door: its functions, operators' names, merging, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat import xformers
from jitattn.compat.xformers import ops, version
from jitattn.compat.xformers.ops import fmha
from jitattn.compat.xformers.ops.fmha import (
    attn_bias,
    ck,
    ck_splitk,
    common,
    cutlass,
    cutlass_blackwell,
    dispatch,
    flash,
    flash3,
    merge_training,
    triton_splitk,
)
from jitattn.compat.xformers.ops.unbind import get_stack_strides, stack_or_none, unbind
from tests.support.inputs import drawn

Q, K, V = drawn(2, 9, 4, 16), drawn(2, 20, 4, 16, seed=1), drawn(2, 20, 4, 24, seed=2)


def forward() -> Any:
    """Forward operators and their names."""
    return {
        cutlass.FwOp: "cutlassF-pt",
        cutlass_blackwell.FwOp: "cutlassF-blackwell",
        flash.FwOp: f"fa2F@{flash.FLASH_VERSION}",
        flash3.FwOp: f"fa3F@{flash3.FLASH_VERSION}",
        flash3.FwOp_KVSplit: f"fa3F_splitKV@{flash3.FLASH_VERSION}",
        ck.FwOp: "ckF",
        ck_splitk.FwOp: "ck_splitKF",
        triton_splitk.FwOp: "triton_splitKF",
    }


def backward() -> Any:
    """Backward operators and their names."""
    return {
        cutlass.BwOp: "cutlassB-pt",
        cutlass_blackwell.BwOp: "cutlassB-blackwell",
        flash.BwOp: f"fa2B@{flash.FLASH_VERSION}",
        flash3.BwOp: f"fa3B@{flash3.FLASH_VERSION}",
        ck.BwOp: "ckB",
    }


def splits() -> Any:
    """Operators by their number of splits."""
    return {
        1: (ck_splitk.FwOp_S1, triton_splitk.FwOp_S1),
        2: (ck_splitk.FwOp_S2, triton_splitk.FwOp_S2),
        4: (ck_splitk.FwOp_S4, triton_splitk.FwOp_S4),
        8: (ck_splitk.FwOp_S8, triton_splitk.FwOp_S8),
        16: (ck_splitk.FwOp_S16, triton_splitk.FwOp_S16),
        32: (ck_splitk.FwOp_S32, triton_splitk.FwOp_S32),
        64: (ck_splitk.FwOp_S64, triton_splitk.FwOp_S64),
        128: (ck_splitk.FwOp_S128, triton_splitk.FwOp_S128),
    }


def pairs() -> Any:
    """What op may be."""
    return (
        fmha.MemoryEfficientAttentionCutlassOp,
        fmha.MemoryEfficientAttentionCutlassBlackwellOp,
        fmha.MemoryEfficientAttentionCutlassFwdFlashBwOp,
        fmha.MemoryEfficientAttentionFlashAttentionOp,
        fmha.MemoryEfficientAttentionCkOp,
        fmha.MemoryEfficientAttentionSplitKCkOp,
    )


def test_facts_of_the_original() -> None:
    assert xformers.__version__ == version.__version__ == "0.0.35"
    assert xformers._has_cpp_library
    for operators in (forward(), backward()):
        for operator, name in operators.items():
            assert name == operator.NAME
            assert operator.OPERATOR_CATEGORY == "memory_efficient_attention"
    for count, (of_ck, of_triton) in splits().items():
        assert f"ck_splitK{count}" == of_ck.NAME
        assert f"triton_splitK{count}" == of_triton.NAME
        assert triton_splitk.FwOp_Map[count] is of_triton
    assert {operator.NAME for operator in fmha.ALL_FW_OPS} < {*forward().values()}
    assert {operator.NAME for operator in fmha.ALL_BW_OPS} < {*backward().values()}
    assert ops.AttentionMask is ops.AttentionBias is attn_bias.AttentionBias is fmha.AttentionBias
    assert ops.LowerTriangularMask is fmha.LowerTriangularMask is attn_bias.LowerTriangularMask
    assert fmha.BlockDiagonalMask is attn_bias.BlockDiagonalMask
    assert issubclass(ops.AttentionOpBase, common.AttentionOpBase)
    assert ops.AttentionOp == common.AttentionOp == fmha.AttentionOp
    assert fmha._get_use_fa3() is dispatch.fa3_available() is True
    fmha._set_use_fa3(False)
    assert not dispatch._get_use_fa3()
    fmha._set_use_fa3(True)
    assert ops.memory_efficient_attention is fmha.memory_efficient_attention


def test_an_operator_changes_nothing() -> None:
    wanted = ops.memory_efficient_attention(Q, K, V)
    every = [
        *pairs(),
        ops.MemoryEfficientAttentionCutlassOp,
        ops.MemoryEfficientAttentionCutlassFwdFlashBwOp,
        ops.MemoryEfficientAttentionFlashAttentionOp,
        ops.MemoryEfficientAttentionCkOp,
        ops.MemoryEfficientAttentionSplitKCkOp,
    ]
    for pair in every:
        assert torch.equal(ops.memory_efficient_attention(Q, K, V, op=pair), wanted)
    assert torch.equal(ops.memory_efficient_attention_forward(Q, K, V, op=flash.FwOp), wanted)


def test_operators_by_themselves() -> None:
    inputs = fmha.Inputs(Q, K, V, scale=0.3)
    assert inputs.scale_float == 0.3
    assert common.Inputs(Q, K, V).scale_float == 0.25
    assert inputs.device == Q.device
    assert inputs.nbytes == Q.nbytes + K.nbytes + V.nbytes
    assert [x.shape for x in inputs.get_qkv_in_bmghk()] == [(*x.shape[:2], 1, *x.shape[2:]) for x
                                                            in (Q, K, V)]  # fmt: skip
    operator: Any = cutlass.FwOp
    assert issubclass(operator, fmha.AttentionFwOpBase)
    assert issubclass(cutlass.BwOp, fmha.AttentionBwOpBase)
    assert operator.is_available()
    assert operator.supports(inputs)
    assert operator.shape_not_supported_reasons(9, 20, 16, 257) == ["head dim above 256"]
    wide = fmha.Inputs(*(x.long() for x in (Q, K, V)))
    assert len(operator.not_supported_reasons(wide)) == 1
    out, context = operator.apply(inputs, True)
    wanted = fmha.memory_efficient_attention(Q, K, V, scale=0.3)
    assert torch.equal(out, wanted)
    assert torch.equal(operator.apply(inputs, False)[0], wanted)
    grad = drawn(*out.shape, seed=4)
    found = cutlass.BwOp.apply(context, inputs, grad)
    assert isinstance(context, common.Context)
    assert isinstance(found, common.Gradients)
    assert fmha.Context is common.Context
    assert fmha.Gradients is common.Gradients
    given = (grad, out, context.lse, Q, K, V, None, 0.0, 0.3)
    for one, other in zip(
        (found.dq, found.dk, found.dv), ops.memory_efficient_attention_backward(*given), strict=True
    ):
        assert torch.equal(one, other)
    partial = common.Inputs(Q.half(), K, V, is_partial=True)
    assert partial.get_output_dtype() is torch.float32
    assert common.Inputs(Q, K, V, output_dtype=torch.float16).get_output_dtype() is torch.float16


def test_layouts_of_the_original() -> None:
    flat = drawn(6, 5, 8)
    assert fmha.bmk2bmhk(Q, 4) is Q
    assert torch.equal(common.bmk2bmhk(flat, 3), flat.view(2, 3, 5, 8).transpose(1, 2))
    reasons: list[str] = []
    common.check_lastdim_alignment_stride1(reasons, "query", Q, 8)
    assert not reasons
    common.check_lastdim_alignment_stride1(reasons, "query", Q.transpose(2, 3), 8)
    assert len(reasons) == 1


def test_the_result_in_fp32() -> None:
    half = [x.half() for x in (Q, K, V)]
    out = fmha.memory_efficient_attention(*half, output_dtype=torch.float32)
    assert out.dtype is torch.float32
    wanted = fmha.memory_efficient_attention(*(x.float() for x in half))
    torch.testing.assert_close(out, wanted, atol=2e-3, rtol=2e-3)


def test_dropout_depends_on_the_seed() -> None:
    torch.manual_seed(3)
    first = ops.memory_efficient_attention(Q, K, V, p=0.3)
    assert not torch.equal(first, ops.memory_efficient_attention(Q, K, V, p=0.3))
    torch.manual_seed(3)
    assert torch.equal(first, ops.memory_efficient_attention(Q, K, V, p=0.3))


def test_parts_are_merged_and_have_gradients() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    q, k, v = leaves
    wanted, wanted_lse = ops.memory_efficient_attention_forward_requires_grad(q, k, v)
    slices = (slice(0, 7), slice(7, 20))
    parts = [fmha.memory_efficient_attention_partial(q, k[:, s], v[:, s]) for s in slices]
    outs, lses = [out for out, _ in parts], [lse for _, lse in parts]
    out, lse = fmha.merge_attentions(outs, lses)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    together, none = fmha.merge_attentions(torch.stack(outs), torch.stack(lses), write_lse=False)
    assert torch.equal(together, out)
    assert none is None
    grouped, own = fmha.merge_attentions(
        [x.unflatten(2, (2, 2)) for x in outs], [x.unflatten(1, (2, 2)) for x in lses]
    )
    assert torch.equal(grouped.flatten(2, 3), out)
    assert torch.equal(own.flatten(1, 2), lse)
    grad = drawn(*out.shape, seed=4)
    truth = torch.autograd.grad(wanted, leaves, grad)
    for one, other in zip(torch.autograd.grad(out, leaves, grad), truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    pieces = [
        merge_training.memory_efficient_attention_partial_autograd(q, k[:, s], v[:, s])
        for s in slices
    ]
    assert isinstance(pieces[0], merge_training.Partial)
    assert not pieces[0].is_bmghk()
    first = [one.apply(lambda x: x[:, :5]) for one in pieces]
    short = merge_training.merge_attentions_autograd(*first)
    torch.testing.assert_close(short, wanted[:, :5])
    whole = merge_training.merge_attentions_autograd(*pieces)
    for one, other in zip(torch.autograd.grad(whole, leaves, grad), truth, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_gradients_of_expanded_heads_and_of_leaves_among_them() -> None:
    """An expanded leaf has a gradient for each of its heads, as torch gives it."""
    base = drawn(2, 20, 2, 1, 16, seed=6)
    q = drawn(2, 9, 2, 3, 16, seed=5)
    leaf = base.expand(-1, -1, -1, 3, -1).detach().requires_grad_()
    own = base.expand(-1, -1, -1, 3, -1).contiguous().requires_grad_()
    for x in (leaf, own):
        ops.memory_efficient_attention(q, x, x).sin().sum().backward()
    torch.testing.assert_close(leaf.grad, own.grad)
    before = base.clone().requires_grad_()
    wide = before.expand(-1, -1, -1, 3, -1)
    ops.memory_efficient_attention(q, wide, wide).sin().sum().backward()
    torch.testing.assert_close(before.grad, own.grad.sum(3, keepdim=True), atol=1e-5, rtol=1e-5)


def test_packed_tensors_are_taken_apart_and_recognized() -> None:
    packed = drawn(2, 5, 3, 4).requires_grad_()
    parts = ops.unbind(packed, 2)
    assert [x.data_ptr() for x in parts] == [x.data_ptr() for x in packed.unbind(2)]
    strides = ops.get_stack_strides(parts, 2)
    assert strides == packed.stride()
    stacked = ops.stack_or_none([x * 1 for x in parts], 2)
    assert stacked is None
    assert ops.get_stack_strides([*parts[:2], parts[0]], 2) is None
    assert ops.get_stack_strides(parts[:1], 2) is None
    stacked = stack_or_none(parts, 2)
    assert stacked.data_ptr() == packed.data_ptr()
    assert torch.equal(stacked, packed)
    grad = drawn(2, 5, 3, 4, seed=1)
    (got,) = torch.autograd.grad(stacked, packed, grad)
    assert torch.equal(got, grad)
    assert unbind is ops.unbind
    assert get_stack_strides is ops.get_stack_strides


def test_refusals_are_value_errors_in_the_words_of_the_door() -> None:
    flat, block = (Q[:1], K[:1], V[:1]), attn_bias.BlockDiagonalMask.from_seqlens([9], [20])
    five = [x.unflatten(2, (2, 2)) for x in (Q, K, V)]

    class Other(attn_bias.AttentionBias):
        pass

    calls: dict[str, Callable[[], object]] = {
        r"query \[2, 9, 4, 16\], key \[20, 4, 16\]": lambda: fmha.memory_efficient_attention(
            Q, K[0], V
        ),
        r"groups and heads": lambda: fmha.memory_efficient_attention(
            five[0], five[1][:, :, :1], five[2][:, :, :1]
        ),
        r"attn_bias is a str": lambda: fmha.memory_efficient_attention(Q, K, V, "causal"),
        r"attn_bias is a BlockDiagonalMask, and query": lambda: fmha.memory_efficient_attention(
            *(x[:, :, 0] for x in flat), block
        ),
        r"batch size must be 1": lambda: fmha.memory_efficient_attention(Q, K, V, block),
        r"attn_bias has shape": lambda: fmha.memory_efficient_attention(
            Q, K, V, drawn(2, 4, 9, 19)
        ),
        r"query is float32, key is float16": lambda: fmha.memory_efficient_attention(
            Q, K.half(), V
        ),
        r"whole pages of 16": lambda: fmha.memory_efficient_attention(
            *flat,
            attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
                [9], [20], torch.zeros(1, 2, dtype=torch.int32), 16
            ),
        ),
        r"attn_split \[2, 9\]": lambda: fmha.merge_attentions(Q[:, :, 0, 0], Q),
        r"parts of shapes": lambda: fmha.merge_attentions([Q, Q[:1]], [Q]),
        r"give one result": merge_training.merge_attentions_autograd,
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)
    unsupported: dict[str, Callable[[], object]] = {
        "Other, which has no kernel": lambda: fmha.memory_efficient_attention(Q, K, V, Other()),
        "Other has no tensor": lambda: Other().materialize((3, 3)),
        "p=0.5": lambda: fmha.memory_efficient_attention_partial(Q, K, V, p=0.5),
        "p=0.1": lambda: fmha.memory_efficient_attention_forward_requires_grad(Q, K, V, p=0.1),
        "p=0.2": lambda: fmha.memory_efficient_attention_backward(Q, Q, Q, Q, K, V, p=0.2),
    }
    for message, call in unsupported.items():
        with pytest.raises(NotImplementedError, match=message):
            call()


def test_under_torch_compile() -> None:
    """Biases of positions, over sequences, of padded keys and of keys in pages."""
    packed = drawn(1, 9, 4, 16), drawn(1, 20, 4, 16, seed=1)
    padded = attn_bias.BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        [4, 5], 10, [6, 9], device=torch.device("cpu")
    )
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    paged = attn_bias.PagedBlockDiagonalCausalWithOffsetPaddedKeysMask
    for bias in (
        attn_bias.LowerTriangularMask(),
        attn_bias.LocalAttentionFromBottomRightMask(3, 2),
        attn_bias.BlockDiagonalMask.from_seqlens([4, 5], [12, 8]).make_causal(),
        padded,
        padded.make_paged(table, 5, paged),
    ):

        def call(q: torch.Tensor, own: Any = bias) -> torch.Tensor:
            return ops.memory_efficient_attention(q, packed[1], packed[1], own)

        out = torch.compile(call, backend="eager", fullgraph=True)(packed[0])
        torch.testing.assert_close(out, call(packed[0]))
