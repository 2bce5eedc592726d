"""Tests mask values, and the size of the test grids."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import jitattn
from jitattn.errors import InvalidInputError
from jitattn.reference import visible
from jitattn.values.masks import Causal, Full
from tests.support.grids import EDGE, FULL, SMOKE, VARIANTS, spec_facts


def test_masks_are_values():
    assert Full() == Full()
    assert Causal() == Causal("bottom_right") != Causal("top_left")
    assert Full() != Causal()
    assert len({Full(), Full(), Causal(), Causal(align="bottom_right"), Causal("top_left")}) == 3


@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_masks_are_frozen(mask):
    with pytest.raises((dataclasses.FrozenInstanceError, AttributeError, TypeError)):
        mask.align = "top_left"


@pytest.mark.parametrize("align", ["bottom-right", "", None, 1])
def test_unknown_alignment_is_refused_by_name(align):
    with pytest.raises(InvalidInputError, match=r"align=.*bottom_right.*top_left"):
        Causal(align=align)


@pytest.mark.parametrize(
    ("mask", "len_q", "len_kv", "rows"),
    [
        (Full(), 2, 3, ["111", "111"]),
        (Causal(), 3, 3, ["100", "110", "111"]),
        (Causal(), 2, 4, ["1110", "1111"]),
        (Causal(), 4, 2, ["00", "00", "10", "11"]),
        (Causal("top_left"), 2, 4, ["1000", "1100"]),
        (Causal("top_left"), 4, 2, ["10", "11", "11", "11"]),
        (Causal(), 1, 5, ["11111"]),
        (Causal("top_left"), 1, 5, ["10000"]),
        (Causal(), 2, 0, ["", ""]),
    ],
)
def test_visible_keys(mask, len_q, len_kv, rows):
    matrix = visible(mask, len_q, len_kv)
    assert matrix.shape == (len_q, len_kv)
    assert ["".join("01"[int(x)] for x in row) for row in matrix.tolist()] == rows


def test_grids_name_their_cases_uniquely():
    for grid in (SMOKE, EDGE, FULL):
        assert len({case.name for case in grid}) == len(grid)


def test_grids_stay_affordable():
    assert len({spec_facts(case) for case in EDGE}) <= 80
    assert len({spec_facts(case) for case in (*EDGE, *FULL)}) <= 250


def test_edge_meets_every_variant_in_every_layout():
    met = {(case.variant, case.layout) for case in EDGE}
    assert met >= {(variant, layout) for variant in VARIANTS for layout in ("bshd", "bhsd")}


def test_causal_joins_what_is_or_can_be_causal() -> None:
    blocks = jitattn.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 16)
    both = blocks & jitattn.Causal()
    assert (both.causal, both.pattern) == (True, blocks.pattern)
    pattern = jitattn.LocalStride(16, 1, 2)
    assert jitattn.Causal() & pattern is pattern
    for one in (
        jitattn.LocalStride(16, 1, 2, causal=False),
        jitattn.BlockSparse(blocks.pattern, 16, first_row=3),
        jitattn.PerHead([jitattn.Full()]),
    ):
        with pytest.raises(jitattn.InvalidInputError, match="at most one rule"):
            one & jitattn.Causal()


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: jitattn.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 24), "block_size=24"),
        (lambda: jitattn.BlockSparse(torch.ones(2, 2), 16), "must be a torch.bool"),
        (lambda: jitattn.BlockSparse(torch.ones(2, dtype=torch.bool), 16), "must be a torch.bool"),
        (
            lambda: jitattn.BlockSparse(torch.ones(2, 2, dtype=torch.bool), 16, first_row=-1),
            "first_row",
        ),
        (lambda: jitattn.PerHead([jitattn.KeyPadding(torch.ones(1, 2))]), "each must be a Full"),
        (lambda: jitattn.PerHead([jitattn.Causal("top_left")]), "count from the end"),
    ],
)
def test_patterns_are_checked(make: object, text: str) -> None:
    with pytest.raises(jitattn.InvalidInputError, match=text):
        make()


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (jitattn.BlockSparse(torch.ones(3, 1, 1, dtype=torch.bool), 16), "for 3 heads"),
        (jitattn.PerHead([jitattn.Full()] * 3), "has 3 rules"),
    ],
)
def test_patterns_fit_the_heads(rule: jitattn.Mask, text: str) -> None:
    q, k, v = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)
    with pytest.raises(jitattn.InvalidInputError, match=text):
        jitattn.attention(q, k, v, mask=rule)
