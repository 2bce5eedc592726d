"""Random mask rules that are computed by block lists."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from jitattn.values.masks import BlockSparse, Causal, Full, LocalStride, PerHead, Rule, Window

_SIZES = (8, 16, 32, 64, 128)


@st.composite
def local_strides(draw: st.DrawFn, heads_kv: int) -> LocalStride:
    """Draw a local + stride pattern."""
    causal = draw(st.booleans())
    local = draw(st.integers(1, 4))
    return LocalStride(
        draw(st.sampled_from(_SIZES)),
        local if causal or draw(st.booleans()) else (local, draw(st.integers(1, 3))),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((None, 0, 1, 2))),
        draw(st.integers(0, 3)),
        draw(st.integers(0, heads_kv)),
        draw(st.booleans()),
        causal,
    )


@st.composite
def block_patterns(
    draw: st.DrawFn, heads: tuple[int, int], lengths: tuple[int, int]
) -> BlockSparse:
    """Draw a block pattern, often smaller or larger than the lengths."""
    size = draw(st.sampled_from(_SIZES))
    blocks = [-(-length // size) for length in lengths]
    more = st.sampled_from((0, 0, 0, 1, -1, 5))
    shape = [max(0, max(blocks) + draw(more)), max(0, blocks[1] + draw(more))]
    of_heads = draw(st.sampled_from(((), (1,), (heads[0],), (heads[1],))))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    density = draw(st.sampled_from((0.0, 0.1, 0.5, 1.0)))
    pattern = torch.rand(*of_heads, *shape, generator=generator) < density
    first_row = draw(st.sampled_from((None, None, 0, 3, 40)))
    return BlockSparse(pattern, size, draw(st.booleans()), first_row)


@st.composite
def listed_rules(draw: st.DrawFn, heads: tuple[int, int], lengths: tuple[int, int]) -> Rule:
    """Draw a rule for all heads, or one for each."""
    kind = draw(st.sampled_from(("stride", "blocks", "blocks", "heads")))
    if kind == "stride":
        stride = draw(local_strides(heads[1]))
        # Causal with blocks of 64 or 128 has another kernel, except in per-head rules.
        has_own = stride.causal and stride.block_size >= 64
        return PerHead([stride] * heads[1]) if has_own else stride
    if kind == "blocks":
        return draw(block_patterns(heads, lengths))

    def of_head() -> Rule:
        one = draw(st.sampled_from(("full", "causal", "window", "window", "stride", "blocks")))
        if one == "window":
            reach = st.sampled_from((None, 0, 3, 17, 64, 100))
            return Window(
                draw(reach), draw(reach), draw(st.sampled_from((0, 1, 20, 70))), draw(st.booleans())
            )
        if one == "stride":
            return draw(local_strides(heads[1]))
        if one == "blocks":
            made = draw(block_patterns(heads, lengths))
            return BlockSparse(made.pattern, made.block_size, made.causal)
        return Full() if one == "full" else Causal()

    if draw(st.booleans()):
        return PerHead([of_head() for _ in range(draw(st.sampled_from(heads)))])
    few = [of_head(), of_head()]
    return PerHead([few[h % 2] for h in range(heads[1])])


def on_device(rule: Rule, device: str) -> Rule:
    """Move the patterns of a rule to a device."""
    if isinstance(rule, PerHead):
        return PerHead([on_device(part, device) for part in rule.rules])
    if isinstance(rule, BlockSparse):
        return BlockSparse(rule.pattern.to(device), rule.block_size, rule.causal, rule.first_row)
    return rule


@st.composite
def rules(draw: st.DrawFn) -> tuple[Rule, int, int, int, int]:
    """Draw a rule with heads_q, heads_kv, len_q and len_kv."""
    heads_kv = draw(st.integers(1, 3))
    heads_q = heads_kv * draw(st.sampled_from((1, 2, 3)))
    len_q, len_kv = draw(st.integers(1, 150)), draw(st.integers(1, 300))
    rule = draw(listed_rules((heads_q, heads_kv), (len_q, len_kv)))
    return rule, heads_q, heads_kv, len_q, len_kv
