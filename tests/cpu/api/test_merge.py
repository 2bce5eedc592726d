"""Tests that `merge` is exact, deterministic, and ignores parts that see no key."""

from __future__ import annotations

import itertools

import pytest
import torch

import jitattn
from jitattn import InvalidInputError, UnsupportedError

INF = float("inf")


def parts_of(
    num_parts: int, layout: str = "bshd", dtype: torch.dtype = torch.float32
) -> tuple[tuple[torch.Tensor, ...], list[tuple[torch.Tensor, torch.Tensor]]]:
    """Inputs, and the result over each of `num_parts` uneven parts of the keys."""
    q, k, v = (torch.randn(2, rows, 4, 16, dtype=dtype) for rows in (5, 97, 97))
    bounds = [97 * idx * idx // (num_parts * num_parts) for idx in range(num_parts + 1)]
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    axis = 1 if layout == "bshd" else 2
    halves = []
    for first, last in itertools.pairwise(bounds):
        own_k, own_v = (x.narrow(axis, first, last - first) for x in (k, v))
        halves.append(jitattn.attention(q, own_k, own_v, layout=layout, return_lse=True))
    return (q, k, v), halves


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("num_parts", [1, 2, 5, 40])
def test_parts_make_the_whole(layout: str, num_parts: int) -> None:
    inputs, parts = parts_of(num_parts, layout)
    out, lse = jitattn.merge(*zip(*parts, strict=True), layout=layout)
    truth, lse_truth = jitattn.attention(*inputs, layout=layout, return_lse=True)
    torch.testing.assert_close(out, truth, rtol=0, atol=1e-6)
    torch.testing.assert_close(lse, lse_truth, rtol=0, atol=2e-6)


def test_flat_and_stacked() -> None:
    outs, lses = torch.randn(3, 7, 2, 8), torch.randn(3, 2, 7)
    flat, flat_lse = jitattn.merge(outs, lses)
    whole, whole_lse = jitattn.merge(outs[:, None], lses[:, None])
    assert torch.equal(flat, whole[0])
    assert torch.equal(flat_lse, whole_lse[0])
    assert torch.equal(jitattn.merge(list(outs), list(lses))[0], flat)


def test_what_saw_nothing_does_not_count() -> None:
    outs = torch.randn(3, 1, 2, 1, 4)
    lses = torch.tensor([0.5, -INF, -INF]).reshape(3, 1, 1, 1).repeat(1, 1, 1, 2)
    outs[1:] = float("nan")
    lses[0, 0, 0, 1] = -INF
    out, lse = jitattn.merge(outs, lses)
    torch.testing.assert_close(out[0, 0, 0], outs[0, 0, 0, 0])
    assert torch.equal(out[0, 1], torch.zeros(1, 4))
    assert lse[0, 0].tolist() == [0.5, -INF]


def test_large_scores_do_not_overflow() -> None:
    outs, lses = torch.ones(2, 1, 1, 1, 4), torch.tensor([1e4, -1e4]).reshape(2, 1, 1, 1)
    out, lse = jitattn.merge(outs, lses)
    assert torch.equal(out, outs[0])
    assert lse.item() == 1e4


def test_dtypes_and_gradients() -> None:
    _, parts = parts_of(2, dtype=torch.bfloat16)
    outs, lses = zip(*parts, strict=True)
    assert jitattn.merge(outs, lses)[0].dtype is torch.bfloat16
    assert jitattn.merge(outs, lses, out_dtype=torch.float32)[0].dtype is torch.float32
    values = torch.randn(2, 1, 2, 2, 4, requires_grad=True)
    jitattn.merge(values, torch.zeros(2, 1, 2, 2))[0].sum().backward()
    torch.testing.assert_close(values.grad, torch.full_like(values, 0.5))


@pytest.mark.parametrize(
    ("outs", "lses", "text"),
    [
        ([], [], "outs is empty"),
        ([torch.ones(1, 2, 1, 4), torch.ones(1, 3, 1, 4)], torch.ones(2, 1, 1, 2), "be alike"),
        (torch.ones(2, 1, 2, 1, 4), torch.ones(2, 1, 1, 3), r"must be \[1, 1, 2\]"),
        (torch.ones(2, 1, 2, 1, 4), torch.ones(2, 1, 1, 2).double(), "float64: an LSE"),
        (torch.ones(2, 4), torch.ones(2), "outs has shape"),
        ([1], [2], "outs\\[0\\] is a int"),
    ],
)
def test_wrong_parts_are_named(outs: object, lses: object, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        jitattn.merge(outs, lses)


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(UnsupportedError, match="int32"):
        jitattn.merge(torch.ones(2, 1, 2, 1, 4).int(), torch.ones(2, 1, 1, 2))
