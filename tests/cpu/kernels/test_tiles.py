"""Tests that forward tiles fit shared memory, and that split counts are sensible."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jitattn.errors import UnsupportedError
from jitattn.jit.device import arch_of
from jitattn.kernels.fwd import fwd_spec
from jitattn.kernels.tiles import choose_splits, heads_per_tile, max_smem_bytes
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    RowClass,
    SeqLayout,
    Staging,
    Switch,
)
from jitattn.spec.kernel_spec import Problem
from jitattn.values.gears import resolve_numerics

ARCHS = ("sm_80", "sm_86", "sm_87", "sm_89", "sm_90", "sm_100", "sm_103", "sm_120")


@given(
    dtype=st.sampled_from(Dtype),
    head_dim=st.integers(1, 256),
    head_dim_v=st.integers(1, 256),
    arch=st.sampled_from(ARCHS),
    rows=st.sampled_from(RowClass),
    access=st.sampled_from(Access),
)
def test_every_problem_has_a_tile_that_fits(
    dtype: Dtype, head_dim: int, head_dim_v: int, arch: str, rows: RowClass, access: Access
) -> None:
    problem = Problem(
        dtype=dtype,
        out_dtype=dtype,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        mask=MaskKind.CAUSAL,
        numerics=resolve_numerics(None, dtype),
        access=access,
    )
    spec = fwd_spec(problem, arch, rows)
    assert spec.smem_bytes <= max_smem_bytes(arch)
    assert spec.num_threads <= 256
    tile = spec.tile
    assert tile.block_q % (16 * tile.warps_q) == 0
    assert tile.block_kv % (16 * tile.warps_kv) == 0
    if rows is not RowClass.MANY:
        assert tile.block_q == rows


@pytest.mark.parametrize("arch", ["sm_75", "sm_70"])
def test_old_architectures_are_refused_by_name(arch: str) -> None:
    with pytest.raises(UnsupportedError, match=f"{arch}.*sm_80 or newer"):
        max_smem_bytes(arch)


def test_old_devices_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"sm_75.*CPU"):
        arch_of(7, 5)
    assert [arch_of(8, 6), arch_of(9, 0), arch_of(12, 0)] == ["sm_86", "sm_90", "sm_120"]


@given(
    num_tiles=st.integers(1, 5000),
    num_kv_blocks=st.integers(0, 20000),
    num_slots=st.integers(1, 1000),
)
def test_splits_stay_within_reason(num_tiles: int, num_kv_blocks: int, num_slots: int) -> None:
    splits = choose_splits(num_tiles, num_kv_blocks, num_slots)
    assert 1 <= splits <= 128
    assert splits == 1 or splits * 2 <= num_kv_blocks
    if num_tiles >= num_slots:
        assert splits == 1


def test_long_history_fills_the_gpu() -> None:
    assert choose_splits(64, 256, 264) == 4  # 8 sequences x 8 kv heads on 132 SMs, 2 CTAs each
    assert choose_splits(8, 1024, 132) == 16
    assert choose_splits(64, 3, 264) == 1  # nothing to split


@given(len_q=st.integers(1, 5000), group=st.integers(1, 64))
def test_heads_are_packed_all_or_none(len_q: int, group: int) -> None:
    packed = heads_per_tile(len_q, group)
    assert packed in (1, group)
    if len_q * group <= 64:
        assert packed == group
    if len_q % 128 == 0:
        assert packed == 1


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_120"])
@pytest.mark.parametrize("dtype", list(Dtype))
def test_tiles_of_a_bias_fit(arch: str, dtype: Dtype) -> None:
    """Wherever validation stages a bias and a mask, there is a tile with room for them."""
    for dim, rows, mask, layout in itertools.product(
        range(1, 257, 5), RowClass, (MaskKind.CAUSAL, MaskKind.BLOCK_LISTS), SeqLayout
    ):
        if dim * dtype.bytes > 512 or layout is SeqLayout.RAGGED:
            continue
        problem = Problem(
            dtype=dtype,
            out_dtype=dtype,
            head_dim=dim,
            head_dim_v=dim,
            mask=mask,
            numerics=resolve_numerics(None, dtype),
            kv_layout=layout,
            bias=BiasKind.FP32,
            dense=Switch.ON,
            bias_staged=Staging.MATRIX,
            dense_staged=Staging.MATRIX,
        )
        spec = fwd_spec(problem, arch, rows)
        assert spec.smem_bytes <= max_smem_bytes(arch)
        assert spec.tile.block_kv // spec.tile.warps_kv % 16 == 0
