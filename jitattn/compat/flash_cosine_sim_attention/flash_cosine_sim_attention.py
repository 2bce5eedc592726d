"""The functions of the package, and the other names of the original's module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from jitattn.api.l2norm import l2norm as _l2norm
from jitattn.compat.flash_cosine_sim_attention import (
    debug,
    flash_cosine_sim_attention,
    l2norm_tensors,
    plain_cosine_sim_attention,
)

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "FlashCosineSimAttention",
    "debug",
    "flash_cosine_sim_attention",
    "flash_cosine_sim_attention_cpu",
    "flash_cosine_sim_attention_cuda",
    "grouped_l2norm",
    "l2norm",
    "l2norm_tensors",
    "plain_cosine_sim_attention",
]


def l2norm(t: Tensor) -> Tensor:
    """Scale vectors to length 1; differentiable."""
    return _l2norm(t)


def grouped_l2norm(t: Tensor, groups: int = 1) -> Tensor:
    """Scale equal slices of vectors to length 1, each by itself; differentiable."""
    return _l2norm(t, groups)


def flash_cosine_sim_attention_cuda(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool
) -> Tensor:
    """Compute attention over q and k without normalising them; see `l2norm_tensors`."""
    return flash_cosine_sim_attention(q, k, v, mask, None, scale, 1, causal, l2norm_qk=False)


def flash_cosine_sim_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    row_tile_size: int = 512,
    col_tile_size: int = 512,
) -> Tensor:
    """Compute attention over q and k without normalising them; tile arguments are ignored."""
    del row_tile_size, col_tile_size
    return flash_cosine_sim_attention_cuda(q, k, v, mask, scale, causal)


class FlashCosineSimAttention:
    """The function class of `flash_cosine_sim_attention_cuda`, with `apply`."""

    apply = staticmethod(flash_cosine_sim_attention_cuda)
