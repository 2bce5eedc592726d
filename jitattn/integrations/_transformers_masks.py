"""Makes the masks of transformers' models: hidden keys, documents, or a matrix, with their rule.

Models describe the mask of a layer type by a function of indices (`transformers.masking_utils`),
once in a forward pass. What an attention function needs beside causality and window is returned:

- bool [B, n]: the first n keys are seen, but for those that are False.
- bool [B, 1, 1, n]: the same, where nothing depends on the query.
- int32 [B, L]: the number of the document that a token is of; documents see only themselves, and
  causality and window are those of each.
- bool [B, 1, Lq, Lkv]: the whole rule, causality and window included.
- None, under torch.compile alone: nothing.

The rule itself goes beside the tensor (`known_rule`), as not all layers say what theirs is; under
torch.compile, where that cannot be, the layer's word counts. Only the matrix costs memory of Lq x
Lkv. It is made of rules that are not recognised, where a tracer or a cache keeps the position of
the queries on the device, and for models that look into it.
"""

from __future__ import annotations

import inspect
import sys
from typing import TYPE_CHECKING, Any, Final, NamedTuple, TypeVar

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from jitattn.values.sequences import Ragged
from jitattn.values.write_tracking import Snapshot

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.integrations.transformers import Options

_MODULE: Final = "transformers.masking_utils"
#: Parts of rules that are recognised, by qualified name.
_CAUSAL: Final = "causal_mask_function"
_BIDIRECTIONAL: Final = "bidirectional_mask_function"
_WINDOW: Final = "sliding_window_overlay.<locals>.inner_mask"
_BIDIRECTIONAL_WINDOW: Final = "sliding_window_bidirectional_overlay.<locals>.inner_mask"
_DOCUMENTS: Final = "packed_sequence_mask_function.<locals>.inner_mask"
_IN_DOCUMENTS: Final = "remap_positions_for_packed_sequence.<locals>.inner_mask"
_ALL_OF: Final = "and_masks.<locals>.and_mask"

_Made = TypeVar("_Made")
#: What was made of tensors' contents: a snapshot of each, and that.
_made: Final[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()
#: Rules of the tensors that `make_mask` has returned.
_rules: Final[WeakTensorKeyDictionary] = WeakTensorKeyDictionary()
#: Entries of configs whose models index or join the mask as a matrix.
_OF_MATRICES: Final = ("index_topk", "keep_window_size")


class Rule(NamedTuple):
    """What a mask function is made of."""

    is_causal: bool = False
    #: Causal: tokens that a token sees, itself included. Else: tokens that it sees on each side.
    window: int | None = None
    documents: Tensor | None = None


class Known(NamedTuple):
    """What is known of a mask that `make_mask` has returned."""

    rule: Rule
    hides: bool  #: whether a key is False
    is_given: bool  #: whether the caller gave an attention_mask


def known_rule(mask: Tensor | None) -> Known | None:
    """Return what is known of a mask; None if `make_mask` has not made it, or of a tracer's."""
    if mask is None or torch.compiler.is_compiling():
        return None
    known: Known | None = _rules.get(mask)
    return known


def make_mask(
    options: Options,
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    *,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    local_size: int | None = None,
    config: Any = None,  # noqa: ANN401 - of any model
    allow_is_causal_skip: bool = True,
    allow_is_bidirectional_skip: bool | None = None,
    **more: Any,  # noqa: ANN401 - transformers adds arguments
) -> Tensor | None:
    """Return the mask of a layer type, as transformers' mask interface has it.

    Parameters
    ----------
    options : Options
        Of the registered name.
    batch_size, q_length, kv_length : int
    q_offset : int or Tensor
        Position of the first query, on the device where a static cache keeps it.
    kv_offset : int
        Position of the first key that a cache still has.
    mask_function : callable
        Whether a query sees a key, by indices; None is causal.
    attention_mask : Tensor, [B, tokens seen so far], bool, optional
        False for padding.
    use_vmap : bool
        Whether the function takes single indices only.
    device : torch.device
    local_size : int, optional
        Window or chunk of the layer type.
    config : PreTrainedConfig, optional
    allow_is_causal_skip : bool
        False where documents or rules of the model's own are in the function.
    allow_is_bidirectional_skip : bool, optional
        Given for layers that are not causal.
    more
        Of transformers' own makers of masks.

    Returns
    -------
    Tensor or None
        See the module.
    """
    from transformers import masking_utils

    function = masking_utils.causal_mask_function if mask_function is None else mask_function
    given: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "attention_mask": attention_mask,
        "use_vmap": use_vmap,
        "device": device,
    }
    if _computes_itself(config):
        own: Tensor | None = masking_utils.eager_mask(mask_function=function, **given, **more)
        return own
    is_bidirectional = allow_is_bidirectional_skip is not None
    may_skip = allow_is_bidirectional_skip if is_bidirectional else allow_is_causal_skip
    rule = None
    if torch.compiler.is_compiling():
        # Dynamo cannot look into functions.
        chunk = getattr(config, "attention_chunk_size", None)
        if function is masking_utils.causal_mask_function:
            rule = Rule(is_causal=True)
        elif function is masking_utils.bidirectional_mask_function:
            rule = Rule()
        elif not (use_vmap or is_bidirectional) and may_skip and local_size and chunk is None:
            rule = Rule(is_causal=True, window=local_size)
    elif not use_vmap:
        rule = _rule_of(function)
    if rule is None or _needs_matrix(rule, q_offset, config, may_skip=bool(may_skip)):
        if not is_bidirectional:
            function = _with_options(function, rule, options, q_length)
        matrix: Tensor | None = masking_utils.sdpa_mask(
            mask_function=function, allow_is_causal_skip=False, **given
        )
        return matrix
    if rule.documents is not None:
        documents = rule.documents.expand(batch_size, -1).to(torch.int32)
        return _with_rule(documents, Known(rule, hides=True, is_given=False))
    seen = kv_length
    if rule.is_causal and isinstance(q_offset, int):
        # Keys of a static cache that are yet to come are not seen.
        seen = min(kv_length, q_offset + q_length - kv_offset)
    if attention_mask is None:
        if torch.compiler.is_compiling() and rule.is_causal and seen == kv_length:
            return None
        keep = torch.ones((), dtype=torch.bool, device=device).expand(batch_size, seen)
        hides = False
    else:
        keep = _padding(attention_mask, kv_offset, seen)
        hides = _is_traced() or not bool(keep.all())
    if not (rule.is_causal or rule.window):
        keep = keep[:, None, None]
    return _with_rule(keep, Known(rule, hides, attention_mask is not None))


