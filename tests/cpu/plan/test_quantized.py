"""Tests gear 4: the calls with INT8 Q and K, and their quantization kernels."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.kernels.fwd import FwdSpec, specs_for_gear
from jitattn.kernels.operands import HEAD_DIMS
from jitattn.kernels.quantize import CHUNK_ROWS, ChannelStatsSpec, QuantizeSpec, quantize_specs
from jitattn.kernels.tiles import max_smem_bytes
from jitattn.plan.prepare import kernel_problem
from jitattn.plan.step import Buffer
from jitattn.request.layouts import parse
from jitattn.request.problem import Call
from jitattn.spec.enums import Dtype, MaskKind, Numerics, SeqLayout, Switch


def chosen(
    arch: str = "sm_90", dim: int = 128, len_q: int = 200, heads: int = 2, **arguments: Any
) -> Any:
    """The problem in 8 bits of a call, or None."""
    dtype = arguments.pop("dtype", torch.float16)
    q = torch.zeros(1, len_q, heads, dim, dtype=dtype)
    k = torch.zeros(1, arguments.pop("len_kv", 300), 2, dim, dtype=dtype)
    _, call = bind(q, k, k, {"gear": 4, **arguments})
    return problem_of(q, k, call, arch)


def problem_of(q: torch.Tensor, k: torch.Tensor, call: Call, arch: str) -> Any:
    """What an architecture's call has prepared."""
    problem, runtime = parse(q, k, k, call)
    return kernel_problem(problem, runtime, call, arch)


def in_pages(start: torch.Tensor | None = None) -> jitattn.Paged:
    """One sequence in what `chosen` makes: a page of 300 rows."""
    return jitattn.Paged(torch.tensor([[0]]), torch.tensor([200]), start=start)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dim": 256},
        {"dim": 64},
        {"len_q": 33, "heads": 4},
        {"mask": jitattn.Causal()},
        {"mask": jitattn.Window(9, 0, keep_first=2)},
        {"mask": jitattn.LocalStride(64, 2, 3)},
        {"num_splits": 2},
        {"tile_rows": 128},
        {"dim": 64, "arch": "sm_86"},
        {"dim": 32, "arch": "sm_80"},
        {"kv_seqs": jitattn.Padded(torch.tensor([200]))},
        {"kv_seqs": in_pages()},
        {"kv_seqs": in_pages(), "dim": 64, "arch": "sm_89", "mask": jitattn.Window(9, 0)},
        {"kv_seqs": in_pages(start=torch.tensor([3]))},
    ],
    ids=lambda given: ", ".join(given),
)
def test_calls_that_8_bits_serve(given: dict[str, Any]) -> None:
    problem = chosen(**given)
    is_in_pages = isinstance(given.get("kv_seqs"), jitattn.Paged)
    assert problem.numerics is (Numerics.INT8 if is_in_pages else Numerics.INT8_F16)


AS_WITH_GEAR_3: dict[str, dict[str, Any]] = {
    "gear 3": {"gear": 3},
    "no gear": {"gear": None},
    "fp32": {"dtype": torch.float32},
    "D=32 on sm_90": {"dim": 32},
    "D=96": {"dim": 96, "arch": "sm_86"},
    "64 rows": {"len_q": 64},
    "64 packed rows": {"len_q": 16, "heads": 4},
    "no keys": {"len_kv": 0},
    "negative scale": {"scale": -1.0},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.zeros(2)},
    "slopes": {"alibi_slopes": torch.zeros(2)},
    "bias": {"bias": torch.zeros(1, 1, 1, 300)},
    "dropout": {"dropout_p": 0.1},
    "stride in blocks of 16": {"mask": jitattn.LocalStride(16, 2, 3)},
    "key padding": {"mask": jitattn.KeyPadding(torch.ones(1, 300, dtype=torch.bool))},
    "tile_rows=64": {"tile_rows": 64},
    "64 rows on pages": {"len_q": 64, "kv_seqs": in_pages()},
    "softcap on pages": {"softcap": 3.0, "kv_seqs": in_pages()},
    "D=64 on pages on sm_90": {"dim": 64, "kv_seqs": in_pages()},
    "named rows": {"kv_seqs": jitattn.Padded(torch.tensor([200]), batch_idx=torch.tensor([0]))},
}


