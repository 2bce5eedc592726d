"""Turns a traced mask into what says which blocks to visit: a rule, or lists of blocks.

Where it bounds the distance from query to key, it is the rule that says the same
(`mask_distance.py`). Of other masks, blocks that intervals rule out are not visited
(`mask_ranges.py`); kernels evaluate the function itself in every block that they visit.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Final

import torch

from jitattn.errors import LaunchError
from jitattn.jit import backend
from jitattn.request.mask_distance import rule_by_distance
from jitattn.request.mask_ranges import BLOCK, Sizes, visible_blocks
from jitattn.spec.program import parse
from jitattn.values.masks import BlockSparse, Both, Full, parts_of
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Hashable

    from torch import Tensor

    from jitattn.spec.program import Program
    from jitattn.values.functions import Function
    from jitattn.values.masks import Mask, Rule
    from jitattn.values.sequences import KvSequences, QSequences

#: Pairs of a head from which on blocks are looked for.
_FEWEST_PAIRS: Final = 2**16
#: Part of the blocks from which on lists cost more than they save.
_MOST_VISIBLE: Final = 0.9
_MOST_KEPT: Final = 64
_kept: dict[Hashable, tuple[Rule, tuple[weakref.ref[Tensor], ...]]] = {}


def without_hidden_blocks(
    mask: Mask,
    function: Function,
    q: Tensor,
    k: Tensor,
    layout: str,
    q_seqs: QSequences,
    kv_seqs: KvSequences,
) -> tuple[Mask, Function | None]:
    """Return the mask of a call with what `simplified` makes of its function, and the rest of that.

    Nothing changes where the mask has another rule, or lengths are not known on the host.
    """
    parts = parts_of(mask)
    sizes = _sizes(q, k, layout, q_seqs, kv_seqs)
    if not isinstance(parts.rule, Full) or sizes is None:
        return mask, function
    rule, rest = simplified(function, sizes, q.device)
    if isinstance(rule, Full):
        return mask, rest
    if parts.key_padding is None and parts.dense is None:
        return rule, rest
    return Both(rule, parts.key_padding, parts.dense), rest


def _sizes(
    q: Tensor, k: Tensor, layout: str, q_seqs: QSequences, kv_seqs: KvSequences
) -> Sizes | None:
    """Return the sizes of a call; None if they are not known, or it is refused later."""
    if layout not in ("bshd", "bhsd") or not isinstance(k, torch.Tensor) or q.is_nested:
        return None
    row, head = (1, 2) if layout == "bshd" else (2, 1)
    if q_seqs is None and kv_seqs is None:
        if not q.dim() == k.dim() == 4:
            return None
        return Sizes(q.shape[0], q.shape[head], q.shape[row], k.shape[row], True)
    if isinstance(q_seqs, Ragged) and isinstance(kv_seqs, Ragged) and q.dim() == k.dim() == 3:
        if not (q_seqs.knows_max_length() and kv_seqs.knows_max_length()):
            return None
        len_q = min(q_seqs.max_length(), q.shape[0])
        len_kv = min(kv_seqs.max_length(), k.shape[0])
        return Sizes(q_seqs.batch, q.shape[1], len_q, len_kv, False)
    return None


def simplified(
    function: Function, sizes: Sizes, device: torch.device
) -> tuple[Rule, Function | None]:
    """Return a rule of positions for a function's mask, and what is left of the function.

    Parameters
    ----------
    function : Function
    sizes : Sizes
    device : torch.device
        Of the call.

    Returns
    -------
    rule : Causal or Window, which says all that the mask does; BlockSparse, of the blocks that may
        have visible pairs; Full, if there is nothing to gain
    function : Function or None
        Without the mask, if the rule says all of it; None if nothing else is left.
    """
    program = parse(function.program)
    if program.mask is None:
        return Full(), function
    rule = rule_by_distance(program, function, sizes)
    if rule is not None:
        if program.score is None:
            return rule, None
        rest = program._replace(mask=None)
        return rule, function._replace(program=rest.text())
    if sizes.len_q * sizes.len_kv < _FEWEST_PAIRS or not sizes.batch * sizes.heads:
        return Full(), function
    if any(one.device != device for one in function.tensors):  # refused later
        return Full(), function
    return _by_blocks(program, function, sizes, device), function


def _by_blocks(
    program: Program, function: Function, sizes: Sizes, device: torch.device
) -> BlockSparse | Full:
    """Return the blocks that may have visible pairs, from an earlier call if nothing changed."""
    is_counted = not any(one.is_inference() for one in function.tensors)
    key = (
        function.program, repr(function.numbers), sizes, device,
        *((id(one), one._version if is_counted else 0) for one in function.tensors),
    )  # fmt: skip
    kept = _kept.get(key)
    if kept is not None and is_counted:
        rule, references = kept
        alive = all(
            reference() is one for reference, one in zip(references, function.tensors, strict=True)
        )
        if alive and isinstance(rule, BlockSparse | Full):
            return rule
    if device.type == "cuda" and backend.active.is_capturing():
        raise LaunchError(
            "the blocks that this mask function hides are not found yet, and the current stream is "
            "capturing a CUDA graph; make one call with the same function, tensors and lengths "
            "before the capture"
        )
    with torch.no_grad():
        pattern = visible_blocks(program, function, sizes)
    found: BlockSparse | Full = Full()
    if pattern is not None:
        share = pattern.float().mean().item()
        if share < _MOST_VISIBLE:
            found = BlockSparse(pattern.to(device), BLOCK, first_row=0)
    if is_counted:
        if len(_kept) >= _MOST_KEPT:
            _kept.clear()
        _kept[key] = (found, tuple(weakref.ref(one) for one in function.tensors))
    return found
