"""Tests the tiles of captured-gradient kernels."""

from __future__ import annotations

import itertools

import pytest

import jitattn
from jitattn.kernels.bwd_captured import captured_grad_spec
from jitattn.kernels.matrix import SLOPES_AND_TABLE, problem
from jitattn.kernels.tiles import max_smem_bytes
from jitattn.spec.enums import Dtype, MaskKind, Switch


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
def test_shared_memory_fits(arch: str) -> None:
    """With the scores that the function is given, which are not of the dynamic size."""
    dims = (*range(8, 257, 8), 33)
    masks = (MaskKind.FULL, MaskKind.BLOCK_LISTS)
    for dtype, dim, mask, sinks in itertools.product(Dtype, dims, masks, Switch):
        given = problem(dtype, dim, mask, sinks=sinks, function=SLOPES_AND_TABLE)
        spec = captured_grad_spec(given, arch)
        fixed = 4 * spec.tile.block_q * spec.tile.block_kv
        room = (spec.smem_bytes + fixed) * spec.tile.min_blocks_per_sm
        assert room <= max_smem_bytes(arch), (dtype, dim, mask, sinks)


def test_a_function_without_a_derivative_has_no_kernel() -> None:
    for function in ("", "||score.f32;head.i32;cast.f32 1;add.f32 0 2|3|-"):
        given = problem(Dtype.BF16, 64, function=function)
        with pytest.raises(jitattn.UnsupportedError, match="reads a floating tensor"):
            captured_grad_spec(given, "sm_80")
