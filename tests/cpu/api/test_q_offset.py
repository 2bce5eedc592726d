"""Tests `q_offset` of positional masks: a part of the queries sees what it sees among all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn import BlockSparse, Causal, Full, KeyPadding, LocalStride, MaskMod, PerHead, Window
from jitattn.reference import reference
from tests.support.compare import rel_l2

PATTERN = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5
RULES = {
    "full": Full(),
    "causal": Causal(),
    "top left": Causal("top_left"),
    "window": Window(6, 2, 3),
    "decode": Window(3, 1, 1, full_on_decode=True),
    "stride": LocalStride(8, 2, 3, num_dense_heads=1),
    "stride both ways": LocalStride(8, (1, 2), 3, causal=False),
    "blocks": BlockSparse(PATTERN, 8, causal=True),
    "blocks from a row": BlockSparse(PATTERN, 8, first_row=3),
    "heads": PerHead([Causal(), Window(5, 0, 2), Full(), LocalStride(8, 1, 2)]),
    "padded": Causal() & KeyPadding(torch.arange(24)[None].expand(2, 24) % 5 != 1),
    "function": Window(6, 2) & MaskMod(lambda b, h, i, j: (i + j) % 3 != 0),
}


def drawn(len_q: int, len_kv: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, len_q, 4, 8), (2, len_kv, 2, 8), (2, len_kv, 2, 8))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("len_q", [1, 7])
@pytest.mark.parametrize("offset", [0, 5, 17, 20, -3, "bottom_right", torch.tensor([2, 19])],
                         ids=str)  # fmt: skip
def test_as_the_reference(name: str, len_q: int, offset: Any) -> None:
    q, k, v = drawn(len_q)
    given: dict[str, Any] = {"mask": RULES[name], "q_offset": offset, "return_lse": True}
    found, expected = jitattn.attention(q, k, v, **given), reference(q, k, v, **given)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(torch.isneginf(one), torch.isneginf(other))
        assert rel_l2(one.nan_to_num(neginf=0), other.nan_to_num(neginf=0)) < 1e-12


@pytest.mark.parametrize("name", ["causal", "window", "stride", "blocks", "heads"])
def test_a_part_of_the_queries(name: str) -> None:
    q, k, v = drawn(24)
    whole = jitattn.attention(q, k, v, mask=RULES[name])
    part = jitattn.attention(q[:, 9:15], k, v, mask=RULES[name], q_offset=9)
    assert rel_l2(part, whole[:, 9:15]) < 1e-12


def test_sequences_have_their_own() -> None:
    q, k, v = drawn(24)
    whole = jitattn.attention(q, k, v, mask=RULES["decode"])
    seqs = jitattn.Ragged(torch.tensor([0, 5]), torch.tensor([5, 3]))
    both = jitattn.Ragged(torch.tensor([0, 24]), torch.tensor([24, 24]))
    rows = torch.cat([q[0, 4:9], q[1, 11:14]])
    flat = [x.flatten(0, 1) for x in (k, v)]
    found = jitattn.attention(
        rows, *flat, mask=RULES["decode"], q_seqs=seqs, kv_seqs=both, q_offset=torch.tensor([4, 11])
    )
    assert rel_l2(found, torch.cat([whole[0, 4:9], whole[1, 11:14]])) < 1e-12


def test_windows_stay_windows() -> None:
    """No function is traced where a rule has such numbers: its kernel is that of a window."""
    q, k, _v = (x.half() for x in drawn(7))
    for mask, offset in ((Causal(), 19), (Window(9, 2), 20), (BlockSparse(PATTERN, 8), 4)):
        moved = jitattn.api.functions.moved_mask(q, k, mask, offset, "bshd", None, None)
        assert type(moved) in (Window, BlockSparse)


@pytest.mark.parametrize("offset", ["top", 1.5, torch.zeros(2, 2)], ids=str)
def test_what_is_no_offset(offset: Any) -> None:
    with pytest.raises(jitattn.InvalidInputError, match="q_offset"):
        jitattn.attention(*drawn(7), mask=Causal(), q_offset=offset)
