"""Tests that plans of a single launch name exactly the arguments of their kernels."""

from __future__ import annotations

import pytest

from jitattn.kernels.append import AppendSpec
from jitattn.kernels.combine import CombineGradSpec, CombineSpec
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.kernels.rotary import RotarySpec
from jitattn.plan.append import AppendFacts, append
from jitattn.plan.merge import MergeSizes, merge, merge_gradient
from jitattn.plan.normalize import Side, normalize, normalize_gradient
from jitattn.plan.rotary import RotaryFacts, rotate
from jitattn.plan.step import Plan
from jitattn.spec.enums import Access, Dtype, RotaryStyle, Switch

ARCH, BF16, WIDE = "sm_90", Dtype.BF16, Access.VEC16
NORM = {"dtype": BF16, "head_dim": 64, "groups": 1, "access": WIDE, "arch": ARCH}
COMBINE = {"dtype": BF16, "out_dtype": BF16, "head_dim_v": 64, "arch": ARCH}
SIDE, NO_SLICES = Side(9, 4, (1, 2, 3), 72), Side(0, 4, (1, 2, 3), 0)
SIZES = MergeSizes(2, 3, 9, 4)


def rotary(*, has_index: bool, length: int = 9) -> Plan:
    spec = RotarySpec(dtype=BF16, table_dtype=BF16, interleaved=Switch.OFF, access=WIDE, arch=ARCH)
    words = (3, 1, 2) if has_index else (None, 0, 0)
    shape = (length, 4, 64) if has_index else (2, length, 4, 64)
    facts = RotaryFacts(
        shape, (1, 2, 3, 1), (1, 2, 3, 1), (100, 16), (16, 16), *words, in_place=False, back=True
    )
    return rotate(spec, facts, 132)


def appended(*, has_index: bool, batch: int = 2) -> Plan:
    spec = AppendSpec(dtype=BF16, table_dtype=BF16, rotary=RotaryStyle.NONE, access=WIDE, arch=ARCH)
    steps = (1, 2, 3)
    facts = AppendFacts(
        batch, 1, 1, 8, 4, 64, 64, steps, steps, steps, steps, steps, steps, 20, 16, 5, 5,
        table_word=2 * has_index, used_word=1 * has_index, stop_word=1, q_rows=2,
        q_span=(1, 0, True) if has_index else None,
        rotary=(32, 100, 16, 16) if has_index else None, q_follows=True,
    )  # fmt: skip
    return append(spec, facts)


def norm(*, is_given: bool) -> Plan:
    return normalize(NormSpec(**NORM), SIDE, SIDE, heads_first=True, has_scale=is_given)


def norm_gradient(*, is_given: bool) -> Plan:
    given = {"has_scale": is_given, "has_d_scale": is_given}
    return normalize_gradient(NormGradSpec(**NORM), SIDE, heads_first=False, **given)


PLANS = {
    "norm": lambda has: norm(is_given=has),
    "norm gradient": lambda has: norm_gradient(is_given=has),
    "merge": lambda _: merge(CombineSpec(**COMBINE), SIZES, (1, 2, 3, 4), (5, 6, 7, 8)),
    "merge gradient": lambda has: merge_gradient(
        CombineGradSpec(**COMBINE), SIZES, (1, 2, 3, 4), has_d_lse=has
    ),
    "rotary": lambda has: rotary(has_index=has),
    "append": lambda has: appended(has_index=has),
}


@pytest.mark.parametrize("has", [False, True])
@pytest.mark.parametrize("name", PLANS)
def test_every_argument_is_named(name: str, has: bool) -> None:
    (step,) = PLANS[name](has).steps
    step.spec.arguments.layout(step.numbers, tuple(step.places))  # raises otherwise
    assert step.grid > 0


def test_nothing_is_launched_for_nothing() -> None:
    empty = (
        normalize(NormSpec(**NORM), NO_SLICES, NO_SLICES, heads_first=True, has_scale=False),
        merge(CombineSpec(**COMBINE), SIZES._replace(len_q=0), (1, 2, 3, 4), (5, 6, 7, 8)),
        rotary(has_index=False, length=0),
        appended(has_index=True, batch=0),
    )
    assert [plan.steps for plan in empty] == [()] * 4
