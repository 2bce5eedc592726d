"""Takes the functions of a call apart from its mask, and traces them."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor

from jitattn.request.mask_blocks import without_hidden_blocks
from jitattn.request.problem import axes
from jitattn.values.function_cache import function_of
from jitattn.values.functions import MovedScore
from jitattn.values.mask_functions import check_q_offset
from jitattn.values.masks import (
    BlockSparse,
    Both,
    Causal,
    Full,
    MaskMod,
    Window,
    is_mask,
    parts_of,
)
from jitattn.values.rule_functions import Heads, function_of_rule
from jitattn.values.sequences import Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.values.functions import Function
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask, Rule
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


def moved_mask(
    q: Any,  # noqa: ANN401 - Tensor, or an array of another library
    k: Any,  # noqa: ANN401
    mask: Mask,
    q_offset: QOffset,
    layout: str,
    q_seqs: QSequences,
    kv_seqs: KvSequences,
) -> Mask:
    """Return the mask of a call whose positional rule counts queries from an offset.

    Rules that bound the distance stay windows where their numbers allow it; all others become
    functions of positions.
    """
    check_q_offset("q_offset", q_offset)
    if not is_mask(mask):  # refused later
        return mask
    parts = parts_of(mask)
    rule = parts.rule
    if isinstance(rule, Full):
        return mask
    is_flat = isinstance(q_seqs, Ragged)
    row, head = (0, 1) if is_flat else axes(layout)
    heads = Heads(q.shape[head], k.shape[_head_axis(layout, kv_seqs)])
    if isinstance(q_offset, str):
        if not (isinstance(rule, BlockSparse) and rule.first_row is not None):
            return mask if rule != Causal("top_left") else _with_rule(parts, Causal())
        return _with_rule(parts, replace(rule, first_row=None))
    if q_seqs is None and kv_seqs is None and isinstance(q_offset, int):
        moved = _shifted(rule, q_offset, k.shape[row] - q.shape[row])
        if moved is not None:
            return _with_rule(parts, moved)
    device = getattr(q, "device", None) if isinstance(q, Tensor) else None
    function = function_of_rule(rule, heads, device)
    if q_seqs is None:
        is_decode: Any = q.shape[row] == 1
        seen = MaskMod(lambda b, h, i, j: function(h, i, j, is_decode), q_offset)
    else:
        lengths = q_seqs.length
        seen = MaskMod(lambda b, h, i, j: function(h, i, j, lengths[b] == 1), q_offset)
    if parts.function is not None:
        seen = seen.both(parts.function)
    return _with_rule(Both(Full(), parts.key_padding, parts.dense, seen), Full())


def _head_axis(layout: str, kv_seqs: KvSequences) -> int:
    """Return the dimension of heads in k."""
    if isinstance(kv_seqs, Ragged):
        return 1
    return 2 if isinstance(kv_seqs, Paged) else axes(layout)[1]


def _with_rule(parts: Both, rule: Rule) -> Mask:
    if parts.key_padding is None and parts.dense is None and parts.function is None:
        return rule
    return Both(rule, parts.key_padding, parts.dense, parts.function)


def _shifted(rule: Rule, offset: int, corner: int) -> Rule | None:
    """Return the rule that sees, aligned to the bottom right, what this one sees from an offset.

    `corner` is Lkv - Lq. None: no rule has such numbers.
    """
    ahead = offset - corner
    if isinstance(rule, BlockSparse):
        return replace(rule, first_row=offset) if offset >= 0 else None
    if ahead == 0:
        return Causal() if isinstance(rule, Causal) else rule
    if isinstance(rule, Causal):
        return Window(None, ahead) if ahead > 0 else None
    if not isinstance(rule, Window):
        return None
    left = None if rule.left is None else rule.left - ahead
    right = None if rule.right is None else rule.right + ahead
    if min(left or 0, right or 0) < 0:
        return None
    return replace(rule, left=left, right=right)


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
