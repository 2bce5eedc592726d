"""`L2Norm`: cosine attention, with q and k of length 1 and scores bounded by their scale.

Henry et al., "Query-Key Normalization for Transformers", arXiv:2010.04245.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from jitattn.errors import InvalidInputError
from jitattn.values.given import integer, real
from jitattn.values.tensors import MAX_HEAD_DIM

if TYPE_CHECKING:
    from torch import Tensor

#: Default scale of scores.
DEFAULT_SCALE: Final = 8.0


@dataclass(frozen=True, slots=True, eq=False)
class L2Norm:
    """Cosine attention: scores are scale * head_scale * cos(q, k).

    Can be copied and pickled; equals only itself, as `head_scale` is not compared.

    Parameters
    ----------
    groups : int
        Number of equal slices of a vector, each normalized separately; |score| is then at most
        scale * groups. It must divide D.
    head_scale : Tensor, [Hq], optional
        Learned factor per head, of the dtype of q or fp32.
    bound : float, optional
        Upper bound of |head_scale| (with normalize=False: of the factor of q), guaranteed by the
        caller. Without it, head_scale requires a running maximum.
    normalize : bool
        False: q and k are already normalized (by `l2norm`, possibly rotated since); the bound must
        hold, and head_scale is not applied: multiply q by it.
    """

    groups: int = 1
    head_scale: Tensor | None = None
    bound: float | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        """Refuse invalid fields."""
        groups, bound = integer(self.groups), self.bound
        if groups is None or not 1 <= groups <= MAX_HEAD_DIM:
            raise InvalidInputError(
                f"L2Norm(groups={self.groups!r}): it must be an int from 1 to {MAX_HEAD_DIM}"
            )
        number = None if bound is None else real(bound)
        if bound is not None and (number is None or not 0 < number < math.inf):
            raise InvalidInputError(f"L2Norm(bound={bound!r}): it must be a number above 0")
        if groups is not self.groups or number is not bound:  # a numpy scalar
            object.__setattr__(self, "groups", groups)
            object.__setattr__(self, "bound", number)
        if bound is not None and self.normalize and self.head_scale is None:
            raise InvalidInputError(
                f"L2Norm(bound={bound!r}): it bounds head_scale, and there is none; leave it out"
            )
        if self.head_scale is not None and not self.normalize:
            raise InvalidInputError(
                "L2Norm(head_scale=..., normalize=False): nothing would apply the scale; multiply "
                "q by it"
            )


def check_kind(norm: object) -> None:
    """Refuse a value that is not an `L2Norm`."""
    if norm is not None and not isinstance(norm, L2Norm):
        raise InvalidInputError(
            f"qk_norm is a {type(norm).__name__}: it must be a jitattn.L2Norm, or None"
        )
