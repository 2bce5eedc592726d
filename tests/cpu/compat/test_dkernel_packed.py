"""Tests packed sequences of the dkernel door: length bounds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention, _module

ENDS = torch.tensor([0, 20, 50])


def inputs(len_q: int = 50, len_kv: int = 50) -> list[Tensor]:
    sizes = ((len_q, 4), (len_kv, 2), (len_kv, 2))
    return [torch.randn(length, heads, 16) for length, heads in sizes]


def layer() -> LocalStrideSparseAttention:
    return LocalStrideSparseAttention(4, 128, 16, 2, 3, num_kv_heads=2)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The arguments that the core gets of tensors that say that they are on a GPU."""
    found: dict[str, Any] = {}

    def attention(q: Tensor, *args: object, **given: Any) -> Tensor:
        found.clear()
        found.update(given)
        return q

    monkeypatch.setattr(_module, "attention", attention)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    return found


@pytest.mark.parametrize("bounds", [{}, {"max_seqlen_k": 30}, {"max_seqlen_q": 40}], ids=str)
def test_bounds_change_nothing(bounds: dict[str, int]) -> None:
    q, k, v = inputs()
    wanted = layer()(q, k, v, cu_seqlen_k=ENDS)
    assert torch.equal(layer()(q, k, v, cu_seqlen_k=ENDS, **bounds), wanted)


def test_bounds_that_are_none() -> None:
    q, k, v = inputs()
    for value in (-1, 129, 30.0, True, torch.tensor(30)):
        for name in ("max_seqlen_q", "max_seqlen_k"):
            with pytest.raises(AssertionError, match=f"{name}=.* has room for, 128"):
                layer()(q, k, v, cu_seqlen_k=ENDS, **{name: value})
    with pytest.raises(AssertionError, match="q is 4-D"):
        layer()(q[None], k[None], v[None], max_seqlen_k=50)


@pytest.mark.parametrize(
    ("shapes", "given", "longest", "rows"),
    [
        # Without bounds the pattern has one; the mean length decides on the tile.
        ((50, 50), {}, (128, 128), 64),
        ((50, 50), {"max_seqlen_k": 30}, (30, 30), None),
        ((50, 50), {"max_seqlen_q": 30}, (30, 128), None),
        ((50, 50), {"cu_seqlen_q": ENDS, "max_seqlen_k": 30}, (30, 30), 64),
        ((2, 50), {}, (1, 128), None),  # one query each
        ((2, 50), {"cu_seqlen_q": torch.tensor([0, 1, 2])}, (128, 128), 16),
        ((100, 100), {}, (128, 128), None),
    ],
    ids=str,
)
def test_lengths_on_a_gpu_are_bounded(
    shapes: tuple[int, int],
    given: dict[str, Any],
    longest: tuple[int, int],
    rows: int | None,
    seen: dict[str, Any],
) -> None:
    layer()(*inputs(*shapes), cu_seqlen_k=ENDS, **given)
    assert (seen["q_seqs"].max_length(), seen["kv_seqs"].max_length()) == longest
    assert seen["tile_rows"] == rows


def test_a_pattern_with_few_rows_takes_unknown_lengths(seen: dict[str, Any]) -> None:
    short = SparseAttention(16, torch.ones(2, 8))
    short(*inputs(), cu_seqlen_k=ENDS)
    assert seen["kv_seqs"].max_length() == 128
    short(*inputs(), cu_seqlen_k=ENDS, max_seqlen_k=32)
    with pytest.raises(jitattn.InvalidInputError, match="as many rows as columns"):
        short(*inputs(), cu_seqlen_k=ENDS, max_seqlen_k=33)


def test_queries_beyond_the_rows_see_nothing() -> None:
    """What a kernel does with lengths that nobody has checked."""
    q, k, v = inputs()
    mask = jitattn.BlockSparse(torch.ones(2, 8, dtype=torch.bool), 16, causal=True)
    seqs = jitattn.Ragged.from_cu_seqlens(torch.tensor([0, 50]), 128)
    out = jitattn.attention(q, k, v, mask=mask, q_seqs=seqs, kv_seqs=seqs)
    assert out[:32].any(dim=2).all()
    assert not out[32:].any()
