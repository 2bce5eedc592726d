"""Turns whatever can be drawn into a bool tensor [heads, queries, keys]: patterns and masks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.cpu.rules import Rules
from jitattn.errors import InvalidInputError
from jitattn.request.scores import NO_CHANGES
from jitattn.values.function_cache import function_of
from jitattn.values.masks import is_mask, parts_of
from jitattn.values.pairs import visible_pairs

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Both


def heads_of(pattern: Any) -> Tensor:  # noqa: ANN401 - checked here
    """Return a pattern as [heads, rows, columns].

    Raises
    ------
    InvalidInputError
        It is no bool tensor of two or three dimensions.
    """
    is_tensor = isinstance(pattern, torch.Tensor)
    if not is_tensor or pattern.dtype is not torch.bool or pattern.dim() not in (2, 3):
        what = f"{pattern.dtype} {list(pattern.shape)}" if is_tensor else type(pattern).__name__
        raise InvalidInputError(
            f"pattern is {what}: it must be a torch.bool tensor [rows, columns] or [heads, rows, "
            "columns]"
        )
    heads: Tensor = pattern if pattern.dim() == 3 else pattern[None]
    return heads


def seen(pattern: Any, sizes: tuple[int, int, int] | None, batch_idx: int) -> Tensor:  # noqa: ANN401
    """Return what a pattern, a mask or a block mask (ours or torch's) sees, [heads, rows, columns].

    Parameters
    ----------
    sizes : (H, Lq, Lkv), optional
        Heads, queries and keys of a mask; a mask that is the same for all heads gives one.
    batch_idx : int
        The sequence that is shown.

    Raises
    ------
    InvalidInputError
        It is nothing of these, or a mask comes without sizes.
    """
    if is_mask(pattern):
        if sizes is None:
            raise InvalidInputError(
                f"a {type(pattern).__name__} is drawn at sizes=(H, Lq, Lkv): give them"
            )
        return _pairs(parts_of(pattern), sizes, batch_idx)
    if hasattr(pattern, "kv_num_blocks") and hasattr(pattern, "to_dense"):
        dense: Tensor = pattern.to_dense()[batch_idx].bool()
        return dense
    return heads_of(pattern)


def _pairs(parts: Both, sizes: tuple[int, int, int], batch_idx: int) -> Tensor:
    """Return the visible pairs of a mask, by the rules of the CPU path."""
    heads, len_q, len_kv = sizes
    tensors = [] if parts.function is None else list(function_of(None, parts.function).tensors)
    tensors += [one.keep for one in (parts.key_padding, parts.dense) if one is not None]
    device = tensors[0].device if tensors else torch.device("cpu")
    with torch.no_grad():
        rules = Rules.of(parts, NO_CHANGES, len_q, len_kv, (heads, heads))
        hidden = rules.hidden(0, len_q, 0, len_kv, device)
        found = torch.ones(1, 1, len_q, len_kv, dtype=torch.bool, device=device)
        if hidden is not None:
            found = found & ~hidden
        if parts.function is not None:
            found = found & visible_pairs(parts.function, (1, *sizes), device, batch_idx)
    return found[batch_idx if len(found) > 1 else 0]
