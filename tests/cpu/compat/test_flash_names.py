"""Tests FlashAttention's further names: padding, function classes, the Triton module."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_triton,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from jitattn.compat.flash_attn.bert_padding import (
    IndexFirstAxis,
    IndexFirstAxisResidual,
    IndexPutFirstAxis,
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from jitattn.compat.flash_attn.flash_attn_interface import (
    FlashAttnFunc,
    FlashAttnKVPackedFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    FlashAttnVarlenKVPackedFunc,
    FlashAttnVarlenQKVPackedFunc,
    flash_attn_gpu,
    maybe_contiguous,
    round_multiple,
)
from jitattn.compat.flash_attn.utils.benchmark import pytorch_profiler
from tests.support.inputs import drawn

H, D = 4, 16
CU = torch.tensor([0, 7, 20], dtype=torch.int32)
#: dropout_p, softmax_scale, causal, window_size, softcap, keep_first, force_fa_decode,
#: alibi_slopes, deterministic, return_attn_probs
TAIL = (0.0, 0.3, True, (5, 0), 0.0, 2, False, None, False, False)


def test_rows_by_number() -> None:
    x = drawn(9, 3, 2).requires_grad_()
    indices = torch.tensor([1, 4, 8])
    rows = IndexFirstAxis.apply(x, indices)
    assert torch.equal(rows, index_first_axis(x, indices))
    back = index_put_first_axis(rows, indices, 9)
    assert torch.equal(back, IndexPutFirstAxis.apply(rows, indices, 9))
    kept = torch.zeros(9, 1, 1)
    kept[indices] = 1
    assert torch.equal(back, x * kept)
    (gradient,) = torch.autograd.grad(back.sum(), x)
    assert torch.equal(gradient, kept.expand_as(x))


def test_rows_and_a_residual_that_may_be_written_to() -> None:
    x = drawn(9, 3).requires_grad_()
    indices = torch.tensor([1, 4, 8])
    rows, residual = index_first_axis_residual(x, indices)
    assert torch.equal(rows, x[indices])
    assert residual.data_ptr() == x.data_ptr()
    d_rows, d_residual = drawn(3, 3, seed=1), drawn(9, 3, seed=2)
    wanted = d_residual.clone()
    wanted[indices] += d_rows
    gradients = [d_rows.clone(), d_residual.clone()]
    (gradient,) = torch.autograd.grad([rows, residual], x, gradients)
    torch.testing.assert_close(gradient, wanted)
    assert torch.equal(gradients[1], d_residual)
    rows, residual = IndexFirstAxisResidual.apply(x, indices)
    residual += 1.0
    assert torch.equal(x, residual)


def test_rows_with_several_sequences() -> None:
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = drawn(3, 6, 5).requires_grad_()
    flat, indices, cu_seqlens, longest = unpad_input_for_concatenated_sequences(x, lengths)
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert cu_seqlens.dtype is torch.int32
    assert longest == 6
    mask = torch.arange(6) < lengths.sum(1, keepdim=True)
    wanted, its_indices, *_ = unpad_input(x, mask)
    assert torch.equal(flat, wanted)
    assert torch.equal(indices, its_indices)
    assert torch.equal(pad_input(flat, indices, 3, 6), x * mask[..., None])
    (gradient,) = torch.autograd.grad(flat.sum(), x)
    assert torch.equal(gradient, mask[..., None].expand_as(x).float())


QKV = drawn(20, 3, H, D)
FLAT = (QKV[:, 0], QKV[:, 1], QKV[:, 2])
BATCHED = tuple(x[None] for x in FLAT)


def test_classes_have_apply() -> None:
    for cls, function, given in (
        (FlashAttnFunc, flash_attn_func, BATCHED),
        (FlashAttnKVPackedFunc, flash_attn_kvpacked_func, (BATCHED[0], QKV[None, :, 1:])),
        (FlashAttnQKVPackedFunc, flash_attn_qkvpacked_func, (QKV[None],)),
        (FlashAttnVarlenFunc, flash_attn_varlen_func, (*FLAT, CU, CU, 13, 13)),
        (
            FlashAttnVarlenKVPackedFunc,
            flash_attn_varlen_kvpacked_func,
            (FLAT[0], QKV[:, 1:], CU, CU, 13, 13),
        ),
        (FlashAttnVarlenQKVPackedFunc, flash_attn_varlen_qkvpacked_func, (QKV, CU, 13)),
    ):
        leaf = given[0].clone().requires_grad_()
        tail: tuple[Any, ...] = TAIL
        if function is flash_attn_varlen_func:
            tail = (*TAIL, None)  # block_table
        wanted = function(leaf, *given[1:], *tail)
        out = cls.apply(leaf, *given[1:], *tail, True)
        assert torch.equal(out, wanted)
        assert out.requires_grad
        assert not cls.apply(leaf, *given[1:], *tail, False).requires_grad
        with torch.no_grad():
            assert not cls.apply(leaf, *given[1:], *tail, True).requires_grad


def test_columns_that_are_no_neighbours_are_copied() -> None:
    x = drawn(D, 1, 20, H).movedim(0, -1)
    assert x.stride(-1) != 1
    wanted = flash_attn_func(*[x.contiguous()] * 3)
    assert torch.equal(flash_attn_func(x, x, x), wanted)
    assert torch.equal(flash_attn_varlen_func(x[0], x[0], x[0], CU[[0, 2]], CU[[0, 2]], 20, 20),
                       wanted[0])  # fmt: skip
    assert maybe_contiguous(x).is_contiguous()
    assert maybe_contiguous(QKV[:, 0]).data_ptr() == QKV.data_ptr()
    assert maybe_contiguous(None) is None


def test_small_things_of_the_interface() -> None:
    assert [round_multiple(x, 128) for x in (0, 1, 128, 129)] == [0, 128, 128, 256]
    assert flash_attn_gpu is jitattn.compat.flash_attn_2_cuda


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("shape", [(1, H, 1, 20), (2, 1, 9, 20), None])
def test_a_bias_at_the_place_of_the_triton_functions(
    causal: bool, shape: tuple[int, ...] | None
) -> None:
    q, kv = drawn(2, 9, H, D), drawn(2, 20, 2, H, D, seed=1)
    bias = None if shape is None else drawn(*shape, seed=2).requires_grad_()
    leaf = q.clone().requires_grad_()
    out = flash_attn_triton.flash_attn_func(leaf, *kv.unbind(2), bias, causal, 0.5)
    scores = torch.einsum("bqhd,bkhd->bhqk", leaf, kv[:, :, 0]) * 0.5
    if bias is not None:
        scores = scores + bias
    if causal:  # aligned to the top left
        hidden = torch.arange(20) > torch.arange(9)[:, None]
        scores = scores.masked_fill(hidden, float("-inf"))
    truth = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), kv[:, :, 1])
    torch.testing.assert_close(out, truth, atol=1e-5, rtol=1e-5)
    leaves = [leaf] if bias is None else [leaf, bias]
    for got, wanted in zip(
        torch.autograd.grad(out.square().sum(), leaves),
        torch.autograd.grad(truth.square().sum(), leaves),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-4)
    packed = flash_attn_triton.flash_attn_kvpacked_func(q, kv, bias, causal, 0.5)
    assert torch.equal(packed, out)
    for cls, given in (
        (flash_attn_triton.FlashAttnFunc, (q, *kv.unbind(2))),
        (flash_attn_triton.FlashAttnKVPackedFunc, (q, kv)),
    ):
        assert torch.equal(cls.apply(*given, bias, causal, 0.5), out)


def test_packed_at_the_place_of_the_triton_functions() -> None:
    wanted = flash_attn_triton.flash_attn_func(*BATCHED, None, True)
    out = flash_attn_triton.flash_attn_qkvpacked_func(QKV[None], causal=True)
    assert torch.equal(out, wanted)
    assert torch.equal(
        flash_attn_triton.FlashAttnQKVPackedFunc.apply(QKV[None], None, True), wanted
    )
    wide = drawn(1, 20, 20, H).transpose(1, 3)  # a bias whose columns are no neighbours
    out = flash_attn_triton.flash_attn_func(*BATCHED, wide)
    assert torch.equal(out, flash_attn_triton.flash_attn_func(*BATCHED, wide.contiguous()))
    with pytest.raises(AssertionError, match="heads"):
        flash_attn_triton.flash_attn_func(BATCHED[0], BATCHED[1][:, :, :3], BATCHED[2])


def test_the_profiler(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    q = drawn(1, 3, H, D).requires_grad_()
    trace = tmp_path / "trace.json"
    pytorch_profiler(flash_attn_func, q, q, q, backward=True, trace_filename=str(trace), cpu=True)
    assert "aten::" in capsys.readouterr().out
    assert trace.stat().st_size > 0
    assert q.grad is not None
    pytorch_profiler(flash_attn_func, q, q, q, verbose=False)
    assert not capsys.readouterr().out
