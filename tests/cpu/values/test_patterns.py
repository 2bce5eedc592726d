"""Tests functions on block patterns."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import jitattn
from jitattn import patterns
from jitattn.patterns import drawing
from jitattn.patterns.seen import seen
from jitattn.reference import attended
from tests.support.patterns import local_strides, rules


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
    patterns.draw(pattern, tmp_path / "p.png", cell=3, labels=False, columns=2)
    picture = Image.open(tmp_path / "p.png")
    assert picture.format == "PNG"
    assert picture.size == (2 * (2 * 3 + 4) + 4, 2 * 3 + 8)  # gaps of four pixels
    shown = [
        [[picture.getpixel((4 + h * 10 + x * 3 + 1, 4 + y * 3 + 1)) == drawing.INK
          for x in range(2)] for y in range(2)]
        for h in range(2)
    ]  # fmt: skip
    assert shown == pattern.tolist()


def opened(path: Path) -> Image.Image:
    with Image.open(path) as picture:
        return picture.copy()


def test_heads_are_drawn_in_a_grid(tmp_path: Path) -> None:
    pattern = torch.ones(6, 4, 4, dtype=torch.bool)
    sizes = {}
    for columns in (1, 2, 3, 6, None):
        patterns.draw(pattern, tmp_path / "p.png", cell=10, labels=False, columns=columns)
        sizes[columns] = opened(tmp_path / "p.png").size
    assert sizes[1] == (60, 310)
    assert sizes[2] == (110, 160)
    assert sizes[None] == sizes[3] == (160, 110)
    assert sizes[6] == (310, 60)
    with pytest.raises(jitattn.InvalidInputError, match="columns=0"):
        patterns.draw(pattern, tmp_path / "p.png", columns=0)


def test_labels_name_heads_and_positions(tmp_path: Path) -> None:
    patterns.draw(torch.ones(2, 40, 80, dtype=torch.bool), tmp_path / "p.svg")
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    words = [one.text for one in root.iter("{http://www.w3.org/2000/svg}text")]
    assert words == [word for head in ("head 0", "head 1")
                     for word in (head, "0", "0", "79", "keys", "39")]  # fmt: skip
    bare, labelled = tmp_path / "bare.png", tmp_path / "labelled.png"
    for path, has_labels in ((bare, False), (labelled, True)):
        patterns.draw(torch.ones(2, 40, 80, dtype=torch.bool), path, labels=has_labels)
    assert opened(labelled).size > opened(bare).size
    assert len(opened(labelled).getcolors(100000)) > len(opened(bare).getcolors(100000))


def test_svg_has_a_bar_for_every_run(tmp_path: Path) -> None:
    pattern = torch.tensor([[True, True, False, True], [False, False, False, False]])
    patterns.draw(pattern, tmp_path / "p.svg", cell=10, labels=False)
    root = ElementTree.parse(tmp_path / "p.svg").getroot()
    bars = [one for one in root.iter("{http://www.w3.org/2000/svg}rect")
            if one.get("fill") == "#1f4e79"]  # fmt: skip
    places = [tuple(one.get(name) for name in ("x", "y", "width", "height")) for one in bars]
    assert places == [("10", "10", "20", "10"), ("40", "10", "10", "10")]


def test_text_of_a_mask(tmp_path: Path) -> None:
    window = jitattn.Window(1, 0, keep_first=1)
    shown = patterns.text(window, sizes=(4, 4, 5))  # the same for all heads: one
    assert shown == ("head 0: 4 queries down, 5 keys across\n████\n██████\n██  ████\n██    ████\n")
    patterns.draw(window, tmp_path / "w.txt", sizes=(4, 4, 5))
    assert (tmp_path / "w.txt").read_text(encoding="utf-8") == shown
    wide = patterns.text(torch.ones(100, 300, dtype=torch.bool).tril(), width=10)
    assert [len(line) for line in wide.splitlines()[1:]] == [2, 4, 6, 8]  # 30 x 30 a cell
    assert wide.splitlines()[2] == "██▒▒"
    assert wide.splitlines()[4] == "██████░░"  # the last ten rows
    with pytest.raises(jitattn.InvalidInputError, match="width=0"):
        patterns.text(torch.ones(1, 1, dtype=torch.bool), width=0)


@settings(max_examples=60, derandomize=True, deadline=None, database=None)
@given(rules(), st.integers(0, 1), st.booleans())
def test_every_mask_is_drawn_as_the_reference_sees_it(
    chosen: tuple[Any, int, int, int, int], batch_idx: int, with_tensors: bool
) -> None:
    rule, heads, _, len_q, len_kv = chosen
    generator = torch.Generator().manual_seed(len_q * len_kv)
    mask = rule
    if with_tensors:
        keep = torch.rand(2, len_kv, generator=generator) < 0.7
        dense = torch.rand(2, heads, len_q, len_kv, generator=generator) < 0.7
        mask = rule & jitattn.KeyPadding(keep) & jitattn.Dense(dense)
    try:
        truth = attended(mask, 2, heads, heads, len_q, len_kv)[batch_idx]
    except jitattn.InvalidInputError:
        return  # of other heads: the rule was drawn for groups of them
    got = seen(mask, (heads, len_q, len_kv), batch_idx)
    assert torch.equal(got.expand(heads, -1, -1), truth.expand(heads, -1, -1))


def test_a_mask_and_a_function_are_drawn_together() -> None:
    mask = jitattn.Causal() & jitattn.MaskMod(lambda b, h, q, kv: (kv + h) % 2 == 0)
    got = seen(mask, (2, 4, 4), 0)
    even = torch.arange(4) % 2 == 0
    causal = torch.ones(4, 4, dtype=torch.bool).tril()
    assert torch.equal(got, torch.stack([causal & even, causal & ~even]))


@pytest.mark.parametrize("name", ["p.jpg", "p", "p.PDF"])
def test_other_suffixes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(jitattn.InvalidInputError, match=r"must be \.png, \.svg or \.txt"):
        patterns.draw(torch.ones(2, 2, dtype=torch.bool), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_masks_are_drawn_at_given_sizes(tmp_path: Path) -> None:
    with pytest.raises(jitattn.InvalidInputError, match=r"a Causal is drawn at sizes=\(H, Lq, Lkv"):
        patterns.draw(jitattn.Causal(), tmp_path / "p.png")


def test_png_without_pillow_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    pattern = torch.ones(2, 2, dtype=torch.bool)
    root = Path(__file__).parents[3]
    with pytest.raises(jitattn.JitAttnError) as refused:
        patterns.draw(pattern, tmp_path / "p.png")
    assert str(refused.value).endswith(f'pip install -e "{root}[draw]"')
    patterns.draw(pattern, tmp_path / "p.svg")
    patterns.draw(pattern, tmp_path / "p.txt")


@pytest.mark.parametrize("bad", [torch.ones(2, 2), torch.ones(2, dtype=torch.bool), 5])
def test_patterns_are_checked(bad: object) -> None:
    with pytest.raises(jitattn.InvalidInputError, match="pattern is"):
        patterns.describe(bad)
