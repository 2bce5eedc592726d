"""Tests attention_with_kvcache on the CPU path, and its errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn import Causal, InvalidInputError, Ragged, Rotary, UnsupportedError
from tests.support.kvcache import CacheCase, cache_cases, check_kvcache
from tests.support.random_cases import cases

Q, K = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
CACHE = torch.zeros(2, 40, 2, 16)
TABLE = torch.ones(60, 4)


@cases(150)
@given(cache_cases(most_rows=65))
def test_random_calls(case: CacheCase) -> None:
    check_kvcache(case, "cpu")


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_steps_give_what_one_prompt_gives() -> None:
    """Token by token through a cache is causal attention over them all."""
    q, k = torch.randn(2, 9, 4, 16), torch.randn(2, 9, 2, 16)
    caches = torch.zeros(2, 2, 9, 2, 16)
    steps = [
        jitattn.attention_with_kvcache(
            q[:, t : t + 1], *caches, k[:, t : t + 1], k[:, t : t + 1], length=t
        )
        for t in range(9)
    ]
    truth = jitattn.attention(q, k, k, mask=Causal())
    assert torch.allclose(torch.cat(steps, dim=1), truth, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"length": 38}, "would hold 41 rows a sequence, but there is room for 40"),
        ({"length": index(1, 38)}, "sequence 1 would hold 41 rows"),
        ({"length": index(1, -1)}, "sequence 1 would hold 2 rows"),
        ({"length": -1}, "length=-1"),
        ({"length": 1.5}, "length=1.5"),
        ({"length": index(1)}, "1 entries on cpu: it must have one for each of the 2"),
        ({"v": None}, "v is missing"),
        ({"k": K[:1]}, "k has shape"),
        ({"k": K.double()}, "k is torch.float64"),
        ({"k": None, "v": None, "rotary": Rotary(TABLE, TABLE, interleaved=True)}, "without k"),
        ({"rotary": Rotary(TABLE[:30], TABLE[:30], interleaved=True)}, "30 positions"),
        ({"rotary": Rotary(*torch.ones(2, 60, 9), interleaved=True)}, "turn 18 columns"),
        ({"rotary": (TABLE, TABLE)}, "rotary is a tuple"),
        ({"batch_idx": index(0, 2)}, "row 2 of the cache"),
        ({"batch_idx": index(0, 1), "block_table": index(0, 1)[:, None]}, "both given"),
        ({"block_table": index(0, 2)[:, None]}, "page 2 of the cache"),
        (
            {
                "q_seqs": Ragged(index(0, 1), index(1, 2)),
                "q": Q[0],
                "k": K[0],
                "v": K[0, :2],
            },
            "v has shape",
        ),
        ({"q_seqs": index(0)}, "q_seqs is a Tensor"),
        ({"k_cache": None}, "k_cache is a NoneType"),
    ],
)
def test_wrong_calls_are_refused_and_write_nothing(change: dict[str, object], text: str) -> None:
    arguments = {"q": Q, "k_cache": CACHE, "v_cache": CACHE, "k": K, "v": K, "length": 0, **change}
    with pytest.raises(InvalidInputError, match=text):
        jitattn.attention_with_kvcache(**arguments)
    assert torch.equal(CACHE, torch.zeros_like(CACHE))


def test_gradients_are_refused() -> None:
    q = Q.clone().requires_grad_()
    with pytest.raises(UnsupportedError, match="q requires grad"):
        jitattn.attention_with_kvcache(q, CACHE, CACHE, length=3)
    with torch.no_grad():
        jitattn.attention_with_kvcache(q, CACHE, CACHE, length=3)


def test_wrong_tables_are_refused() -> None:
    for cos, sin, text in ((TABLE[0], TABLE, "must be a tensor"), (TABLE, TABLE[1:], "alike")):
        with pytest.raises(InvalidInputError, match=text):
            Rotary(cos, sin, interleaved=False)
    with pytest.raises(InvalidInputError, match="interleaved=None"):
        Rotary(TABLE, TABLE, interleaved=None)
    with pytest.raises(AttributeError, match="frozen"):
        Rotary(TABLE, TABLE, interleaved=False).cos = TABLE
