"""`Rotary`: tables of a rotary position embedding."""

from __future__ import annotations

import torch
from torch import Tensor

from jitattn.errors import InvalidInputError
from jitattn.values.frozen import Frozen
from jitattn.values.tensors import strides_of


class Rotary(Frozen):
    """Rotary position embedding: the tables, and the pairing of columns.

    Can be copied and pickled; equals only itself, as its tables are not compared.

    Su et al., "RoFormer", arXiv:2104.09864. The pair (a, b) at position p becomes (a cos - b sin,
    b cos + a sin); columns from rotary_dim on are left alone.

    Parameters
    ----------
    cos, sin : Tensor, [positions, rotary_dim / 2]
        Of the dtype of q, or fp32; for every row that the cache has.
    interleaved : bool
        True: columns 2i and 2i + 1 are a pair (GPT-J). False: columns i and i + rotary_dim / 2
        (GPT-NeoX, Llama).

    Raises
    ------
    InvalidInputError
        The tables are not matrices, or differ in shape, dtype or device.
    """

    __slots__ = ("cos", "interleaved", "sin")

    cos: Tensor
    sin: Tensor
    interleaved: bool

    def __init__(self, cos: Tensor, sin: Tensor, *, interleaved: bool) -> None:
        _check_table("cos", cos)
        _check_table("sin", sin)
        if cos.shape != sin.shape or cos.dtype != sin.dtype or cos.device != sin.device:
            raise InvalidInputError(
                f"Rotary: cos is {cos.dtype} {list(cos.shape)} on {cos.device}, sin {sin.dtype} "
                f"{list(sin.shape)} on {sin.device}: they must be alike"
            )
        if type(interleaved) is not bool:
            raise InvalidInputError(f"Rotary(interleaved={interleaved!r}): it must be a bool")
        hold = object.__setattr__
        hold(self, "cos", cos)
        hold(self, "sin", sin)
        hold(self, "interleaved", interleaved)

    @property
    def rotary_dim(self) -> int:
        """Number of columns that are rotated."""
        return 2 * self.cos.shape[1]


def _check_table(name: str, table: object) -> None:
    if not isinstance(table, Tensor) or table.dim() != 2:
        what = list(table.shape) if isinstance(table, Tensor) else type(table).__name__
        raise InvalidInputError(
            f"Rotary({name}={what}): it must be a tensor [positions, rotary_dim / 2]"
        )
    if table.layout is not torch.strided or not table.is_contiguous():
        strides_of(f"Rotary({name}=...)", table)
