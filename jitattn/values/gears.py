"""The five gears: settings from accurate to fast, and the error that each guarantees.

A gear guarantees accuracy, never a kernel: `resolve_numerics` maps (gear, dtype) to a numerics
class that keeps the guarantee, and only that class enters a spec. Several gears may share a class,
and so their kernels.

This module imports no torch and no CuPy.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from jitattn.errors import InvalidInputError
from jitattn.spec.enums import Dtype, Numerics
from jitattn.values.given import integer

if TYPE_CHECKING:
    from collections.abc import Callable


@dataclass(frozen=True, slots=True, kw_only=True)
class Gear:
    """Setting of accuracy and speed."""

    number: int  #: 0 (most accurate) … 4 (fastest)
    what: str  #: precision of products and sums
    #: Guaranteed relative L2 error against fp64 of the same inputs, by input dtype: Gaussian data,
    #: head_dim 128, 4096 keys, fp32 output. Rounding the output adds 2.1e-4 (fp16), 1.7e-3 (bf16).
    rel_l2: dict[Dtype, float]


#: Every gear by number.
GEARS: Final[dict[int, Gear]] = {
    gear.number: gear
    for gear in (
        Gear(
            number=0,
            what="every product split hi + lo, in fp16 parts where queries are long, else in TF32 "
            "(16-bit inputs, whose products are exact: P)",
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
            what="fp16 inputs on GeForce cards of sm_86 and sm_89: P V in fp16, promoted every 64 "
            "keys; else as 2 (fp32 inputs: one product, of fp16 parts or TF32)",
            rel_l2={Dtype.FP16: 2e-3, Dtype.BF16: 4e-3, Dtype.FP32: 1e-3},
        ),
        Gear(
            number=4,
            what="16-bit inputs, long queries, masks of positions: Q and K in 8 bits, of which K "
            "loses its mean, and sums in fp16 of 2048 keys each; else, and on wgmma, as 3",
            rel_l2={Dtype.FP16: 2e-2, Dtype.BF16: 2e-2, Dtype.FP32: 1e-3},
        ),
    )
}

#: Gear of calls that name none, unless `set_default_gear` was called.
DEFAULT_GEAR: Final[dict[Dtype, int]] = {Dtype.FP16: 2, Dtype.BF16: 2, Dtype.FP32: 0}

_SIXTEEN: Final = (
    Numerics.SPLIT_P,
    Numerics.SPLIT_P,
    Numerics.F32_ACC,
    Numerics.F32_ACC,
    Numerics.F32_ACC,
)
#: Architectures on which GeForce cards, and only those, are twice as fast with fp16 accumulators.
FAST_FP16_ACC_ARCHS: Final = ("sm_86", "sm_89")
#: Numerics classes by gear.
_NUMERICS: Final[dict[Dtype, tuple[Numerics, ...]]] = {
    Dtype.FP16: _SIXTEEN,
    Dtype.BF16: _SIXTEEN,
    Dtype.FP32: (
        Numerics.TF32X3,
        Numerics.TF32X3,
        Numerics.TF32X3,
        Numerics.TF32,
        Numerics.TF32,
    ),
}
_default: int | None = None


class DefaultGear:
    """Context returned by `set_default_gear`; restores the previous default."""

    def __init__(self, give_back: Callable[[], object]) -> None:
        self._give_back = give_back

    def __enter__(self) -> None:
        """Do nothing; the gear is already set."""

    def __exit__(self, *error: object) -> None:
        """Restore the previous default."""
        self._give_back()


def set_default_gear(gear: int | None) -> DefaultGear:
    """Set the gear of all later calls in this process that name none.

    Parameters
    ----------
    gear : int or None
        0 to 4; None is the default of each dtype, 2 for 16-bit inputs and 0 for fp32 ones.

    Returns
    -------
    DefaultGear
        A context that restores the previous default; it may be ignored.

    Raises
    ------
    InvalidInputError
        It is no gear.

    Examples
    --------
    >>> import jitattn
    >>> with jitattn.set_default_gear(1):
    ...     jitattn.get_default_gear()
    1
    >>> jitattn.get_default_gear() is None
    True
    """
    global _default
    if gear is not None:
        _check(gear, None)
    before, _default = _default, gear
    return DefaultGear(functools.partial(set_default_gear, before))


def get_default_gear() -> int | None:
    """Return the gear set by `set_default_gear`, or None."""
    return _default


def gear_of(gear: int | None, dtype: Dtype) -> int:
    """Return the gear of a call: `gear`, or the default if None."""
    if gear is None:
        gear = _default
    return DEFAULT_GEAR[dtype] if gear is None else gear


def resolve_numerics(
    gear: int | None, dtype: Dtype, *, has_fast_fp16_acc: bool = False
) -> Numerics:
    """Return the numerics class that keeps the guarantee of a gear.

    Parameters
    ----------
    gear : int or None
        0 to 4; None means the default: 2 for 16-bit inputs, 0 for fp32 ones.
    dtype : Dtype
        Element type of q, k and v.
    has_fast_fp16_acc : bool
        Whether the GPU multiplies faster into fp16 accumulators.

    Raises
    ------
    InvalidInputError
        `gear` is no gear at all.
    """
    if gear is None:
        gear = DEFAULT_GEAR[dtype]
    _check(gear, dtype)
    if gear >= 3 and has_fast_fp16_acc and dtype is Dtype.FP16:
        return Numerics.F16_ACC
    return _NUMERICS[dtype][gear]


def _check(gear: object, dtype: Dtype | None) -> None:
    if integer(gear) not in GEARS:
        usual = "2 for 16-bit inputs and 0 for fp32 ones"
        if dtype is not None:
            usual = f"{DEFAULT_GEAR[dtype]} for {dtype} inputs"
        raise InvalidInputError(
            f"gear={gear!r}: a gear is an int from 0 (most accurate) to 4 (fastest); "
            f"leave it out for the default, {usual}"
        )