def _with_rule(mask: Tensor, known: Known) -> Tensor:
    if not torch.compiler.is_compiling():
        _rules[mask] = known
    return mask


def _needs_matrix(rule: Rule, q_offset: int | Tensor, config: object, *, may_skip: bool) -> bool:
    """Return whether the whole rule must be a tensor."""
    if any(getattr(config, name, None) is not None for name in _OF_MATRICES):
        return True
    if rule.documents is not None:
        return _is_traced()
    return not may_skip or (rule.is_causal and not isinstance(q_offset, int))


def _computes_itself(config: object) -> bool:
    """Return whether a model asks for masks alone, and computes its attention from them itself."""
    name = type(config).__module__
    if not name.startswith("transformers.models.") or ".configuration_" not in name:
        return False
    lacks: bool = _lacks_attention_functions(name.replace(".configuration_", ".modeling_"))
    return lacks


# Dynamo would go through all modules.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _lacks_attention_functions(module: str) -> bool:
    """Return whether a module is there, and calls no attention functions by name."""
    modeling = sys.modules.get(module)
    return modeling is not None and not hasattr(modeling, "ALL_ATTENTION_FUNCTIONS")


def sequences_of(documents: Tensor) -> Ragged:
    """Return the sequences of tokens whose documents are numbered, int32 [B, L]; made once."""
    return _kept(documents, lambda: _sequences_of_documents(documents))


def sequences_of_lengths(cumulative: Tensor, max_length: int | Tensor | None) -> Ragged:
    """Return sequences by their cumulative lengths, [N + 1]; waits once for a bound on the device.

    Parameters
    ----------
    cumulative : Tensor, int32 or int64
    max_length : int or Tensor, optional
    """
    if isinstance(max_length, torch.Tensor):
        bound = max_length
        return _kept(cumulative, lambda: Ragged.from_cu_seqlens(cumulative, int(bound)))
    return Ragged.from_cu_seqlens(cumulative, max_length)


