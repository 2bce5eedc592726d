"""Validates the norm of cosine attention, and derives the upper bound of its scores.

A known bound replaces the running row maximum of the online softmax; without one, or with one that
is too large, the kernel tracks the maximum. The result is the softmax in both cases.
"""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.score_checks import vector
from jitattn.values.norm import L2Norm, check_kind
from jitattn.values.sequences import Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call

#: Score bounds, base 2, within which weights and their sums stay in the range of their dtype.
_WIDEST_FP16: Final = 14.5
_WIDEST: Final = 60.0
_LARGEST_FP16: Final = 14.0


class RowOrder(NamedTuple):
    """The order of rows and heads in q and k."""

    heads_first: bool
    q_is_flat: bool
    k_is_flat: bool

    @classmethod
    def of(cls, call: Call) -> RowOrder:
        """Return the order in a call's tensors."""
        q_is_flat = isinstance(call.q_seqs, Ragged)
        is_bhsd = call.layout == "bhsd"
        return cls(is_bhsd and not q_is_flat, q_is_flat, isinstance(call.kv_seqs, Ragged))


def check(norm: L2Norm, q: Tensor, heads: int, call: Call) -> int:
    """Check a norm against the tensors of a call; return the address of its head_scale.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    check_kind(norm)
    if q.shape[-1] % norm.groups:
        raise InvalidInputError(
            f"L2Norm(groups={norm.groups}): it must divide head_dim, which is {q.shape[-1]}"
        )
    scale = norm.head_scale
    if scale is not None and (not isinstance(scale, torch.Tensor) or scale.device != q.device):
        raise InvalidInputError(
            f"L2Norm(head_scale) must be a tensor [{heads}] on {q.device}; move it with .to()"
        )
    address = vector("L2Norm(head_scale)", scale, ((heads,),), is_copied=True)
    if isinstance(call.kv_seqs, Paged) and norm.normalize:
        raise UnsupportedError(
            "qk_norm with pages: keys are normalised once, when they are put into the cache; do "
            "that with jitattn.l2norm, and pass L2Norm(normalize=False)"
        )
    return address


def shift_of(norm: L2Norm, scale: float, dtype: torch.dtype) -> float | None:
    """Return the fixed softmax shift, base 2, in place of -max; None: track the row maximum."""
    if norm.head_scale is not None and norm.bound is None:
        return None
    highest = abs(scale) * norm.groups * (1.0 if norm.bound is None else norm.bound)
    highest *= math.log2(math.e)
    if dtype is torch.float16:
        return min(0.0, _LARGEST_FP16 - highest) if highest <= _WIDEST_FP16 else None
    return 0.0 if highest <= _WIDEST else None


def call_of_normalized(call: Call, scale: float) -> Call:
    """Return the call for already normalised q and k, with an explicit scale."""
    norm = call.scores.qk_norm
    if norm is not None:
        is_bounded = norm.head_scale is None or norm.bound is not None
        bound = None if norm.head_scale is None else norm.bound
        norm = _normalized(norm.groups, bound) if is_bounded else None
    return call._replace(scale=scale, scores=call.scores._replace(qk_norm=norm))


@functools.lru_cache(maxsize=256)
def _normalized(groups: int, bound: float | None) -> L2Norm:
    return L2Norm(groups, None, bound, normalize=False)
