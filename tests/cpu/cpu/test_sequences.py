"""Tests ragged, padded and paged sequences on the CPU path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn import Causal, InvalidInputError, Padded, Paged, Ragged
from tests.support.layouts import LayoutCase, check_layout, layout_cases
from tests.support.random_cases import cases


@cases(200)
@given(layout_cases(most_rows=129))
def test_random_layouts(case: LayoutCase) -> None:
    check_layout(case, "cpu")


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


Q = torch.randn(10, 2, 16)
PAGES = torch.randn(4, 16, 2, 16)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: Ragged(index(0), [1]), r"length=...\) is a list"),
        (lambda: Ragged(index(0), torch.ones(1)), "float32: it must be int32"),
        (lambda: Ragged(index(0, 1), index(1)), "start has 2 entries and length 1"),
        (lambda: Ragged(index(0), index(1).long()), "must be alike"),
        (lambda: Ragged(index(0), index(1), max_length=-1), "max_length=-1"),
        (lambda: Ragged.from_cu_seqlens(index()), "cu_seqlens is empty"),
        (lambda: Padded(index(1)[None]), "shape"),
        (lambda: Paged(index(0), index(1)), "2 dimensions"),
        (lambda: Paged(index(0, 1)[:, None], index(1)), "2 rows"),
        (lambda: Paged.from_cu_seqlens(index(0, 1)[:, None], index(0, 1)), "2 rows"),
        (lambda: Paged.from_cu_seqlens(index(0)[:, None], index()), "cu_seqlens is empty"),
        (lambda: Paged.from_cu_seqlens(index(0)[:, None], torch.ones(2)), "float32"),
        (lambda: Paged(torch.ones(2, 2).int().T, index(1, 1)), "last one must be 1"),
    ],
)
def test_wrong_values_are_refused_when_they_are_made(make: object, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        make()


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"q_seqs": Ragged(index(0), index(4)), "k": Q, "v": Q}, "k has shape"),
        ({"q_seqs": Ragged(index(0), index(4)), "kv_seqs": index(1)}, "kv_seqs is a Tensor"),
        ({"q_seqs": Padded(index(4)), "kv_seqs": Ragged(index(0), index(4))}, "q has shape"),
        (
            {"q_seqs": Ragged(index(0), index(4)), "kv_seqs": Ragged(index(0, 5), index(4, 5))},
            "sequences differ: 1 and 2",
        ),
        (
            {"q_seqs": Ragged(index(0), index(11)), "kv_seqs": Ragged(index(0), index(4))},
            "q_seqs: sequence 0 is the rows 0 to 10, but there are only 10",
        ),
        (
            {
                "q_seqs": Ragged(index(0), index(4)),
                "k": PAGES,
                "v": PAGES,
                "kv_seqs": Paged(index(7)[None], index(5)),
            },
            "names page 7, but there are only 4",
        ),
        (
            {
                "q_seqs": Ragged(index(0), index(4)),
                "k": PAGES,
                "v": PAGES,
                "kv_seqs": Paged(index(1)[None], index(17)),
            },
            "kv_seqs: sequence 0 is the rows 0 to 16, but there are only 16",
        ),
    ],
)
def test_wrong_calls_are_refused(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        jitattn.attention(**{"q": Q, "k": Q, "v": Q, **arguments})


def test_values_are_frozen() -> None:
    for value in (Ragged(index(0), index(1)), Paged(index(0)[None], index(1))):
        with pytest.raises(AttributeError, match="frozen"):
            value.length = index(2)


def test_largest_length_is_read_once() -> None:
    value = Ragged.from_cu_seqlens(index(0, 3, 9))
    assert not value.knows_max_length()
    assert value.max_length() == 6
    assert value.knows_max_length()
    assert value.batch == 2


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_take_cumulative_lengths(dtype: torch.dtype) -> None:
    cumulative, table = index(2, 23, 23, 60).to(dtype), index(3, 0, 1, 2, 2, 1, 0, 3)[:6]
    table = table.reshape(3, 2)
    seqs = Paged.from_cu_seqlens(table, cumulative, max_length=30)
    assert (seqs.batch, seqs.start, seqs.stop_is_length) == (3, None, False)
    assert seqs.length.tolist() == [21, 0, 37]
    assert seqs.tensors() == {"cumulative": cumulative, "block_table": table}
    lengths = index(21, 0, 30).to(dtype)
    q = torch.randn(3, 2, 4, 16)
    given = {"mask": Causal(), "return_lse": True}
    seqs = Paged.from_cu_seqlens(table, index(2, 23, 23, 53).to(dtype))
    for got, wanted in zip(
        jitattn.attention(q, PAGES, PAGES, kv_seqs=seqs, **given),
        jitattn.attention(q, PAGES, PAGES, kv_seqs=Paged(table, lengths), **given),
        strict=True,
    ):
        assert torch.equal(got, wanted)


def test_gradients_flow_through_the_cpu_path() -> None:
    q = torch.randn(7, 2, 8, dtype=torch.float32, requires_grad=True)
    seqs = Ragged(index(0, 4), index(3, 3))
    out = jitattn.attention(q, q, q, mask=Causal(), q_seqs=seqs, kv_seqs=seqs)
    out.sum().backward()
    assert torch.isfinite(q.grad).all()
    assert torch.equal(q.grad[3], torch.zeros(2, 8))  # a row of no sequence
