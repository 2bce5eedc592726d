"""Tests block lists, decoded as a kernel reads them, against the reference mask."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from jitattn.reference import attended
from jitattn.request import block_lists
from jitattn.values.masks import Full, LocalStride, PerHead, Rule, Window
from tests.support.patterns import rules

CPU = torch.device("cpu")


def read(
    made: block_lists.BlockLists, heads: int, len_q: int, len_kv: int, first_row: int
) -> torch.Tensor:
    """Expand lists to [Hq, Lq, Lkv], by the rules of block_lists.cuh."""
    attend = torch.zeros(heads, len_q, len_kv, dtype=torch.bool)
    key = torch.arange(len_kv)
    for head in range(heads):
        number, right, left, keep_first = made.heads[int(len_q == 1), head].tolist()
        for query in range(len_q):
            position = query + first_row
            tile = position >> made.positions_log2
            if (position < 0 and number % 2) or tile >= made.spans.shape[1]:
                continue
            first, count = made.spans[number // 2, max(0, tile)].tolist()
            groups = made.groups[first : first + count]
            assert (groups[1:, 0] > groups[:-1, 0]).all()
            cell = (position & ((1 << made.positions_log2) - 1)) >> 3
            for half in range(2):
                seen = groups[:, 1] >> (cell + 16 * half) & 1
                for start in (groups[:, 0] * 16 + 8 * half)[seen.bool()].tolist():
                    attend[head, query, start : start + 8] = True
            bounds = (key >= position + left) | (key < keep_first)
            attend[head, query] &= (key <= position + right) & bounds
    return attend


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(case=rules())
def test_lists_are_the_rule(case: tuple[Rule, int, int, int, int]) -> None:
    rule, heads_q, heads_kv, len_q, len_kv = case
    truth = attended(rule, 1, heads_q, heads_kv, len_q, len_kv)[0].expand(heads_q, -1, -1)
    first_row = getattr(rule, "first_row", None)
    first_row = len_kv - len_q if first_row is None else first_row
    for positions in (1, 16, 64, 128):
        longest = max(len_kv, first_row + len_q)
        made = block_lists.block_lists_of(rule, (heads_q, heads_kv), longest, positions, CPU)
        assert torch.equal(read(made, heads_q, len_q, len_kv, first_row), truth)


@pytest.mark.parametrize(
    ("rule", "agree"),
    [
        (LocalStride(16, 1, 2), True),
        (PerHead([Full(), Window(3)]), True),
        (PerHead([Full(), Full(), Window(3), Window(3)]), True),
        (PerHead([Full(), Window(3), Full(), Full()]), False),
    ],
    ids=str,
)
def test_heads_that_may_share_a_tile(rule: Rule, agree: bool) -> None:
    assert block_lists.heads_agree(rule, 4, 2) is agree
