"""Translates FlashAttention 4's masks, functions and sequences to jitattn's."""

from __future__ import annotations

import inspect
import types
from typing import TYPE_CHECKING, Any, Final

from jitattn.compat._kept_sequences import sequences_of
from jitattn.compat.flash_attn._translate import mask_of, plain_mask
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values.masks import MaskMod
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import KvSequences, QSequences

_FLEX: Final = "jitattn.compat.flex_attention has block masks and functions of scores"
_REASONS: Final = {
    "qv": "a second pair of tensors has no kernel here; join them: torch.cat((q, qv), -1) and "
    "torch.cat((k, v), -1), head dims up to 256 together",
    "gather_kv_indices": f"keys are not gathered by index; {_FLEX}",
    "block_sparse_tensors": f"lists of blocks in CuTe's form are not taken; {_FLEX}",
    "block_sparse_tensors_bwd": f"lists of blocks in CuTe's form are not taken; {_FLEX}",
    "score_mod_bwd": "the derivative is made from score_mod; leave it out",
    "aux_tensors": "let the function hold its tensors, as closures do",
    "aux_scalars": "let the function hold its numbers, as closures do",
}
#: Parameters of functions as FlexAttention has them.
_SCORE_MOD: Final = ("score", "b", "h", "q_idx", "kv_idx")
_MASK_MOD: Final = ("b", "h", "q_idx", "kv_idx")


def refuse(given: Mapping[str, object]) -> None:
    """Refuse arguments that have no kernel, unless they are None.

    Raises
    ------
    UnsupportedError
    """
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{name} is given: {_REASONS[name]}")


def rule_of(
    causal: bool,
    window_size: tuple[int | None, int | None],
    mask_mod: Callable[..., Any] | None,
) -> Mask:
    """Return the mask of a call. A `mask_mod` alone decides, as in the original.

    Raises
    ------
    InvalidInputError
        `window_size` is of another kind.
    UnsupportedError
        `mask_mod` is a CuTe function.
    """
    if mask_mod is not None:
        check_plain("mask_mod", mask_mod, _MASK_MOD)
        return MaskMod(mask_mod)
    try:
        left, right = window_size
    except (TypeError, ValueError) as error:
        raise InvalidInputError(
            f"window_size={window_size!r}: it must be two of ints and None (left, right); None for "
            "no bound"
        ) from error
    window = (-1 if left is None else left, -1 if right is None else right)
    rule = plain_mask(causal, window, 0)
    return mask_of(causal, window, 0, False, None) if rule is None else rule


def check_plain(
    name: str, function: Callable[..., Any], parameters: tuple[str, ...] = _SCORE_MOD
) -> None:
    """Refuse a function that does not take what FlexAttention's take."""
    if type(function) is types.FunctionType and not hasattr(function, "__wrapped__"):
        code = function.__code__
        if code.co_argcount == len(parameters) and not code.co_kwonlyargcount:
            return
    try:
        inspect.signature(function).bind(*parameters)
    except (TypeError, ValueError) as error:
        raise UnsupportedError(
            f"{name}={function!r} does not take ({', '.join(parameters)}): CuTe functions are not "
            "taken; write it in plain Python, as for jitattn.compat.flex_attention"
        ) from error


def queries_of(
    q: Tensor, cu_seqlens: Tensor | None, seqused: Tensor | None, longest: int | None
) -> QSequences:
    """Return the sequences of queries; None for a full batch."""
    if cu_seqlens is None:
        return None if seqused is None else Padded(seqused)
    bound = q.shape[0] if longest is None else int(longest)
    if seqused is None:
        return Ragged.from_cu_seqlens(cu_seqlens, bound)
    return Ragged(cu_seqlens[:-1], seqused, bound)


def keys_of(
    k: Tensor,
    cu_seqlens: Tensor | None,
    seqused: Tensor | None,
    longest: int | None,
    page_table: Tensor | None,
) -> KvSequences:
    """Return the sequences of keys; None for a full batch."""
    if page_table is None:
        return queries_of(k, cu_seqlens, seqused, longest)
    bound = None if longest is None else int(longest)
    if seqused is not None:
        return Paged(page_table, seqused, bound)
    if cu_seqlens is not None:
        return Paged.from_cu_seqlens(page_table, cu_seqlens, bound)
    room = page_table.shape[1] * k.shape[1]
    return Paged(page_table, page_table.new_full((page_table.shape[0],), room), bound)


def both_of(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    longest_q: int | None,
    longest_k: int | None,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
    page_table: Tensor | None,
) -> tuple[QSequences, KvSequences]:
    """Return the sequences of a call; bounds that are left out are the rows of the tensors."""
    if (
        cu_seqlens_q is not None
        and cu_seqlens_k is not None
        and seqused_q is None
        and seqused_k is None
        and (page_table is None or longest_k is not None)
    ):
        return sequences_of(
            cu_seqlens_q,
            cu_seqlens_k,
            q.shape[0] if longest_q is None else int(longest_q),
            k.shape[0] if longest_k is None else int(longest_k),
            page_table,
        )
    q_seqs = queries_of(q, cu_seqlens_q, seqused_q, longest_q)
    return q_seqs, keys_of(k, cu_seqlens_k, seqused_k, longest_k, page_table)
