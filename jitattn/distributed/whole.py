"""Attention of whole sequences for some of their heads, by one plain call, as Ulysses has it."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jitattn.distributed.compute import attend
from jitattn.distributed.lowering import mask_of_heads, score_of_heads
from jitattn.values.masks import BlockSparse, LocalStride, PerHead
from jitattn.values.rule_functions import PATTERNS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from jitattn.distributed.options import Options
    from jitattn.values.masks import Rule


def is_native(options: Options) -> bool:
    """Return whether one call of `attention` says it all."""
    if options.shift is not None or (options.kept is not None and options.q_offset is not None):
        return False
    return options.is_regular or not isinstance(options.rule, PATTERNS)


def whole_attention(
    q: Tensor, k: Tensor, v: Tensor, options: Options, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute attention of whole sequences for the heads of the options.

    Parameters
    ----------
    q : Tensor, [B, Lq, heads, D]; packed sequences: B = 1
    k, v : Tensor, [B, Lkv, kv heads, D or Dv]

    Returns
    -------
    out : Tensor, [B, Lq, heads, Dv], `out_dtype`
    lse : Tensor, [B, heads, Lq]
    """
    local_kv = k.shape[2]
    mask: Any = _rule_of_heads(
        options.rule, options.heads, options.first_head, q.shape[2], options.first_kv, local_kv
    )
    if options.key_padding is not None:
        mask = mask & options.key_padding
    if options.function is not None:
        mask = mask & mask_of_heads(options.function, options.first_head)
    if options.kept is not None:
        mask = mask & mask_of_heads(options.kept, options.first_head)
    given: dict[str, Any] = {
        "mask": mask,
        "scale": options.scale,
        "gear": options.gear,
        "softcap": options.softcap,
        "relative_bias": options.relative_bias,
        "alibi_slopes": options.alibi_slopes,
        "sinks": options.sinks,
        "qk_norm": options.qk_norm,
        "num_splits": options.num_splits,
        "tile_rows": options.tile_rows,
        "deterministic": options.deterministic,
        "score_mod": score_of_heads(options.score_mod, options.first_head),
        "q_offset": options.q_offset,
        "q_seqs": options.q_seqs,
        "kv_seqs": options.kv_seqs,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if options.is_flat:
        out, lse = attend(q[0], k[0], v[0], given, out_dtype)
        return out[None], lse[None]
    return attend(q, k, v, given, out_dtype)


@functools.lru_cache(64)
def _rule_of_heads(
    rule: Rule, heads: tuple[int, int], first: int, count: int, first_kv: int, local_kv: int
) -> Rule:
    """Return a rule for a range of heads."""
    heads_q, heads_kv = heads
    if count == heads_q and local_kv == heads_kv:
        return rule
    if isinstance(rule, LocalStride):
        step = rule.step(max(1, heads_q))
        first_dense = min(max(heads_kv - rule.num_dense_heads - first_kv, 0), local_kv)
        offset = (rule.head_offset + first_kv * step) % rule.vert_stride
        return replace(
            rule,
            head_step=step % rule.vert_stride,
            head_offset=offset if rule.causal else rule.head_offset,
            num_dense_heads=local_kv - first_dense if rule.causal else rule.num_dense_heads,
        )
    if isinstance(rule, BlockSparse):
        num = len(rule.blocks)
        if num == 1:
            return rule
        group = heads_q // num
        picked = [head // group for head in range(first, first + count)]
        return replace(rule, pattern=rule.blocks[picked])
    if isinstance(rule, PerHead):
        group = heads_q // max(1, len(rule.rules))
        own = [rule.rules[head // group] for head in range(first, first + count)]
        return PerHead(
            [_rule_of_heads(one, heads, first, count, first_kv, local_kv) for one in own]  # type: ignore[misc]
        )
    return rule
