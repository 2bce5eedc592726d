"""Tests CPU-path gradients of random combinations against fp64 autograd of the reference."""

from __future__ import annotations

import torch
from hypothesis import given

import jitattn
from jitattn import Ragged
from tests.support.gradients import GradCase, check_gradients, grad_cases
from tests.support.random_cases import cases


@cases(60)
@given(grad_cases(most_rows=130))
def test_random_gradients(case: GradCase) -> None:
    check_gradients(case, "cpu")


def test_empty_sequences_have_gradients_of_zero_through_both_results() -> None:
    q, k = (torch.randn(4, 2, 8, requires_grad=True) for _ in range(2))
    nowhere = Ragged.from_cu_seqlens(torch.zeros(2, dtype=torch.int32), 0)
    results = jitattn.attention(q, k, k, q_seqs=nowhere, kv_seqs=nowhere, return_lse=True)
    for result in results:
        found = torch.autograd.grad(result, (q, k), torch.ones_like(result), retain_graph=True)
        assert not any(x.any() for x in found)
