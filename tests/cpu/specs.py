"""Small specs for tests of the service: the merge kernel compiles in a tenth of a second."""

from __future__ import annotations

from jitattn.jit.spec import Dtype, FwdSpec, MaskKind, MergeSpec, Numerics, Problem, RowClass
from jitattn.tiles import fwd_spec


def merge_spec(arch: str = "sm_80", head_dim_v: int = 16) -> MergeSpec:
    return MergeSpec(out_dtype=Dtype.BF16, head_dim_v=head_dim_v, arch=arch)


def forward_spec(arch: str = "sm_80", head_dim: int = 16, **other: object) -> FwdSpec:
    problem = Problem(
        **{
            "dtype": Dtype.BF16,
            "out_dtype": Dtype.BF16,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": MaskKind.FULL,
            "numerics": Numerics.F32_ACC,
            **other,
        }
    )
    return fwd_spec(problem, arch, RowClass.ROWS16)
