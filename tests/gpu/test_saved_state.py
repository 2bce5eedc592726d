"""Tests that writes to saved tensors between forward and backward raise, on a GPU."""

from __future__ import annotations

import pytest
import torch

import jitattn

from ..support.saved_state import CASES, Case, check_that_a_write_raises, inputs_of

GPU = torch.device("cuda", 0)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_a_write_raises(case: Case) -> None:
    check_that_a_write_raises(case, GPU, 64)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_saved_tensors_are_moved_by_hooks(case: Case) -> None:
    """`save_on_cpu` and its kin see every tensor of a call, and gradients are the same."""
    qkv = inputs_of(case, GPU, 64)
    arguments, _ = case.make(GPU, 64)
    packed = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal packed
        packed += 1
        return tensor.clone()

    with torch.enable_grad():
        truth = torch.autograd.grad(jitattn.attention(*qkv, **arguments).sum(), qkv)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = jitattn.attention(*qkv, **arguments)
        found = torch.autograd.grad(out.sum(), qkv)
    assert packed >= 6  # q, k, v, out and LSE, and what the case is about
    for one, other in zip(found, truth, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-3)  # dq has no order
