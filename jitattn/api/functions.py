"""Takes the functions of a call apart from its mask, and traces them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from torch import Tensor

from jitattn.request.mask_blocks import without_hidden_blocks
from jitattn.values.function_cache import function_of
from jitattn.values.functions import MovedScore
from jitattn.values.masks import Both, MaskMod, check_q_offset, is_mask, parts_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.values.functions import Function
    from jitattn.values.masks import Mask, QOffset
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
    function = function_of(score, visible)
    if not isinstance(q, Tensor) or not q.is_cuda:
        return mask, function
    if not finds_blocks:
        return mask, function
    return without_hidden_blocks(mask, function, q, k, layout, q_seqs, kv_seqs)
