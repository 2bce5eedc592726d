"""Tests gears: names, default, and the numerics that meet their guarantees."""

from __future__ import annotations

import pytest
import torch

import jitattn
from jitattn.jit.device import Device
from jitattn.spec.enums import Dtype, Numerics
from jitattn.values.gears import GEARS, gear_of, resolve_numerics


def test_numerics_of_gears() -> None:
    sixteen = [Numerics.SPLIT_P] * 2 + [Numerics.F32_ACC] * 3
    assert [resolve_numerics(gear, Dtype.FP16) for gear in GEARS] == sixteen
    assert [resolve_numerics(gear, Dtype.BF16) for gear in GEARS] == sixteen
    wide = [Numerics.TF32X3] * 3 + [Numerics.TF32] * 2
    assert [resolve_numerics(gear, Dtype.FP32) for gear in GEARS] == wide
    fast = [resolve_numerics(gear, Dtype.FP16, has_fast_fp16_acc=True) for gear in GEARS]
    assert fast == [*sixteen[:3], Numerics.F16_ACC, Numerics.F16_ACC]
    assert resolve_numerics(3, Dtype.BF16, has_fast_fp16_acc=True) is Numerics.F32_ACC


@pytest.mark.parametrize(
    ("name", "arch", "expected"),
    [
        ("NVIDIA GeForce RTX 3090", "sm_86", True),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "sm_89", True),
        ("NVIDIA RTX A6000", "sm_86", False),
        ("NVIDIA L40S", "sm_89", False),
        ("NVIDIA A100-SXM4-80GB", "sm_80", False),
        ("NVIDIA GeForce RTX 5090", "sm_120", False),
    ],
)
def test_which_cards_are_fast_with_fp16_accumulators(name: str, arch: str, expected: bool) -> None:
    assert Device(index=0, name=name, arch=arch, num_sms=1).has_fast_fp16_acc is expected


def test_errors_grow_with_the_gear() -> None:
    for dtype in Dtype:
        errors = [gear.rel_l2[dtype] for gear in GEARS.values()]
        assert errors == sorted(errors)


def test_the_default_is_set_and_given_back() -> None:
    assert jitattn.get_default_gear() is None
    assert gear_of(None, Dtype.FP32) == 0
    with jitattn.set_default_gear(1):
        with jitattn.set_default_gear(3):
            assert jitattn.get_default_gear() == 3
        assert jitattn.get_default_gear() == 1
        assert gear_of(None, Dtype.BF16) == 1
        assert gear_of(2, Dtype.BF16) == 2
    assert jitattn.get_default_gear() is None
    jitattn.set_default_gear(2)
    assert jitattn.get_default_gear() == 2
    jitattn.set_default_gear(None)
    for wrong in (5, -1, 2.0, True):
        with pytest.raises(jitattn.InvalidInputError, match="gear"):
            jitattn.set_default_gear(wrong)  # type: ignore[arg-type]


def test_a_call_takes_the_default() -> None:
    q = torch.randn(1, 4, 2, 16)
    with jitattn.set_default_gear(3):
        assert jitattn.explain(q, q, q).gear == 3
        assert jitattn.explain(q, q, q, gear=1).gear == 1
    assert jitattn.explain(q, q, q).gear == 0


def test_every_gear_runs_on_the_cpu() -> None:
    q = torch.randn(1, 4, 2, 16, generator=torch.Generator().manual_seed(0))
    expected = jitattn.attention(q, q, q)
    for gear in GEARS:
        assert torch.equal(jitattn.attention(q, q, q, gear=gear), expected)


@pytest.mark.parametrize("wrong", [0, 32, 64.0, True])
def test_tile_rows_are_checked(wrong: object) -> None:
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(jitattn.InvalidInputError, match="tile_rows"):
        jitattn.attention(q, q, q, tile_rows=wrong)
    for rows in (16, 64, 128):
        jitattn.attention(q, q, q, tile_rows=rows)
