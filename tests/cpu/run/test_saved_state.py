"""Tests that writes to saved tensors between forward and backward raise, on the CPU."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.saved_state import CASES, Case, check_that_a_write_raises


@pytest.mark.parametrize("length", [64, 300], ids=["one_chunk", "checkpoints"])
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_write_raises(case: Case, length: int) -> None:
    check_that_a_write_raises(case, torch.device("cpu"), length)


def test_gradients_through_the_lse_alone_are_guarded() -> None:
    keep = torch.ones(1, 64, dtype=torch.bool)
    q, k, v = (torch.randn(1, 64, 2, 16, requires_grad=True) for _ in "qkv")
    _, lse = jitattn.attention(q, k, v, mask=jitattn.KeyPadding(keep), return_lse=True)
    keep[0, 3] = False
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        lse.sum().backward()


def test_a_double_backward_is_guarded() -> None:
    bias = torch.randn(1, 1, 64, 64)
    q, k, v = (torch.randn(1, 64, 2, 16, requires_grad=True) for _ in "qkv")
    out = jitattn.attention(q, k, v, bias=bias)
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    dq.sum().backward(retain_graph=True)  # fine as long as nothing was written
    bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()