def sequences_of_positions(positions: Tensor | None, like: Tensor) -> Ragged | None:
    """Return the packed sequences that positions which restart describe; None if none does.

    Looked at once for a tensor, with a wait for the device; not while a tracer or a capture of a
    graph cannot wait, where the mask of the model counts alone.

    Parameters
    ----------
    positions : Tensor, [B or 1, L], optional
    like : Tensor, [B, L, ...]
    """
    if positions is None or positions.dim() != 2 or positions.shape[1] != like.shape[1]:
        return None
    if positions.shape[0] not in (1, like.shape[0]) or _is_traced():
        return None

    def by_batch() -> dict[int, Ragged | None]:
        return {}

    known = _kept(positions, by_batch)
    batch = like.shape[0]
    if batch not in known:
        restarts = torch.zeros(positions.shape, dtype=torch.int32, device=positions.device)
        later, before = positions[:, 1:], positions[:, :-1]
        restarts[:, 1:] = ((later < before) | (later == 0)).cumsum(1)
        is_packed = bool(restarts[:, -1].any())
        known[batch] = _sequences_of_documents(restarts.expand(batch, -1)) if is_packed else None
    return known[batch]


def _kept(tensor: Tensor, make: Callable[[], _Made]) -> _Made:
    """Return what is made of a tensor's contents, made again only after a write to it."""
    if torch.compiler.is_compiling():
        return make()
    known: tuple[Snapshot, _Made] | None = _made.get(tensor)
    if known is None or not known[0].still_holds(tensor):
        known = _made[tensor] = (Snapshot(tensor), make())
    return known[1]


def _is_traced() -> bool:
    """Return whether nothing can wait for the device here."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _sequences_of_documents(documents: Tensor) -> Ragged:
    """Return the documents of [B, L] tokens as sequences of B * L rows; waits for the device."""
    batch, length = documents.shape
    is_first = torch.ones(batch, length, dtype=torch.bool, device=documents.device)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    starts = is_first.view(-1).nonzero().view(-1)
    end = starts.new_full((1,), batch * length)
    cumulative = torch.cat([starts, end]).to(torch.int32)
    return Ragged.from_cu_seqlens(cumulative, int(cumulative.diff().max()))


def _padding(attention_mask: Tensor, kv_offset: int, seen: int) -> Tensor:
    """Return the padding mask of the keys that a cache has."""
    missing = kv_offset + seen - attention_mask.shape[-1]
    if missing > 0:
        attention_mask = torch.nn.functional.pad(attention_mask, (0, missing))
    return attention_mask[:, kv_offset : kv_offset + seen].to(torch.bool)


def _rule_of(function: Callable[..., Any]) -> Rule | None:
    """Return what a mask function of transformers is made of; None if another part is in it."""
    if getattr(function, "__module__", None) != _MODULE:
        return None
    name = function.__qualname__
    if name == _CAUSAL:
        return Rule(is_causal=True)
    if name == _BIDIRECTIONAL:
        return Rule()
    held = inspect.getclosurevars(function).nonlocals
    if name in (_WINDOW, _BIDIRECTIONAL_WINDOW):
        return Rule(window=held["sliding_window"])
    if name == _DOCUMENTS:
        return Rule(documents=held["packed_sequence_mask"])
    if name == _IN_DOCUMENTS:
        return _rule_of(held["mask_function"])
    if name != _ALL_OF:
        return None
    found = Rule()
    for part in map(_rule_of, held["mask_functions"]):
        if part is None:
            return None
        found = Rule(
            found.is_causal or part.is_causal,
            found.window if part.window is None else part.window,
            found.documents if part.documents is None else part.documents,
        )
    return found


def _with_options(
    function: Callable[..., Any], rule: Rule | None, options: Options, q_length: int
) -> Callable[..., Any]:
    """Return a causal mask function with window and first keys of a registered name.

    First keys go beyond a window of the layer's own only where the rule is known.
    """
    of_layer = None if rule is None else rule.window
    window, keep_first = options.window_of(of_layer, q_length), options.keep_first
    if window == of_layer and not (window and keep_first):
        return function
    documents = None if rule is None else rule.documents
    first = None if documents is None else _first_tokens(documents)

    def visible(batch: Tensor, head: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        is_seen: Tensor = kv <= q if rule is not None else function(batch, head, q, kv)
        if window is not None:
            start = 0 if first is None else first[batch, q]
            is_seen = is_seen & ((kv > q - window) | (kv < start + keep_first))
        if documents is not None:
            is_seen = is_seen & (documents[batch, q] == documents[batch, kv])
        return is_seen

    return visible


def _first_tokens(documents: Tensor) -> Tensor:
    """Return the index of the first token of each token's document, [B, L]."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    is_first = torch.ones_like(documents, dtype=torch.bool)
    is_first[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return torch.where(is_first, index, 0).cummax(-1).values
