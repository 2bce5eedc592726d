"""dkernel's modules, and the function that combines their results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.api.merge import merge
from jitattn.compat._errors import check
from jitattn.compat.dkernel._checks import check_lse
from jitattn.compat.dkernel._local_stride import LocalStrideSparseAttention
from jitattn.compat.dkernel._module import SparseAttention

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LocalStrideSparseAttention", "SparseAttention", "combine_attn_partitions"]


def combine_attn_partitions(*x: tuple[Tensor, Tensor], hdim: int = 1) -> Tensor:
    """Combine results for the same queries and disjoint sets of keys; differentiable.

    Parameters
    ----------
    x : (Tensor, Tensor)
        Results and LSEs [B, H, Lq] of the parts.
    hdim : 1 or 2
        Which dimension of the results is the heads: both are right here.

    Returns
    -------
    Tensor, as the results
        0 where no part saw anything.

    Raises
    ------
    CheckFailedError
        Without parts, or where one is no result with its LSE.
    """
    check(hdim in (1, 2), f"hdim={hdim}: it must be 1 ([B, H, L, D]) or 2 ([B, L, H, D])")
    check(len(x) > 0, "no parts are given: there must be at least one pair (out, lse)")
    for idx, part in enumerate(x):
        check(
            isinstance(part, tuple | list)
            and len(part) == 2
            and all(isinstance(one, torch.Tensor) for one in part),
            f"part {idx} is a {type(part).__name__}: it must be a pair of tensors, (out, lse), as "
            "attention gives it with return_lse=True",
        )
        check_lse(idx, *part, hdim)
    outs, lses = zip(*x, strict=True)
    return merge(outs, lses, layout="bhsd" if hdim == 1 else "bshd")[0]
