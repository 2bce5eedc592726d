"""FlashAttention's functions, and what else stands in the original's module of this name."""

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
    """Return a tensor whose columns are neighbours: copied if they are not."""
    return None if x is None else in_rows(x)


def round_multiple(x: int, m: int) -> int:
    """Return the least multiple of m that is not below x."""
    return -(-x // m) * m


def _apply_of(function: Callable[..., Any]) -> staticmethod[..., Any]:
    """Return what the original's class of a function has as `apply`: one argument more."""

    def apply(*given: Any) -> Any:  # noqa: ANN401 - the function's
        """Call the function; the last argument says whether autograd may follow."""
        *own, is_grad_enabled = given
        with torch.set_grad_enabled(bool(is_grad_enabled) and torch.is_grad_enabled()):
            return function(*own)

    return staticmethod(apply)


class FlashAttnFunc:
    """`flash_attn_func`, for those who call its `apply`: all arguments, and is_grad_enabled."""

    apply = _apply_of(flash_attn_func)


class FlashAttnKVPackedFunc:
    """`flash_attn_kvpacked_func`, likewise."""

    apply = _apply_of(flash_attn_kvpacked_func)


class FlashAttnQKVPackedFunc:
    """`flash_attn_qkvpacked_func`, likewise."""

    apply = _apply_of(flash_attn_qkvpacked_func)


class FlashAttnVarlenFunc:
    """`flash_attn_varlen_func`, likewise; `block_table` before the last."""

    apply = _apply_of(flash_attn_varlen_func)


class FlashAttnVarlenKVPackedFunc:
    """`flash_attn_varlen_kvpacked_func`, likewise."""

    apply = _apply_of(flash_attn_varlen_kvpacked_func)


class FlashAttnVarlenQKVPackedFunc:
    """`flash_attn_varlen_qkvpacked_func`, likewise."""

    apply = _apply_of(flash_attn_varlen_qkvpacked_func)


def _get_block_size_n(
    device: torch.device, head_dim: int, is_dropout: bool, is_causal: bool
) -> int:
    """Return the keys between two updates of the maximum that S_dmask is relative to."""
    del device, head_dim, is_dropout, is_causal
    return DMASK_BLOCK
