"""Score and mask functions over whole score matrices, by torch.vmap: called, not traced."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import MaskMod


class _Indexed(TorchFunctionMode):
    """Lets torch.vmap see tensors that are indexed by its own scalars."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - as func
        """Index by an operator that torch.vmap knows."""
        if func is torch.Tensor.__getitem__:
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            if all(isinstance(one, Tensor) for one in index):
                return torch.ops.aten.index.Tensor(args[0], [one.long() for one in index])
        return func(*args, **(kwargs or {}))


def over_pairs(
    function: Callable[..., Any],
    score: Tensor | None,
    sizes: tuple[int, ...],
    device: torch.device | str,
    first_batch: int = 0,
) -> Tensor:
    """Return a function's values [B, H, Lq, Lkv].

    Parameters
    ----------
    function : callable
        Of (score, b, h, q_idx, kv_idx), or of the indices alone.
    score : Tensor, [B, H, Lq, Lkv], optional
    sizes : (B, H, Lq, Lkv)
    device : torch.device or str
    first_batch : int
        Number of the first sequence.
    """
    indices = [torch.arange(size, dtype=torch.int32, device=device) for size in sizes]
    indices[0] = indices[0] + first_batch
    first = () if score is None else (score,)
    mapped = function
    for axis in (3, 2, 1, 0):
        own = [0 if axis == place else None for place in range(4)]
        mapped = torch.vmap(mapped, in_dims=(*(0 for _ in first), *own))
    with _Indexed():
        found: Tensor = mapped(*first, *indices)
    return found


def moved_score(
    function: Callable[..., Any], offset: QOffset, sizes: tuple[int, ...]
) -> Callable[..., Any]:
    """Return a score function whose q_idx counts from an offset."""
    return lambda s, b, h, q_idx, kv_idx: function(s, b, h, _from(q_idx, b, offset, sizes), kv_idx)


def _from(q_idx: Any, b: Any, offset: QOffset, sizes: tuple[int, ...]) -> Any:  # noqa: ANN401
    if isinstance(offset, str):
        return q_idx + (sizes[3] - sizes[2])
    return q_idx + (offset[b] if isinstance(offset, Tensor) else offset)


def visible_pairs(
    mask: MaskMod, sizes: tuple[int, ...], device: torch.device | str, first_batch: int = 0
) -> Tensor:
    """Return which pairs [B, H, Lq, Lkv] a mask function sees."""
    kind, parts = mask.parts
    if kind:
        found = [visible_pairs(part, sizes, device, first_batch) for part in parts]
        return ~found[0] if kind == "not" else _COMBINED[kind](*found)

    def moved(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401
        return mask.function(b, h, _from(q_idx, b, mask.q_offset, sizes), kv_idx)

    return over_pairs(moved, None, sizes, device, first_batch).expand(sizes).bool()


_COMBINED = {"and": torch.logical_and, "or": torch.logical_or}
