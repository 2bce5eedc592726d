"""`attn_implementation="jitattn"` for Hugging Face transformers, 5 or newer.

    import jitattn.integrations.transformers

    jitattn.integrations.transformers.register()
    model = AutoModelForCausalLM.from_pretrained(name, attn_implementation="jitattn")

Forward, training, gradient checkpointing, generate() with every cache of transformers but that of
continuous batching, padding on either side, packed sequences (by cu_seqlens or by position_ids that
restart), windows, softcap, sinks and position biases; torch.compile.

Weights are never in memory, so `output_attentions=True` is refused. Models that make masks by
transformers' interface, but compute attention themselves (BLOOM, MPT, XGLM), go on doing so.
"""

from __future__ import annotations

import functools
import warnings
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.api.attention import attention
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.integrations._transformers_masks import (
    Rule,
    known_rule,
    make_mask,
    sequences_of,
    sequences_of_lengths,
    sequences_of_positions,
)
from jitattn.spec import install
from jitattn.values.masks import Causal, Dense, Full, KeyPadding, Window

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.integrations._transformers_masks import Known
    from jitattn.values.masks import Mask
    from jitattn.values.sequences import Ragged

#: What transformers reads in a name of an attention implementation.
_RESERVED: Final = ("flash", "paged", "|", "/")


class Options(NamedTuple):
    """Options of a registered name."""

    window: int | None = None  #: tokens that a token of a causal layer sees, itself included
    keep_first: int = 0
    full_on_decode: bool = False
    gear: int | None = None
    deterministic: bool = False
    softcap: float | None = None

    def window_of(self, of_layer: int | None, len_q: int) -> int | None:
        """Return the window of a causal layer that may have one itself: the smaller holds."""
        if self.full_on_decode and len_q == 1:
            return None
        if self.window is None or of_layer is None:
            return of_layer if self.window is None else self.window
        return min(self.window, of_layer)


def register(
    name: str = "jitattn",
    *,
    window: int | None = None,
    keep_first: int = 0,
    full_on_decode: bool = False,
    gear: int | None = None,
    deterministic: bool | None = None,
    softcap: float | None = None,
) -> str:
    """Make ``attn_implementation=name`` compute attention with jitattn, in every model.

    Several names, of different options, may stand side by side; a second call with a name replaces
    its options.

    Parameters
    ----------
    name : str
        Without "flash", "paged", "|" and "/", which transformers reads otherwise.
    window : int, optional
        Tokens that a token of a causal layer sees, itself included, as transformers counts
        `sliding_window`. Where a layer has a window too, the smaller holds.
    keep_first : int
        First tokens that stay visible beyond a window (attention sinks, arXiv:2309.17453). A model
        whose own layers have a window may drop them from its cache: set `sliding_window` to None in
        its config, and the window here.
    full_on_decode : bool
        Let a single query see all keys that the cache still has.
    gear : int from 0 to 4, optional
        See `jitattn.attention`.
    deterministic : bool, optional
        Make gradients bitwise reproducible; None follows torch.use_deterministic_algorithms.
    softcap : float, optional
        For layers that have none.

    Returns
    -------
    str
        The name.

    Raises
    ------
    InvalidInputError
        The name, or an option, breaks a rule.
    UnsupportedError
        transformers 5 is not installed.

    Examples
    --------
    >>> from jitattn.integrations.transformers import register
    >>> register("jitattn_streaming", window=1024, keep_first=4)  # doctest: +SKIP
    'jitattn_streaming'
    """
    if not isinstance(name, str) or not name or any(part in name for part in _RESERVED):
        raise InvalidInputError(
            f"register({name!r}): a name has none of {', '.join(_RESERVED)} in it: transformers "
            "reads these otherwise"
        )
    if window is not None and (type(window) is not int or window < 1):
        raise InvalidInputError(f"register(window={window!r}): it must be an int of at least 1")
    Window(window, 0, keep_first, full_on_decode)  # refuses what it does not take
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise UnsupportedError(
            f"jitattn.integrations.transformers needs transformers 5 or newer: "
            f"{install.command('hf')}"
        ) from error
    options = Options(window, keep_first, full_on_decode, gear, bool(deterministic), softcap)
    AttentionInterface.register(name, functools.partial(attend, options))
    AttentionMaskInterface.register(name, functools.partial(make_mask, options))
    return name


