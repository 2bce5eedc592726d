"""Tests tiles and specs of the backward kernels."""

from __future__ import annotations

import itertools

import pytest

from jitattn.kernels.bwd import BwdSpec, bwd_spec, dq_spec, specs_of_backward
from jitattn.kernels.bwd_scores import ScoreGradSpec, score_grad_spec
from jitattn.kernels.bwd_tiles import backward_problem
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.tiles import MAX_SMEM_BYTES
from jitattn.plan.backward import without_block_lists
from jitattn.plan.choices import specs_of
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    ScoreTarget,
    SeqLayout,
    Staging,
    Switch,
)
from jitattn.spec.kernel_spec import Problem, padded_head_dim, spec_from_dict
from jitattn.values.gears import resolve_numerics
from jitattn.values.masks import LocalStride

ARCHS = [f"sm_{number}" for number in MAX_SMEM_BYTES]


def problem(dtype: Dtype = Dtype.BF16, dim: int = 64, dim_v: int = 64, **other: object) -> Problem:
    given = {"mask": MaskKind.CAUSAL, "numerics": resolve_numerics(None, dtype), **other}
    return Problem(dtype=dtype, out_dtype=dtype, head_dim=dim, head_dim_v=dim_v, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("arch", ARCHS)
def test_every_problem_has_a_tile_that_fits(arch: str) -> None:
    limit = MAX_SMEM_BYTES[int(arch[3:])]
    for dtype, dim, dim_v, mask, access in itertools.product(
        Dtype, (1, 16, 72, 128, 256), (8, 64, 256), MaskKind, Access
    ):
        asked = problem(dtype, dim, dim_v, mask=mask, access=access, bias=BiasKind.SAME)
        specs = [bwd_spec(asked, arch), *(score_grad_spec(asked, arch, t) for t in ScoreTarget)]
        for spec in specs:
            tile = spec.tile
            assert spec.smem_bytes <= limit
            # What the templates assert: whole MMA tiles for every warp.
            assert tile.block_q % (16 * tile.warps_q) == 0
            assert tile.block_kv * tile.warps_q % (16 * tile.warps_scores) == 0
            assert tile.block_kv % (16 * tile.warps_keys) == 0
            assert tile.block_q % (16 * tile.warps_dq) == 0
            assert tile.num_warps % tile.warps_keys == 0 == tile.num_warps % tile.warps_dq


def test_a_backward_problem_leaves_out_what_the_lse_holds() -> None:
    asked = problem(
        sinks=Switch.ON,
        fixed_shift=Switch.ON,
        bias=BiasKind.SAME,
        bias_staged=Staging.MATRIX,
        softcap=Switch.ON,
    )
    left = backward_problem(asked)
    assert left == problem(bias=BiasKind.SAME, softcap=Switch.ON, sinks=Switch.ON)


def test_pages_of_any_size_have_one_backward_kernel() -> None:
    kinds = (SeqLayout.PAGED, SeqLayout.PAGED16)
    assert len({backward_problem(problem(kv_layout=kind)) for kind in kinds}) == 1
    families = {spec.family for spec in specs_of_backward(problem(kv_layout=kinds[0]), "sm_90")}
    assert families == {"bwd", "bwd_preprocess", "sum_parts", "kv_scatter"}


def test_a_sink_changes_no_tile() -> None:
    for dim in (64, 128, 256):
        plain, sinks = problem(dim=dim), problem(dim=dim, sinks=Switch.ON)
        assert bwd_spec(plain, "sm_90").tile == bwd_spec(sinks, "sm_90").tile


def test_sums_of_dq_are_in_fragments_where_sequences_are_alike() -> None:
    alike = bwd_spec(problem(dim=80), "sm_90")
    assert alike.in_fragments
    assert alike.dq_columns >= padded_head_dim(80)
    assert dq_spec(alike).to_dict()["block_q"] == alike.tile.block_q
    ragged = bwd_spec(problem(q_layout=SeqLayout.RAGGED, kv_layout=SeqLayout.RAGGED), "sm_90")
    assert not ragged.in_fragments
    assert dq_spec(ragged).family == "sum_parts"


@pytest.mark.parametrize("deterministic", [False, True])
def test_specs_come_back_from_their_text(deterministic: bool) -> None:
    asked = problem(bias=BiasKind.FP32)
    specs = [
        *specs_of_backward(asked, "sm_86", deterministic=deterministic),
        *(score_grad_spec(asked, "sm_86", target) for target in ScoreTarget),
    ]
    for spec in specs:
        assert spec_from_dict(spec.to_dict()) == spec
        assert spec in specs_of([spec.to_choice()])
        assert f"family={spec.family}" in spec.command()


def test_training_is_one_choice() -> None:
    choice = {"family": ["fwd", "bwd"], "dtype": "bf16", "head_dim": 64, "mask": "causal"}
    families = {spec.family for spec in specs_of([choice], ["sm_90"])}
    own = {"fwd", "fwd_sm90", "bwd_sm90"}
    assert families == own | {"bwd", "bwd_preprocess", "bwd_postprocess", "sum_parts"}


@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_of_fp16_parts_are_among_those_of_a_backward_pass(deterministic: bool) -> None:
    asked = problem(Dtype.FP32, key_padding=Switch.ON)
    specs = specs_of_backward(asked, "sm_90", deterministic=deterministic)
    kernels = [spec for spec in specs if spec.family == "bwd"]
    assert [spec.problem.numerics for spec in kernels] == [Numerics.TF32X3, Numerics.F16X3]
    assert [spec.gradients for spec in specs if spec.family == "split_fp32"] == [Switch.ON]
    assert {dq_spec(spec) for spec in kernels} <= set(specs)
    for spec in specs:
        assert spec_from_dict(spec.to_dict()) == spec
        assert spec in specs_of([spec.to_choice()])
    ragged = problem(Dtype.FP32, q_layout=SeqLayout.RAGGED, kv_layout=SeqLayout.RAGGED)
    assert {spec.family for spec in specs_of_backward(ragged, "sm_90")} == {
        "bwd",
        "bwd_preprocess",
        "sum_parts",
        "kv_scatter",
    }


@pytest.mark.parametrize("arch", ARCHS)
def test_tiles_of_fp16_parts_fit_in_the_rows_of_a_scale(arch: str) -> None:
    limit = MAX_SMEM_BYTES[int(arch[3:])]
    for dim, softcap in itertools.product(range(16, 129, 16), Switch):
        asked = problem(Dtype.FP32, dim, dim, numerics=Numerics.F16X3, softcap=softcap)
        spec = bwd_spec(asked, arch)
        assert spec.tile.min_blocks_per_sm * (spec.smem_bytes + 1024) <= limit + 1024
        assert 64 % spec.tile.block_q == 0 == 64 % spec.tile.block_kv
        assert score_grad_spec(asked, arch, ScoreTarget.ROW).problem.numerics is Numerics.TF32X3


def test_only_problems_with_a_kernel_for_fp16_parts_keep_them() -> None:
    asked = problem(Dtype.FP32, numerics=Numerics.F16X3)
    assert backward_problem(asked).numerics is Numerics.F16X3
    for other in ({"dim": 72}, {"dim": 256}, {"q_layout": SeqLayout.RAGGED}):
        left = backward_problem(problem(Dtype.FP32, numerics=Numerics.F16X3, **other))  # type: ignore[arg-type]
        assert left.numerics is Numerics.TF32X3


def test_small_blocks_of_a_pattern_are_lists_to_other_kernels() -> None:
    choice = {
        "family": ["fwd", "bwd", "bwd_scores"],
        "dtype": "bf16",
        "head_dim": 64,
        "mask": "fine_stride",
    }
    masks = {
        spec.family: spec.problem.mask
        for spec in specs_of([choice], ["sm_86"])
        if isinstance(spec, FwdSpec | BwdSpec | ScoreGradSpec)
    }
    lists = MaskKind.BLOCK_LISTS
    assert masks == {"fwd": lists, "bwd": MaskKind.FINE_STRIDE, "bwd_scores": lists}


@pytest.mark.parametrize("arch", ARCHS)
def test_small_blocks_are_gathered_where_a_kernel_block_is_larger(arch: str) -> None:
    for dtype, dim, size in itertools.product(Dtype, (64, 128, 256), (16, 32)):
        listed = problem(dtype, dim, dim, mask=MaskKind.BLOCK_LISTS)
        own = without_block_lists(listed, LocalStride(size, 2, 3), arch)
        block_kv = bwd_spec(own, arch).tile.block_kv
        assert own.mask is (MaskKind.FINE_STRIDE if block_kv > size else MaskKind.LOCAL_STRIDE)
    for rule in (LocalStride(8, 2, 3), LocalStride(16, 2, 3, causal=False), None):
        assert without_block_lists(listed, rule, arch) is listed
