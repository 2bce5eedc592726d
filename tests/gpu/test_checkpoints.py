"""Tests selective activation checkpoints: attention that must be saved is computed once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import jitattn
from jitattn.run import forward, operators
from tests.support.compare import rel_l2


@pytest.mark.usefixtures("with_grad")
@pytest.mark.parametrize("is_saved", [False, True])
def test_selective_checkpoints(is_saved: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counted(*args: Any) -> Any:
        computed.append(args)
        return forward.run(*args)

    monkeypatch.setattr(operators, "run", counted)

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if is_saved and op == torch.ops.jitattn.attention.default:
            return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = jitattn.attention(q.sin(), k, v, mask=jitattn.Causal())
        return out.cos()

    qkv = [torch.randn(1, 40, 2, 64, device="cuda").half().requires_grad_() for _ in range(3)]
    out = checkpoint(
        attend, *qkv, use_reentrant=False,
        context_fn=lambda: create_selective_checkpoint_contexts(policy),
    )  # fmt: skip
    found = torch.autograd.grad(out.float().sum(), qkv)
    assert len(computed) == 2 - is_saved
    plain = attend(*qkv)
    assert torch.equal(out, plain)
    expected = torch.autograd.grad(plain.float().sum(), qkv)
    for one, other in zip(found, expected, strict=True):
        assert rel_l2(one, other) < 1e-3
