"""Biases of positions alone, and the base of all."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Final, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.compat.xformers.ops.fmha._lengths import moved
from jitattn.compat.xformers.ops.fmha._reach import Reach
from jitattn.errors import InvalidInputError, UnsupportedError

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Paged, Ragged


class Translated(NamedTuple):
    """Arguments of `jitattn.attention` that a bias becomes."""

    mask: Mask
    bias: Tensor | None = None
    q_seqs: Ragged | None = None
    kv_seqs: Ragged | Paged | None = None
    page_size: int = 0  #: of keys in pages


class AttentionBias:
    """Base of what `attn_bias` may be, besides a tensor."""

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Return the bias as a tensor: 0 where a key is visible, -inf elsewhere.

        Parameters
        ----------
        shape : tuple of int
            [*, num_queries, num_keys].
        """
        raise UnsupportedError(f"{type(self).__name__} has no tensor of its own")

    def _translated(self) -> Translated:
        raise UnsupportedError(
            f"attn_bias is a {type(self).__name__}, which has no kernel: pass "
            "attn_bias.materialize(shape, dtype, device)"
        )


def as_bias(seen: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Return 0 where pairs are visible and -inf elsewhere, expanded to a shape."""
    hidden = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
    return hidden.masked_fill_(~seen, float("-inf")).expand(shape)


class _Positional(AttentionBias):
    """A bias that only hides keys by their positions."""

    def _reach(self) -> Reach:
        raise NotImplementedError

    def to(self, device: torch.device | str) -> AttentionBias:
        """Return the bias itself: it has no tensors."""
        del device
        return self

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Return 0 where a key is visible, -inf elsewhere, [*, num_queries, num_keys]."""
        return as_bias(self._reach().seen(shape[-2], shape[-1], device), shape, dtype)

    def _translated(self) -> Translated:
        reach = self._reach()
        if is_dynamo_compiling():
            return Translated(reach.rule(False))
        return _of_reach(reach)


@functools.lru_cache(maxsize=256)
def _of_reach(reach: Reach) -> Translated:
    return Translated(reach.rule(False))


_TOP_LEFT: Final = Reach(None, 0, from_bottom_right=False)
_BOTTOM_RIGHT: Final = Reach(None, 0)


class LowerTriangularMask(_Positional):
    """Causal mask from the top left: query i sees the keys up to i."""

    def __init__(self, device: torch.device | None = None) -> None:
        del device

    def _reach(self) -> Reach:
        return _TOP_LEFT

    def add_bias(self, bias: Tensor) -> LowerTriangularMaskWithTensorBias:
        """Return the mask with a tensor [B, H, Lq, Lkv] added to the scores."""
        return LowerTriangularMaskWithTensorBias(bias)


class LowerTriangularMaskWithTensorBias(LowerTriangularMask):
    """`LowerTriangularMask` with a tensor [B, H, Lq, Lkv] added to the scores; differentiable."""

    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self._bias = bias

    def to(self, device: torch.device | str) -> LowerTriangularMaskWithTensorBias:
        """Return the mask with its tensor on a device."""
        return LowerTriangularMaskWithTensorBias(moved(self._bias, device))

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Return the sum of mask and tensor."""
        return super().materialize(shape, dtype, device) + self._bias

    def _translated(self) -> Translated:
        return Translated(self._reach().rule(False), self._bias)


class LowerTriangularFromBottomRightMask(_Positional):
    """Causal mask from the bottom right: the last query sees all keys."""

    def _reach(self) -> Reach:
        return _BOTTOM_RIGHT

    def make_local_attention(
        self, window_size: int
    ) -> LowerTriangularFromBottomRightLocalAttentionMask:
        """Return the mask with a window of so many keys, the query's own among them."""
        return LowerTriangularFromBottomRightLocalAttentionMask(window_size)


@dataclasses.dataclass
class LowerTriangularFromBottomRightLocalAttentionMask(LowerTriangularFromBottomRightMask):
    """Causal mask from the bottom right, with a window of `window_size` keys."""

    _window_size: int

    def __post_init__(self) -> None:
        check_window(self._window_size)

    def _reach(self) -> Reach:
        return Reach(self._window_size - 1, 0)


@dataclasses.dataclass
class LocalAttentionFromBottomRightMask(_Positional):
    """Window from the bottom right: `window_left` keys before a query's own, and right after it."""

    window_left: int
    window_right: int

    def __post_init__(self) -> None:
        for name in ("window_left", "window_right"):
            if getattr(self, name) < 0:
                raise InvalidInputError(f"{name}={getattr(self, name)}: it must be at least 0")

    def _reach(self) -> Reach:
        return Reach(self.window_left, self.window_right)


def check_window(window_size: int) -> None:
    """Refuse a window without a key."""
    if window_size <= 0:
        raise InvalidInputError(f"window_size={window_size}: it must be at least 1")
