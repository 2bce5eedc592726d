"""Tests the block-list cache: built once, rebuilt after writes, freed with the pattern."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from jitattn.request import block_lists
from jitattn.request.block_list_cache import BlockListCache
from jitattn.request.problem import Call
from jitattn.run.operator_encoding import decode, encode
from jitattn.values.masks import BlockSparse, LocalStride, PerHead, Rule, Window

CPU = torch.device("cpu")


class Builds:
    """Lists made for rules over 4 query heads, and how many had to be built."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        build = block_lists._build

        def counted(*args: object) -> block_lists.BlockLists:
            self.count += 1
            return build(*args)

        monkeypatch.setattr(block_lists, "_build", counted)

    def of(self, rule: Rule, longest: int = 100, positions: int = 64) -> block_lists.BlockLists:
        return block_lists.block_lists_of(rule, (4, 2), longest, positions, CPU)


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> Iterator[Builds]:
    monkeypatch.setattr(block_lists, "_cache", BlockListCache())
    return Builds(monkeypatch)


def random_pattern() -> torch.Tensor:
    return torch.rand(8, 8) < 0.5


def through_operator(rule: Rule) -> Rule:
    call = Call(rule, None, "bshd", None, None, None, None, False, None, None)
    return decode(*encode(call)).mask


def set_blocks(made: block_lists.BlockLists) -> int:
    return len(made.groups)


def test_a_model_of_a_hundred_layers_builds_each_pattern_once(builds: Builds) -> None:
    rules: list[Rule] = [BlockSparse(random_pattern(), 16) for _ in range(100)]
    rules += [LocalStride(16, 1, 4, head_offset=i) for i in range(100)]
    rules += [PerHead([Window(i), BlockSparse(random_pattern(), 16)]) for i in range(100)]
    for _ in range(3):
        for rule in rules:
            builds.of(rule)
            builds.of(rule, positions=32)  # as a backward pass asks
    assert builds.count == 2 * len(rules)


def test_lists_cover_lengths_rounded_up(builds: Builds) -> None:
    rule = BlockSparse(random_pattern(), 16)
    assert builds.of(rule, 100) is builds.of(rule, 1000)
    assert builds.of(rule, 1025) is not builds.of(rule, 100)


def test_values_made_again_of_the_same_memory_share_lists(builds: Builds) -> None:
    pattern = torch.rand(3, 8, 8) < 0.5
    made = builds.of(BlockSparse(pattern[1], 16))
    assert builds.of(BlockSparse(pattern[1], 16)) is made
    assert builds.of(BlockSparse(pattern[2], 16)) is not made
    assert builds.of(BlockSparse(pattern[1], 16, causal=True)) is not made
    assert builds.of(BlockSparse(pattern[1], 8)) is not made


def test_an_operator_finds_the_lists_of_an_eager_call(builds: Builds) -> None:
    rule: Rule = PerHead([BlockSparse(random_pattern(), 16), Window(3)])
    made = builds.of(rule)
    assert builds.of(through_operator(rule)) is made
    with torch.inference_mode():
        rule = BlockSparse(random_pattern(), 16)
        assert builds.of(through_operator(rule)) is builds.of(rule)


def test_lists_die_with_the_memory_of_their_pattern(builds: Builds) -> None:
    kept = BlockSparse(random_pattern(), 16)
    builds.of(kept)
    pattern = random_pattern()
    rule = PerHead([kept, BlockSparse(pattern, 16)])
    builds.of(rule)
    assert len(block_lists._cache) == 2
    view = pattern[0]
    del pattern, rule
    assert len(block_lists._cache) == 2  # the memory is there still
    del view
    assert len(block_lists._cache) == 1
    builds.of(kept)
    assert builds.count == 2


def test_pinned_lists_outlive_their_pattern(builds: Builds) -> None:
    rule = BlockSparse(random_pattern(), 16)
    made = builds.of(rule)
    block_lists._cache.pin(made)
    block_lists._cache.pin(made)
    assert len(block_lists._cache._captured) == 1
    del rule
    assert len(block_lists._cache) == 0
    assert block_lists._cache._captured == [made]


def test_a_write_is_seen(builds: Builds) -> None:
    pattern = torch.zeros(8, 8, dtype=torch.bool)
    rule = BlockSparse(pattern, 16)
    assert set_blocks(builds.of(rule)) == 0
    pattern.fill_(True)
    made = builds.of(rule)
    assert set_blocks(made) == 16  # two runs of 64 positions by 8 groups of 16 keys
    assert builds.of(rule) is made
    assert len(block_lists._cache) == 1  # in place of the old ones


def test_a_write_under_inference_mode_is_seen(builds: Builds) -> None:
    with torch.inference_mode():
        pattern = torch.zeros(8, 8, dtype=torch.bool)
        rule = BlockSparse(pattern, 16)
        assert set_blocks(builds.of(rule)) == 0
        pattern.fill_(True)
        assert set_blocks(builds.of(rule)) == 16
    made = builds.of(rule)
    assert builds.of(rule) is made
    rule.changed()  # compares anyway
    assert builds.of(rule) is made
    normal = torch.zeros(8, 8, dtype=torch.bool)
    with torch.inference_mode():
        assert set_blocks(builds.of(BlockSparse(normal, 16))) == 0
        normal.fill_(True)
        assert set_blocks(builds.of(BlockSparse(normal, 16))) == 16


def test_a_write_by_another_library_can_be_told(builds: Builds) -> None:
    array = np.zeros((8, 8), dtype=bool)
    rule = BlockSparse(torch.from_numpy(array), 16)
    assert set_blocks(builds.of(rule)) == 0
    array[:] = True
    rule.changed()
    assert set_blocks(builds.of(rule)) == 16


def test_rules_without_tensors_are_kept_up_to_a_size(builds: Builds) -> None:
    rules = [LocalStride(16, 1, 4, head_offset=i) for i in range(8)]
    size = builds.of(rules[0]).nbytes
    block_lists._cache = BlockListCache(most_bytes=4 * size)
    for rule in rules:
        builds.of(rule)
    assert len(block_lists._cache) == 4
    count = builds.count
    builds.of(rules[-1])
    assert builds.count == count
    builds.of(rules[0])
    assert builds.count == count + 1


def test_threads_share_the_lists_kept(builds: Builds) -> None:
    made = [BlockSparse(random_pattern(), 16) for _ in range(40)]

    def ask(seed: int) -> None:
        order = torch.randperm(len(made), generator=torch.Generator().manual_seed(seed)).tolist()
        for number in order:
            assert len(builds.of(made[number]).heads) == 2

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(ask, range(8)))
    assert len(block_lists._cache) == len(made)
