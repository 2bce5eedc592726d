"""The five gears: one dial from accurate to fast, and what each setting guarantees.

A gear is a promise about numbers, never about kernels: `resolve_numerics` maps (gear, dtype) to the
numerics class that keeps the promise, and only that class enters a spec. Several gears may share
one class, so equal kernels stay one kernel.

This module imports no torch and no CuPy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.jit.spec import Dtype, Numerics


@dataclass(frozen=True, slots=True, kw_only=True)
class Gear:
    """One setting of the dial."""

    number: int  #: 0 (most accurate) … 4 (fastest)
    what: str  #: how the products are formed and summed
    #: Guaranteed relative L2 error against fp64 of the same inputs, by input dtype: Gaussian data,
    #: head_dim 128, 4096 keys, fp32 output. Rounding the output adds 2.1e-4 (fp16), 1.7e-3 (bf16).
    rel_l2: dict[Dtype, float]


#: Every gear by number.
GEARS: Final[dict[int, Gear]] = {
    gear.number: gear
    for gear in (
        Gear(
            number=0,
            what="every product split hi + lo, accurate exp2 (16-bit inputs: P split)",
            rel_l2={Dtype.FP16: 2e-6, Dtype.BF16: 1e-5, Dtype.FP32: 2e-6},
        ),
        Gear(
            number=1,
            what="fp32 accumulation, P split hi + lo (fp32 inputs: as 0)",
            rel_l2={Dtype.FP16: 2e-6, Dtype.BF16: 1e-5, Dtype.FP32: 2e-6},
        ),
        Gear(
            number=2,
            what="FlashAttention-2 numerics: fp32 accumulation, P in 16 bits (fp32 inputs: as 0)",
            rel_l2={Dtype.FP16: 4e-4, Dtype.BF16: 3e-3, Dtype.FP32: 2e-6},
        ),
        Gear(
            number=3,
            what="16-bit accumulation promoted to fp32 every 64 keys where that is faster "
            "(fp32 inputs: one TF32 pass)",
            rel_l2={Dtype.FP16: 2e-3, Dtype.BF16: 4e-3, Dtype.FP32: 1e-3},
        ),
        Gear(
            number=4,
            what="INT8 scores with smoothed K; PV in 16 bits, or FP8 on sm_89 (fp32 inputs: as 3)",
            rel_l2={Dtype.FP16: 6e-2, Dtype.BF16: 6e-2, Dtype.FP32: 1e-3},
        ),
    )
}

#: The gear of a call that names none.
DEFAULT_GEAR: Final[dict[Dtype, int]] = {Dtype.FP16: 2, Dtype.BF16: 2, Dtype.FP32: 0}

#: What exists today: (gear, input dtype) → numerics class.
_NUMERICS: Final[dict[tuple[int, Dtype], Numerics]] = {
    (2, Dtype.FP16): Numerics.F32_ACC,
    (2, Dtype.BF16): Numerics.F32_ACC,
    (0, Dtype.FP32): Numerics.TF32X3,
    (1, Dtype.FP32): Numerics.TF32X3,
    (2, Dtype.FP32): Numerics.TF32X3,
}


def default_gear(dtype: Dtype) -> int:
    """Return the gear of a call that names none."""
    return DEFAULT_GEAR[dtype]


def resolve_numerics(gear: int | None, dtype: Dtype) -> Numerics:
    """Return the numerics class that keeps the promise of a gear.

    Parameters
    ----------
    gear : int or None
        0 to 4; None means the default: 2 for 16-bit inputs, 0 for fp32 ones.
    dtype : Dtype
        Element type of q, k and v.

    Raises
    ------
    InvalidInputError
        `gear` is no gear at all.
    UnsupportedError
        The gear exists, but not yet for this dtype.
    """
    if gear is None:
        gear = DEFAULT_GEAR[dtype]
    elif type(gear) is not int or gear not in GEARS:
        raise InvalidInputError(
            f"gear={gear!r}: a gear is an int from 0 (most accurate) to 4 (fastest); "
            f"leave it out for the default, {DEFAULT_GEAR[dtype]} for {dtype} inputs"
        )
    numerics = _NUMERICS.get((gear, dtype))
    if numerics is None:
        there = ", ".join(str(number) for number, known in _NUMERICS if known is dtype)
        raise UnsupportedError(
            f"gear={gear} for {dtype} inputs: this gear is not there yet ({GEARS[gear].what}); "
            f"use gear {there}"
        )
    return numerics
