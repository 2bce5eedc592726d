"""Turns a traced mask into what says which blocks to visit: a rule, or lists of blocks.

Where it bounds the distance from query to key, it is the rule that says the same
(`mask_distance.py`). Of other masks a kernel finds the blocks that have visible pairs
(`run/function_lists.py`); kernels evaluate the function itself in every block that they visit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.request.mask_distance import rule_by_distance
from jitattn.spec.program import parse
from jitattn.values.masks import Both, Full, FunctionBlocks, parts_of
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.spec.program import Program
    from jitattn.values.functions import Function
    from jitattn.values.masks import Mask, Rule
    from jitattn.values.sequences import KvSequences, QSequences

#: Pairs of a head from which on blocks are looked for.
_FEWEST_PAIRS: Final = 2**16
#: Most groups of 16 keys, by tiles of 64 rows and heads, for which lists have room: 8 bytes each.
_MOST_GROUPS: Final = 2**28


class Sizes(NamedTuple):
    """Sequences, query heads and the largest lengths of a call."""

    batch: int
    heads: int
    len_q: int
    len_kv: int
    is_uniform: bool  #: all sequences have these lengths


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
    rule, rest = simplified(function, sizes)
    return mask if isinstance(rule, Full) else replace_rule(mask, rule), rest


def replace_rule(mask: Mask, rule: Rule) -> Mask:
    """Return a mask with another rule of positions."""
    parts = parts_of(mask)
    if parts.key_padding is None and parts.dense is None:
        return rule
    return Both(rule, parts.key_padding, parts.dense)


def may_have_lists(q_seqs: QSequences, kv_seqs: KvSequences) -> bool:
    """Return whether calls with such sequences have lists of the blocks of a mask function."""
    return q_seqs is kv_seqs is None or (isinstance(q_seqs, Ragged) and isinstance(kv_seqs, Ragged))


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


def simplified(function: Function, sizes: Sizes) -> tuple[Rule, Function | None]:
    """Return a rule of positions for a function's mask, and what is left of the function.

    Returns
    -------
    rule : Causal or Window, which says all that the mask does; FunctionBlocks, of the blocks that
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
    leaves = _leaves(program, program.mask)
    by_head = "head" in leaves
    num_groups = -(-sizes.len_q // 64) * -(-sizes.len_kv // 16) * (sizes.heads if by_head else 1)
    is_known = sizes.is_uniform or "shift" not in leaves
    if not is_known or not leaves & {"row", "key"} or num_groups > _MOST_GROUPS:
        return Full(), function
    batch = sizes.batch if "batch" in leaves else 1
    return FunctionBlocks(function, batch, by_head, sizes.len_q, sizes.len_kv), function


def _leaves(program: Program, root: int) -> set[str]:
    """Return what a node depends on, of the indices of a pair."""
    found, left, seen = set(), [root], set()
    while left:
        idx = left.pop()
        if idx not in seen:
            seen.add(idx)
            found.add(program.nodes[idx].op)
            left += program.nodes[idx].operands
    return found & {"batch", "head", "row", "key", "shift"}
