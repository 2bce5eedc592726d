"""Tests functions on block patterns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jitattn
from jitattn import patterns
from jitattn.reference import attended
from tests.support.patterns import local_strides


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(st.data())
def test_a_written_out_pattern_is_its_rule(data: st.DataObject) -> None:
    heads_kv = data.draw(st.integers(1, 3))
    heads_q = heads_kv * data.draw(st.integers(1, 2))
    rule = data.draw(local_strides(heads_kv))
    length = data.draw(st.integers(1, 200))
    blocks = -(-length // rule.block_size)
    pattern = patterns.local_stride(rule, heads_q, heads_kv, blocks)
    listed = jitattn.BlockSparse(pattern, rule.block_size, rule.causal)
    truth = attended(rule, 1, heads_q, heads_kv, length, length)
    assert torch.equal(attended(listed, 1, heads_q, heads_kv, length, length), truth)
    tokens = patterns.to_tokens(pattern, rule.block_size, length, length, causal=rule.causal)
    assert torch.equal(tokens.repeat_interleave(heads_q // len(tokens), 0), truth[0])


def test_a_part_of_the_rows() -> None:
    rule = jitattn.LocalStride(16, 2, 3)
    whole = patterns.local_stride(rule, 4, 2, 20)
    part = patterns.local_stride(rule, 4, 2, 5, 20, first_row=15)
    assert torch.equal(part, whole[:, 15:])


@pytest.mark.parametrize("shape", [(7, 9), (3, 5, 8), (1, 4, 1)])
def test_csr_and_back(shape: tuple[int, ...]) -> None:
    pattern = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.4
    crow, col = patterns.to_csr(pattern)
    assert torch.equal(patterns.from_csr(crow, col, shape[-1]), pattern.reshape(-1, *shape[-2:]))
    used = crow[:, -1:]
    assert (col[torch.arange(col.shape[1]) >= used] == -1).all()


def test_tokens_to_blocks() -> None:
    mask = torch.zeros(20, 33, dtype=torch.bool)
    mask[17, 32] = True
    blocks = patterns.from_tokens(mask, 16)
    assert blocks.tolist() == [[False, False, False], [False, False, True]]


@pytest.mark.parametrize(
    ("rows", "efficient"),
    [
        (["1000", "1100", "1110", "1111"], True),
        (["1000", "1100", "0110", "0011"], True),  # a window drops what it has passed
        (["1000", "0100", "1010", "0001"], False),  # block 0 comes back
    ],
)
def test_kv_cache_efficiency(rows: list[str], efficient: bool) -> None:
    pattern = torch.tensor([[cell == "1" for cell in row] for row in rows])
    assert patterns.is_kv_cache_efficient(pattern) is efficient
    assert patterns.describe(pattern).is_kv_cache_efficient is efficient


def test_description() -> None:
    pattern = torch.tensor([[True, True], [False, False]])
    text = str(patterns.describe(pattern))
    assert text == (
        "1 x 2 x 2 blocks, density 0.500, 0 to 2 a row, 1 empty rows, kv-cache efficient: yes"
    )
    assert patterns.describe(pattern, causal=True).density == pytest.approx(1 / 3)


def test_drawing(tmp_path: Path) -> None:
    pattern = torch.tensor([[[True, False], [False, True]], [[False, False], [True, False]]])
    patterns.draw(pattern, tmp_path / "p.png", cell=3)
    picture = Image.open(tmp_path / "p.png")
    assert picture.format == "PNG"
    assert picture.size == (2 * (2 * 3 + 3) + 3, 2 * 3 + 6)
    ink = patterns._INK
    seen = [
        [[picture.getpixel((3 + h * 9 + x * 3 + 1, 3 + y * 3 + 1)) == ink for x in range(2)]
         for y in range(2)]
        for h in range(2)
    ]  # fmt: skip
    assert seen == pattern.tolist()


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.ones(2, dtype=torch.bool), 5])
def test_patterns_are_checked(bad: object) -> None:
    with pytest.raises(jitattn.InvalidInputError, match="pattern is"):
        patterns.describe(bad)
