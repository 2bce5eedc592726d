"""FlashAttention's functions, and the other names of the original's module."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat import flash_attn_2_cuda as flash_attn_gpu
from jitattn.compat.flash_attn._functions import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from jitattn.compat.flash_attn._kvcache import flash_attn_with_kvcache
from jitattn.compat.flash_attn._operators import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
    _varlen_fwd,
    _wrapped_flash_attn_backward,
    _wrapped_flash_attn_forward,
    _wrapped_flash_attn_varlen_backward,
    _wrapped_flash_attn_varlen_forward,
)
from jitattn.compat.flash_attn._translate import DMASK_BLOCK, in_rows

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "FlashAttnFunc",
    "FlashAttnKVPackedFunc",
    "FlashAttnQKVPackedFunc",
    "FlashAttnVarlenFunc",
    "FlashAttnVarlenKVPackedFunc",
    "FlashAttnVarlenQKVPackedFunc",
    "_flash_attn_backward",
    "_flash_attn_forward",
    "_flash_attn_varlen_backward",
    "_flash_attn_varlen_forward",
    "_get_block_size_n",
    "_varlen_fwd",
    "_wrapped_flash_attn_backward",
    "_wrapped_flash_attn_forward",
    "_wrapped_flash_attn_varlen_backward",
    "_wrapped_flash_attn_varlen_forward",
    "flash_attn_func",
    "flash_attn_gpu",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "maybe_contiguous",
    "round_multiple",
]


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """Return a tensor with contiguous columns, copied if necessary."""
    return None if x is None else in_rows(x)


def round_multiple(x: int, m: int) -> int:
    """Round x up to a multiple of m."""
    return -(-x // m) * m


def _apply_of(function: Callable[..., Any]) -> staticmethod[..., Any]:
    """Return the `apply` of a function class: the function with one further argument."""

    def apply(*given: Any) -> Any:  # noqa: ANN401 - the function's
        """Call the function; the last argument says whether autograd may follow."""
        *own, is_grad_enabled = given
        with torch.set_grad_enabled(bool(is_grad_enabled) and torch.is_grad_enabled()):
            return function(*own)

    return staticmethod(apply)


class FlashAttnFunc:
    """The function class of `flash_attn_func`; `apply` takes all arguments and is_grad_enabled."""

    apply = _apply_of(flash_attn_func)


class FlashAttnKVPackedFunc:
    """The function class of `flash_attn_kvpacked_func`."""

    apply = _apply_of(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc:
    """The function class of `flash_attn_qkvpacked_func`."""

    apply = _apply_of(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc:
    """The function class of `flash_attn_varlen_func`; `block_table` precedes the last argument."""

    apply = _apply_of(flash_attn_varlen_func)


class FlashAttnVarlenKVPackedFunc:
    """The function class of `flash_attn_varlen_kvpacked_func`."""

    apply = _apply_of(flash_attn_varlen_kvpacked_func)


class FlashAttnVarlenQKVPackedFunc:
    """The function class of `flash_attn_varlen_qkvpacked_func`."""

    apply = _apply_of(flash_attn_varlen_qkvpacked_func)


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Return the key block size by which the maximum in S_dmask is updated."""
    del device, head_dim, is_dropout, is_causal
    return DMASK_BLOCK