@pytest.mark.parametrize("given", AS_WITH_GEAR_3.values(), ids=list(AS_WITH_GEAR_3))
def test_calls_that_have_the_numerics_of_gear_3(given: dict[str, Any]) -> None:
    assert chosen(**given) is None


def test_the_default_gear_counts() -> None:
    with jitattn.set_default_gear(4):
        assert chosen(gear=None).numerics is Numerics.INT8_F16
        assert chosen(gear=2) is None


def test_rows_that_no_16_bytes_reach_are_as_with_gear_3() -> None:
    q = torch.zeros(1, 200, 2, 129, dtype=torch.float16)[..., 1:]
    _, call = bind(q, q, q, {"gear": 4})
    assert problem_of(q, q, call, "sm_90") is None


def test_kernels_that_bring_them_there() -> None:
    stats, rounding = quantize_specs(chosen(), "sm_86")
    assert isinstance(stats, ChannelStatsSpec)
    assert isinstance(rounding, QuantizeSpec)
    assert (stats.chunk_rows, stats.head_dim, stats.arch) == (
        CHUNK_ROWS,
        128,
        "sm_86",
    )


INT8, INT8_F16, OFF, ON = Numerics.INT8, Numerics.INT8_F16, Switch.OFF, Switch.ON


@pytest.mark.parametrize(
    ("dtype", "layout", "dim_v", "paged", "values", "numerics"),
    [
        (Dtype.FP16, SeqLayout.BATCHED, 128, OFF, ON, INT8_F16),
        (Dtype.BF16, SeqLayout.BATCHED, 128, OFF, ON, INT8_F16),
        (Dtype.BF16, SeqLayout.RAGGED, 128, OFF, ON, INT8_F16),
        (Dtype.FP16, SeqLayout.PAGED, 128, ON, OFF, INT8),
        (Dtype.BF16, SeqLayout.PAGED16, 128, ON, OFF, INT8),
        (Dtype.FP16, SeqLayout.BATCHED, 64, OFF, OFF, INT8),
    ],
)
def test_kernels_for_gear_4(
    dtype: Dtype,
    layout: SeqLayout,
    dim_v: int,
    paged: Switch,
    values: Switch,
    numerics: Numerics,
) -> None:
    """Sums in fp16 where v comes to fp16."""
    problem = replace(
        chosen(), numerics=Numerics.F32_ACC, dtype=dtype, head_dim_v=dim_v, kv_layout=layout
    )
    stats, rounding, forward = specs_for_gear(problem, 4, "sm_89")
    assert isinstance(stats, ChannelStatsSpec)
    assert isinstance(rounding, QuantizeSpec)
    assert stats.paged is rounding.paged is paged
    assert stats.values is rounding.values is values
    assert isinstance(forward, FwdSpec)
    assert (forward.problem.numerics, forward.problem.kv_layout) == (numerics, layout)


@pytest.mark.parametrize("dtype", [Dtype.FP16, Dtype.BF16])
@pytest.mark.parametrize("out_dtype", [Dtype.FP16, Dtype.FP32])
@pytest.mark.parametrize("mask", [MaskKind.CAUSAL, MaskKind.LOCAL_STRIDE])
def test_shared_memory_is_there(dtype: Dtype, out_dtype: Dtype, mask: MaskKind) -> None:
    for dim, layout, arch in itertools.product(
        HEAD_DIMS, SeqLayout, ("sm_80", "sm_86", "sm_89", "sm_90", "sm_120")
    ):
        problem = replace(
            chosen(), numerics=Numerics.F32_ACC, dtype=dtype, out_dtype=out_dtype, mask=mask,
            head_dim=dim, head_dim_v=dim, kv_layout=layout,
        )  # fmt: skip
        for spec in specs_for_gear(problem, 4, arch):
            assert spec.smem_bytes <= max_smem_bytes(arch)


def test_strides_where_there_is_one_of_a_kind() -> None:
    assert Buffer((2, 3, 4, 8), "int8").strides() == (96, 8, 32)
    assert Buffer((1, 1, 4, 8), "int8").strides() == (0, 8, 0)
