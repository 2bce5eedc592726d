"""Tests what becomes of traced masks: rules of positions, or blocks that a kernel finds."""

from __future__ import annotations

from typing import Any

import pytest

from jitattn.request.mask_blocks import Sizes, simplified
from jitattn.spec.program import parse
from jitattn.values.functions import traced
from jitattn.values.masks import Causal, Full, FunctionBlocks, MaskMod, Rule, Window

SEEN: dict[str, tuple[Any, Any, Rule]] = {
    "causal": (lambda b, h, q, k: q >= k, 0, Causal("top_left")),
    "turned": (lambda b, h, q, k: k <= q, 0, Causal("top_left")),
    "strict": (lambda b, h, q, k: k < q + 1, "bottom_right", Causal()),
    "window": (lambda b, h, q, k: (q >= k) & (q - k < 9), "bottom_right", Window(8, 0)),
    "both sides": (lambda b, h, q, k: (q - k <= 7) & (k - q <= 3), "bottom_right", Window(7, 3)),
}


@pytest.mark.parametrize("name", SEEN)
def test_bounds_of_the_distance_are_rules(name: str) -> None:
    mask_mod, offset, rule = SEEN[name]
    function = traced(None, MaskMod(mask_mod, q_offset=offset))
    found, rest = simplified(function, Sizes(1, 1, 40, 70, True))
    assert found == rule
    assert rest is None


def test_a_window_from_the_top_left_is_a_rule_of_equal_lengths_alone() -> None:
    function = traced(None, MaskMod(SEEN["window"][0]))
    assert simplified(function, Sizes(1, 1, 70, 70, True)) == (Window(8, 0), None)
    rule, rest = simplified(function, Sizes(1, 1, 40, 70, True))
    assert rule == Full()
    assert rest is function


def test_the_score_is_left() -> None:
    function = traced(lambda s, b, h, q, k: s * 2, MaskMod(SEEN["causal"][0]))
    rule, rest = simplified(function, Sizes(1, 1, 40, 70, True))
    assert rule == Causal("top_left")
    assert rest is not None
    assert parse(rest.program).mask is None


FOUND: dict[str, tuple[Any, int, bool]] = {
    "alike": (lambda b, h, q, k: (q // 50) == (k // 50), 1, False),
    "by head": (lambda b, h, q, k: (q // (50 + h)) == (k // 50), 1, True),
    "by sequence": (lambda b, h, q, k: (q // 50) == (k // (50 + b)), 2, False),
}


@pytest.mark.parametrize("name", FOUND)
def test_lists_are_of_what_differs(name: str) -> None:
    mask_mod, batch, by_head = FOUND[name]
    function = traced(None, MaskMod(mask_mod))
    rule, rest = simplified(function, Sizes(2, 4, 300, 400, True))
    assert isinstance(rule, FunctionBlocks)
    assert (rule.batch, rule.by_head, rule.len_q, rule.len_kv) == (batch, by_head, 300, 400)
    assert rest is function


HIDDEN: dict[str, tuple[Any, Sizes]] = {
    "few pairs": (FOUND["alike"][0], Sizes(1, 1, 100, 100, True)),
    "no pair": (lambda b, h, q, k: h + b == 0, Sizes(1, 1, 3000, 3000, True)),
    "very many": (FOUND["alike"][0], Sizes(1, 1, 2**20, 2**20, True)),
}


@pytest.mark.parametrize("name", HIDDEN)
def test_no_lists_are_made_in_vain(name: str) -> None:
    mask_mod, sizes = HIDDEN[name]
    function = traced(None, MaskMod(mask_mod))
    assert simplified(function, sizes) == (Full(), function)


def test_a_shift_of_sequences_that_differ_is_not_known() -> None:
    function = traced(None, MaskMod(FOUND["alike"][0], q_offset="bottom_right"))
    assert simplified(function, Sizes(2, 4, 300, 400, False)) == (Full(), function)
    rule, _ = simplified(function, Sizes(2, 4, 300, 400, True))
    assert isinstance(rule, FunctionBlocks)
