"""Takes the functions of a call apart from its mask, and traces them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from jitattn.request.mask_blocks import without_hidden_blocks
from jitattn.values.function_cache import function_of
from jitattn.values.functions import MovedScore
from jitattn.values.mask_functions import check_q_offset
from jitattn.values.masks import Both, MaskMod, is_mask, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.values.functions import Function
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

#: Types of masks that may have a function in them.
MAY_HOLD_FUNCTIONS: Final = frozenset((MaskMod, Both))


def traced_apart(
    q: Any,  # noqa: ANN401 - Tensor, or an array of another library
    k: Any,  # noqa: ANN401
    mask: Mask,
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None,
    q_offset: QOffset,
    layout: str,
    q_seqs: QSequences,
    kv_seqs: KvSequences,
    *,
    finds_blocks: bool = True,
) -> tuple[Mask, Function | None]:
    """Return the mask of a call without its function, and what was traced, if anything.

    Parameters
    ----------
    q, k, mask, score_mod, q_offset, layout, q_seqs, kv_seqs
        Of `attention`.
    finds_blocks : bool
        Let the mask say which blocks its function hides, on a GPU.

    Raises
    ------
    InvalidInputError, UnsupportedError
        As `traced`.
    """
    if not is_mask(mask):  # refused later, with all that is said of masks
        return mask, None
    parts = parts_of(mask)
    if score_mod is None and parts.function is None:
        return mask, None
    if parts.function is not None:
        mask = parts.rule
        if parts.key_padding is not None or parts.dense is not None:
            mask = Both(parts.rule, parts.key_padding, parts.dense)
    visible = parts.function
    score: Callable[..., Any] | MovedScore | None = score_mod
    if not (type(q_offset) is int and q_offset == 0):
        check_q_offset("q_offset", q_offset)
        visible = None if visible is None else visible.moved(q_offset)
        score = None if score_mod is None else MovedScore(score_mod, q_offset)
    if not isinstance(q, Tensor) or not q.is_cuda:
        return mask, function_of(score, visible)
    if score is not None:
        visible = _with_hidden_keys(visible, parts)
    function = function_of(score, visible)
    if not finds_blocks:
        return mask, function
    return without_hidden_blocks(mask, function, q, k, layout, q_seqs, kv_seqs)


def _with_hidden_keys(visible: MaskMod | None, parts: Both) -> MaskMod | None:
    """Add key padding and a dense mask to a mask function, which follows the score function.

    Kernels would hide these pairs before, by a score of -inf, of which the function makes anything.
    """
    found = [] if visible is None else [visible]
    if parts.key_padding is not None and _is_mask_of(parts.key_padding.keep, 2):
        found.append(_kept_keys(parts.key_padding.keep))
    if parts.dense is not None and _is_mask_of(parts.dense.keep, 4):
        found.append(_kept_pairs(parts.dense.keep))
    whole: MaskMod | None = None
    for one in found:
        whole = one if whole is None else whole.both(one)
    return whole


def _is_mask_of(keep: object, dims: int) -> bool:
    """Return whether this is such a mask; any other is refused later."""
    return isinstance(keep, Tensor) and keep.dim() == dims and keep.dtype is torch.bool


def _kept_keys(keep: Tensor) -> MaskMod:
    by_batch = keep.shape[0] > 1
    return MaskMod(lambda b, h, q_idx, kv_idx: keep[b if by_batch else 0, kv_idx])


def _kept_pairs(keep: Tensor) -> MaskMod:
    by_batch, by_head, by_row = (size > 1 for size in keep.shape[:3])

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        row = q_idx if by_row else 0
        return keep[b if by_batch else 0, h if by_head else 0, row, kv_idx]

    return MaskMod(visible)
