"""Tests which blocks of traced masks are visited: never fewer than have visible pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from jitattn.request.mask_blocks import simplified
from jitattn.request.mask_ranges import BLOCK, Sizes, visible_blocks
from jitattn.spec.program import parse
from jitattn.values.functions import traced
from jitattn.values.masks import BlockSparse, Causal, Full, MaskMod, Rule, Window
from jitattn.values.pairs import over_pairs
from tests.support.expressions import Captured, random_mask
from tests.support.functions import FUNCTIONS

CPU = torch.device("cpu")
MASKS = ["prefix", "document", "natten", "dilated", "by_head", "window", "causal"]


@pytest.mark.parametrize("name", MASKS)
def test_no_visible_pair_is_missed(name: str) -> None:
    sizes = Sizes(2, 4, 300, 350, True)
    _, mask_mod = FUNCTIONS[name]("cpu", *sizes[:4])
    function = traced(None, MaskMod(mask_mod))
    found = visible_blocks(parse(function.program), function, sizes)
    exact = over_pairs(mask_mod, None, sizes[:4], CPU).expand(sizes[:4])
    exact = torch.nn.functional.pad(exact, (0, -350 % BLOCK, 0, -300 % BLOCK))
    blocks = exact.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3).any(0)
    assert found is not None
    found = found.expand(blocks.shape)
    assert (found | ~blocks).all()
    if name in ("window", "causal", "document", "prefix"):  # and no block in vain
        assert torch.equal(found, blocks)


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
    found, rest = simplified(function, Sizes(1, 1, 40, 70, True), CPU)
    assert found == rule
    assert rest is None


def test_a_window_from_the_top_left_is_a_rule_of_equal_lengths_alone() -> None:
    function = traced(None, MaskMod(SEEN["window"][0]))
    assert simplified(function, Sizes(1, 1, 70, 70, True), CPU) == (Window(8, 0), None)
    rule, rest = simplified(function, Sizes(1, 1, 40, 70, True), CPU)
    assert rule == Full()
    assert rest is function


def test_the_score_is_left() -> None:
    function = traced(lambda s, b, h, q, k: s * 2, MaskMod(SEEN["causal"][0]))
    rule, rest = simplified(function, Sizes(1, 1, 40, 70, True), CPU)
    assert rule == Causal("top_left")
    assert rest is not None
    assert parse(rest.program).mask is None


def test_blocks_are_kept_until_a_captured_tensor_changes() -> None:
    ids = torch.arange(1024)[None] // 100

    def same(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ids[b, q] == ids[b, k]

    sizes = Sizes(1, 1, 1024, 1024, True)
    function = traced(None, MaskMod(same))
    first, _ = simplified(function, sizes, CPU)
    again, _ = simplified(function, sizes, CPU)
    assert isinstance(first, BlockSparse)
    assert again is first
    ids[:, 500:] = 7
    changed, _ = simplified(function, sizes, CPU)
    assert isinstance(changed, BlockSparse)
    assert changed.pattern.sum() > first.pattern.sum()


def test_what_is_not_a_number_hides_nothing_else() -> None:
    """A NaN beside a visible pair, in the same block."""
    times = torch.arange(300.0)
    times[::7] = float("nan")
    sizes = Sizes(1, 1, 300, 300, True)

    def near(b: Any, h: Any, q: Any, k: Any) -> Any:
        return (times[q] - times[k]).abs() < 5.0

    function = traced(None, MaskMod(near))
    found = visible_blocks(parse(function.program), function, sizes)
    exact = over_pairs(near, None, sizes[:4], CPU)
    exact = torch.nn.functional.pad(exact, (0, -300 % BLOCK, 0, -300 % BLOCK))
    blocks = exact.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3)[0]
    assert found is not None
    assert (found | ~blocks).all()


@pytest.mark.parametrize("seed", range(60))
def test_random_masks(seed: int) -> None:
    """No visible pair of a random mask is missed."""
    sizes = Sizes(2, 2, 200, 260, True)
    mask_mod = random_mask(seed, Captured("cpu", *sizes[:2], 260))
    function = traced(None, MaskMod(mask_mod))
    found = visible_blocks(parse(function.program), function, sizes)
    exact = over_pairs(mask_mod, None, sizes[:4], CPU).expand(sizes[:4])
    exact = torch.nn.functional.pad(exact, (0, -260 % BLOCK, 0, -200 % BLOCK))
    blocks = exact.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3).any(0)
    if found is not None:
        assert (found.expand(blocks.shape) | ~blocks).all()
