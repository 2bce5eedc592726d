"""Translates FlashAttention 3's masks and sequences to jitattn's; refuses what has no kernel."""

from __future__ import annotations

import functools
import operator
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._kept_sequences import sequences_of
from jitattn.compat.flash_attn._translate import WORDS, keys_of, mask_of, plain_mask
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values.masks import MaskMod
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Paged

#: The core's argument names in error messages, and these functions'.
CACHE_WORDS: Final = {
    **WORDS,
    "length": "cache_seqlens",
    "batch_idx": "cache_batch_idx",
    "left_pad": "cache_leftpad",
    "block_table": "page_table",
    "Rotary": "rotary_cos and rotary_sin",
}
_8_BITS: Final = "8-bit inputs have no kernel here; give q, k and v in fp16 or bf16, dequantized"
_REASONS: Final = {
    "qv": "a second pair of tensors has no kernel here; join them: torch.cat((q, qv), -1) and "
    "torch.cat((k, v), -1), head dims up to 256 together",
    "q_descale": _8_BITS,
    "k_descale": _8_BITS,
    "v_descale": _8_BITS,
}


def refuse(
    qv: object = None, q_descale: object = None, k_descale: object = None, v_descale: object = None
) -> None:
    """Refuse arguments that have no kernel.

    Raises
    ------
    UnsupportedError
    """
    given = {"qv": qv, "q_descale": q_descale, "k_descale": k_descale, "v_descale": v_descale}
    for name, value in given.items():
        if value is not None:
            raise UnsupportedError(f"{name} is given: {_REASONS[name]}")


def rule_of(causal: bool, window_size: Sequence[int], attention_chunk: int) -> Mask:
    """Return the mask of a call, aligned to the bottom right.

    Parameters
    ----------
    attention_chunk : int, 0 for none
        A query sees keys of its own chunk alone: position // chunk is that of the key.

    Raises
    ------
    InvalidInputError
        `window_size` or `attention_chunk` is of another kind.
    """
    rule = plain_mask(causal, window_size, 0)
    if rule is None:
        rule = mask_of(causal, window_size, 0, False, None)
    if type(attention_chunk) is int and attention_chunk == 0:
        return rule
    try:
        size = operator.index(attention_chunk)
    except TypeError:
        size = -1
    if not 0 <= size < 2**31:
        raise InvalidInputError(
            f"attention_chunk={attention_chunk!r}: it must be an int, 0 for none"
        )
    make = _chunks if torch.compiler.is_compiling() else _shared_chunks
    return rule & make(size) if size else rule


def _chunks(size: int) -> MaskMod:
    def is_of_the_same(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        del b, h
        return q_idx // size == kv_idx // size

    return MaskMod(is_of_the_same, q_offset="bottom_right")


_shared_chunks: Final = functools.lru_cache(maxsize=64)(_chunks)


def queries_and_keys(
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    longest_q: int,
    longest_k: int,
    seqused_q: Tensor | None,
    seqused_k: Tensor | None,
) -> tuple[Ragged, Ragged | Paged]:
    """Return the sequences of a call, of which `seqused_q` and `seqused_k` use the first rows."""
    if seqused_q is None and seqused_k is None:
        return sequences_of(cu_seqlens_q, cu_seqlens_k, longest_q, longest_k)
    if seqused_q is None:
        q_seqs = Ragged.from_cu_seqlens(cu_seqlens_q, longest_q)
    else:
        q_seqs = Ragged(cu_seqlens_q[:-1], seqused_q, longest_q)
    return q_seqs, keys_of(cu_seqlens_k, longest_k, None, seqused_k)