def attend(
    options: Options,
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    **more: Any,  # noqa: ANN401 - models hand on what they were called with
) -> tuple[Tensor, None]:
    """Compute a layer's attention, as transformers' attention interface has it.

    Parameters
    ----------
    options : Options
        Of the registered name.
    module : torch.nn.Module
        The layer; its `is_causal` counts where the argument is None.
    query : Tensor, [B, Hq, Lq, D]
    key, value : Tensor, [B, Hkv, Lkv, D]
    attention_mask : Tensor, optional
        Of `make_mask`, or a matrix [B, 1 or Hq, Lq, Lkv] of the caller: bool, or added to scores.
    dropout, scaling, is_causal, sliding_window, softcap
        Of the layer.
    s_aux : Tensor, [Hq], optional
        Sinks.
    position_bias : Tensor, [B or 1, Hq or 1, Lq, Lkv], optional
        Added to scores.
    more
        `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q` and `max_length_k` describe packed
        sequences, as `position_ids` do that restart; the rest is not needed.

    Returns
    -------
    (Tensor [B, Lq, Hq, Dv], None)

    Raises
    ------
    UnsupportedError
        Weights are asked for.
    """
    if _wants_weights(more):
        raise UnsupportedError(
            "output_attentions=True: weights are never in memory here; use "
            'attn_implementation="eager" for them'
        )
    q, k, v = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    known = known_rule(attention_mask)
    if known is not None:
        rule = known.rule
    else:
        if is_causal is None:
            is_causal = getattr(module, "is_causal", True)
        window = sliding_window
        if window is not None and not is_causal:
            window -= 1  # transformers counts the token itself, on both sides
        rule = Rule(bool(is_causal), window)
    positional = _positional(options, q.shape[1], rule)
    bias = None if position_bias is None else _as_bias(position_bias, q)
    given: dict[str, Any] = {
        "scale": scaling,
        "gear": options.gear,
        "deterministic": options.deterministic,
        "softcap": options.softcap if softcap is None else softcap,
        "sinks": s_aux,
        "dropout_p": dropout,
    }
    seqs = _packed(q, k, attention_mask, known, rule, more)
    if seqs is not None:
        flat = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v)]
        out = attention(*flat, mask=positional, q_seqs=seqs[0], kv_seqs=seqs[1], bias=bias, **given)
        return out.view(*q.shape[:2], *out.shape[1:]), None
    mask: Mask = positional
    if attention_mask is None:
        pass
    elif attention_mask.dim() == 2:
        seen = attention_mask.shape[1]
        if seen < k.shape[1]:
            k, v = k[:, :seen], v[:, :seen]
            bias = None if bias is None else bias[..., :seen]
        if known is None or known.hides:
            mask = positional & KeyPadding(_in_rows(attention_mask.bool()))
    else:
        matrix = attention_mask[..., : k.shape[1]]
        if matrix.is_floating_point():
            mask = Full()
            bias = _as_bias(matrix if bias is None else bias + matrix, q)
        else:
            mask = _of_matrix(matrix) if known is None or known.hides else Full()
    return attention(q, k, v, mask=mask, bias=bias, **given), None


def _wants_weights(more: dict[str, Any]) -> bool:
    """Return whether the model was called for its attention weights.

    Many models do not say so to the attention function: transformers collects what layers return.
    """
    if more.get("output_attentions"):
        return True
    if is_dynamo_compiling():  # which cannot trace the look-up
        return False
    collector = _collector()
    collected = None if collector is None else collector.get()
    return collected is not None and any("attentions" in name for name in collected)


@functools.cache
def _collector() -> Any:  # noqa: ANN401 - of a private type
    """Return the context variable of what transformers collects; None before transformers 5.2."""
    try:
        from transformers.utils import output_capturing
    except ImportError:
        return None
    return getattr(output_capturing, "_active_collector", None)


def _packed(
    q: Tensor,
    k: Tensor,
    attention_mask: Tensor | None,
    known: Known | None,
    rule: Rule,
    more: dict[str, Any],
) -> tuple[Ragged, Ragged] | None:
    """Return the packed sequences of q and k [B, L, H, D] as rows of [B * L, H, D], if any."""
    cumulative_q, cumulative_k = more.get("cu_seq_lens_q"), more.get("cu_seq_lens_k")
    if cumulative_q is not None and cumulative_k is not None and q.shape[0] == 1:
        return (
            sequences_of_lengths(cumulative_q, more.get("max_length_q")),
            sequences_of_lengths(cumulative_k, more.get("max_length_k")),
        )
    is_given = attention_mask is not None and (known is None or known.is_given)
    if attention_mask is not None and attention_mask.dtype is torch.int32:
        if attention_mask.dim() == 2:
            return (sequences_of(attention_mask),) * 2
    elif not is_given and rule.is_causal and 1 < q.shape[1] == k.shape[1]:
        packed = sequences_of_positions(more.get("position_ids"), q)
        return None if packed is None else (packed, packed)
    return None


def _positional(options: Options, len_q: int, rule: Rule) -> Causal | Full | Window:
    """Return the positional mask of a layer."""
    if not rule.is_causal:
        return Full() if rule.window is None else Window(rule.window, rule.window)
    window = options.window_of(rule.window, len_q)
    if window is None:
        return Causal()
    if options.keep_first and rule.window is not None:
        _warn_of_dropped_keys()
    return Window(window - 1, 0, options.keep_first)


def _of_matrix(keep: Tensor) -> KeyPadding | Dense:
    """Return a mask [B, 1 or Hq, Lq, Lkv] in the form that is read fastest."""
    if keep.shape[1] == keep.shape[2] == 1:
        return KeyPadding(_in_rows(keep[:, 0, 0].bool()))
    return Dense(_in_rows(keep.bool()))


def _as_bias(bias: Tensor, q: Tensor) -> Tensor:
    return _in_rows(bias if bias.dtype is torch.float32 else bias.to(q.dtype))


def _in_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@functools.cache
def _warn_of_dropped_keys() -> None:
    warnings.warn(
        "keep_first with a model whose layers have a window of their own: its cache may drop the "
        "first tokens; set sliding_window=None in its config, and window= in register()",
        stacklevel=2,
    )
