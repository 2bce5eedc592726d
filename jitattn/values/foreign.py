"""Answers keyword arguments of other attention functions with the names of ours.

The names are those of torch's scaled_dot_product_attention and MultiheadAttention, FlashAttention,
xformers, FlashInfer and transformers.
"""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING, Any, Final, NoReturn

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_BY_CU_SEQLENS: Final = (
    "pass q_seqs= and kv_seqs= with jitattn.Ragged.from_cu_seqlens(cu_seqlens, max_length)"
)
_OURS: Final[Mapping[str, str]] = {
    "is_causal": (
        'pass mask=jitattn.Causal("top_left"), as torch aligns it, or jitattn.Causal(), which lets '
        "the last query see every key; they are one where q and k have equal lengths"
    ),
    "causal": "pass mask=jitattn.Causal()",
    "attn_mask": "pass mask=jitattn.Dense(attn_mask) if it is bool, bias=attn_mask if it is added",
    "attention_mask": (
        "pass mask=jitattn.KeyPadding(keep) for [B, Lkv], jitattn.Dense(keep) for more dimensions; "
        "both are bool with True = attend"
    ),
    "key_padding_mask": (
        "pass mask=jitattn.KeyPadding(keep), True = attend (torch's hides where it is True)"
    ),
    "attn_bias": "pass bias= for a tensor that is added, mask= for a rule",
    "softmax_scale": "pass scale=",
    "sm_scale": "pass scale=",
    "scaling": "pass scale=",
    "window_size": "pass mask=jitattn.Window(left, right)",
    "window_left": "pass mask=jitattn.Window(left, 0)",
    "sliding_window": "pass mask=jitattn.Window(sliding_window - 1, 0), which counts other keys",
    "logits_soft_cap": "pass softcap=",
    "s_aux": "pass sinks=",
    "learnable_sink": "pass sinks=",
    "dropout": "pass dropout_p=",
    "p": "pass dropout_p=",
    "enable_gqa": "leave it out: fewer heads of k and v are always taken",
    "is_training": "leave it out, and dropout_p too where nothing is to be dropped",
    "return_attn_probs": "pass return_lse=True; the weights themselves are never made",
    "return_softmax_lse": "pass return_lse=True",
    "need_weights": "leave it out: the weights are never made; return_lse=True gives their sums",
    "kv_layout": 'pass layout="bshd" or "bhsd"',
    "block_mask": "call jitattn.compat.flex_attention.flex_attention, which takes it",
    "rotary_cos": "pass rotary=jitattn.Rotary(cos, sin, interleaved=...)",
    "rotary_sin": "pass rotary=jitattn.Rotary(cos, sin, interleaved=...)",
    "cache_seqlens": "pass length=",
    "cache_batch_idx": "pass batch_idx=",
    "cache_leftpad": "pass left_pad=",
    "page_table": "pass block_table= to attention_with_kvcache, or kv_seqs=jitattn.Paged(...)",
    "block_table": "call attention_with_kvcache, or pass kv_seqs=jitattn.Paged(table, length)",
    "block_tables": "call attention_with_kvcache, or pass kv_seqs=jitattn.Paged(table, length)",
    "cu_seqlens_q": _BY_CU_SEQLENS,
    "cu_seqlens_k": _BY_CU_SEQLENS,
    "cu_seq_lens_q": _BY_CU_SEQLENS,
    "cu_seq_lens_k": _BY_CU_SEQLENS,
    "max_seqlen_q": _BY_CU_SEQLENS,
    "max_seqlen_k": _BY_CU_SEQLENS,
}


class UnknownArgumentError(InvalidInputError, TypeError):
    """A keyword that the function does not have; a TypeError as well, as Python raises."""


def refuse(function: str, given: Mapping[str, Any], own: Collection[str]) -> NoReturn:
    """Raise an error that names our argument in place of the first foreign one.

    Parameters
    ----------
    function : str
        Name of the function that was called.
    given : mapping
        Keyword arguments that it does not have.
    own : collection of str
        Those that it has.

    Raises
    ------
    UnknownArgumentError
    """
    name, value = next(iter(given.items()))
    answer = _of_window(value) if name == "window_size" else _OURS.get(name)
    if answer is None:
        near = difflib.get_close_matches(name, own, 1)
        answer = f"is {near[0]}= meant?" if near else f"it takes {', '.join(own)}"
    raise UnknownArgumentError(f"{function} has no argument {name}: {answer}")


def _of_window(value: object) -> str:
    """Return our window for FlashAttention's pair, in which a negative number is no bound."""
    if isinstance(value, tuple | list) and [type(side) for side in value] == [int, int]:
        left, right = (None if side < 0 else side for side in value)
        return f"pass mask=jitattn.Window({left}, {right}), with right=0 if it is also causal"
    return _OURS["window_size"]
