"""Tests functions of pairs in calls on the CPU: offsets of queries, explain, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import jitattn
import jitattn.patterns
from jitattn import Causal, MaskMod, Padded, Ragged
from jitattn.compat.flex_attention import create_block_mask
from jitattn.reference import reference
from tests.support.compare import rel_l2


def drawn(len_q: int = 7, len_kv: int = 12) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, len_q, 4, 16), (2, len_kv, 2, 16), (2, len_kv, 2, 16))
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def distance(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return s - 0.1 * (q_idx - kv_idx).abs()


def before(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return q_idx >= kv_idx


def test_a_mask_from_an_offset_on_is_causal() -> None:
    q, k, v = drawn()
    expected = jitattn.attention(q, k, v, mask=Causal())
    for offset in (5, "bottom_right", torch.tensor([5, 5])):
        given: dict[str, Any] = {"mask": MaskMod(before), "q_offset": offset}
        assert rel_l2(jitattn.attention(q, k, v, **given), expected) < 1e-12
        assert rel_l2(reference(q, k, v, **given), expected) < 1e-12


@pytest.mark.parametrize("offset", [3, -2, "bottom_right", torch.tensor([4, 1])], ids=str)
def test_scores_from_an_offset_on(offset: Any) -> None:
    q, k, v = drawn()
    numbers = torch.tensor([5, 5]) if isinstance(offset, str) else torch.as_tensor(offset).expand(2)

    def moved(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return distance(s, b, h, q_idx + numbers[b], kv_idx)

    expected = jitattn.attention(q, k, v, score_mod=moved)
    given: dict[str, Any] = {"score_mod": distance, "q_offset": offset}
    assert rel_l2(jitattn.attention(q, k, v, **given), expected) < 1e-6
    assert rel_l2(reference(q, k, v, **given), expected) < 1e-6


def test_a_masks_own_offset_stays() -> None:
    q, k, v = drawn()
    own = MaskMod(before, q_offset=5)
    expected = jitattn.attention(q, k, v, mask=own & MaskMod(before, q_offset=2))
    found = jitattn.attention(q, k, v, mask=own & MaskMod(before), q_offset=2)
    assert torch.equal(found, expected)
    inverted = jitattn.attention(q, k, v, mask=~MaskMod(before), q_offset=2)
    assert torch.equal(inverted, jitattn.attention(q, k, v, mask=~MaskMod(before, q_offset=2)))


def test_each_sequence_has_its_offset() -> None:
    q, k, v = drawn()
    length = torch.tensor([9, 12])
    expected = jitattn.attention(q, k, v, kv_seqs=Padded(length), mask=Causal())
    given: dict[str, Any] = {"mask": MaskMod(before), "kv_seqs": Padded(length)}
    for offset in ("bottom_right", length - 7):
        found = jitattn.attention(q, k, v, **given, q_offset=offset)
        assert rel_l2(found, expected) < 1e-12
    ragged = Ragged.from_cu_seqlens(torch.tensor([0, 3, 7], dtype=torch.int32), 4)
    flat = [x[0, :7] for x in (q, k, v)]
    found = jitattn.attention(
        *flat, q_seqs=ragged, kv_seqs=ragged, mask=MaskMod(before), q_offset="bottom_right"
    )
    expected = jitattn.attention(*flat, q_seqs=ragged, kv_seqs=ragged, mask=Causal())
    assert rel_l2(found, expected) < 1e-12


def test_decoding_from_the_end_of_each_cache() -> None:
    q, k, v = drawn(len_q=1)
    length = torch.tensor([5, 12], dtype=torch.int32)
    expected = jitattn.attention_with_kvcache(q, k, v, length=length, mask=jitattn.Window(3, 0))
    within = MaskMod(lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & (q_idx - kv_idx <= 3))
    for offset in ("bottom_right", length - 1):
        given: dict[str, Any] = {"length": length, "q_offset": offset}
        found = jitattn.attention_with_kvcache(q, k, v, mask=within, **given)
        assert rel_l2(found, expected) < 1e-12


def test_a_cache_has_no_gradients_of_captured_tensors() -> None:
    q, k, v = drawn(len_q=1)
    slopes = torch.ones(4, requires_grad=True)
    with pytest.raises(jitattn.UnsupportedError, match="captures requires grad"):
        jitattn.attention_with_kvcache(
            q, k, v, length=5, score_mod=lambda s, b, h, i, j: s * slopes[h]
        )


@pytest.mark.parametrize("offset", [1.5, True, "top_left", torch.zeros(2, 2)], ids=str)
def test_other_offsets_are_refused(offset: Any) -> None:
    q, k, v = drawn()
    with pytest.raises(jitattn.InvalidInputError, match=r"q_offset is .*an int, a tensor \[B\]"):
        jitattn.attention(q, k, v, score_mod=distance, q_offset=offset)


def test_explain_shows_the_kernels_function_on_any_machine() -> None:
    """Numbers and tensors are in none: calls that differ in these have one key."""
    q, k, v = (x.half() for x in drawn())

    def shown(factor: float, table: torch.Tensor, offset: int) -> jitattn.Explanation:
        return jitattn.explain(
            q, k, v, score_mod=lambda s, b, h, i, j: s * factor + table[i], q_offset=offset
        )

    one, other = shown(2.0, torch.zeros(9), 3), shown(0.5, torch.ones(30), 8)
    assert one.path == "cpu"
    assert len(one.key) == 64
    assert one.key == other.key
    assert one.function == other.function
    assert "params.number0" in one.function
    assert one.function in str(one)
    double = shown(2.0, torch.zeros(9, dtype=torch.float64), 3)
    assert double.key != one.key
    plain = jitattn.explain(q, k, v)
    assert (plain.key, plain.function) == ("", "")


def test_masks_are_drawn(tmp_path: Path) -> None:
    image = pytest.importorskip("PIL.Image")
    ids = torch.tensor([[0, 0, 1, 1, 1]])
    mask = MaskMod(lambda b, h, q, kv: (ids[b, q] == ids[b, kv]) & (q >= kv + h))
    jitattn.patterns.draw(mask, tmp_path / "a.png", sizes=(2, 5, 5), cell=4)
    expected = (ids == ids.T) & torch.ones(5, 5, dtype=torch.bool).tril()
    both = torch.stack([expected, expected & torch.ones(5, 5, dtype=torch.bool).tril(-1)])
    jitattn.patterns.draw(both, tmp_path / "b.png", cell=4)
    one, other = (image.open(tmp_path / name).tobytes() for name in ("a.png", "b.png"))
    assert one == other
    blocks = create_block_mask(lambda b, h, q, kv: q >= kv, None, None, 512, 512, device="cpu")
    jitattn.patterns.draw(blocks, tmp_path / "c.png", cell=4)
    jitattn.patterns.draw(torch.ones(4, 4).tril().bool(), tmp_path / "d.png", cell=4)
    one, other = (image.open(tmp_path / name).tobytes() for name in ("c.png", "d.png"))
    assert one == other
    with pytest.raises(jitattn.InvalidInputError, match="sizes="):
        jitattn.patterns.draw(mask, tmp_path / "e.png")
