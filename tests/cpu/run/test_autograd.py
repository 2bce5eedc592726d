"""Tests the autograd functions of the GPU path with stand-ins for its kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.api.attention import bind
from jitattn.cpu.attention import run_cpu
from jitattn.request.layouts import parse
from jitattn.request.problem import Call
from jitattn.request.scores import ADDED
from jitattn.run import autograd
from jitattn.run.backward import Gradients


def compute(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    result = run_cpu(q, k, v, parse(q, k, v, call)[1], call)
    assert isinstance(result, tuple)
    return result


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    wanted: list[str],
) -> Gradients:
    del out, lse, wanted
    assert not torch.is_grad_enabled()
    with torch.enable_grad():
        own = [x.detach().requires_grad_() for x in (q, k, v)]
        ends = compute(own[0], own[1], own[2], call._replace(return_lse=True))
        starts = (d_out, torch.zeros_like(ends[1]) if d_lse is None else d_lse)
        return Gradients(*torch.autograd.grad(ends, own, starts), {})


@pytest.fixture(autouse=True)
def _stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(autograd, "run_backward", run_backward)


def leaves() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, 9, 2, 4, generator=generator).requires_grad_() for _ in range(3)]


def followed(own: list[Tensor], **given: Any) -> tuple[Tensor, Tensor]:
    _, call = bind(own[0], own[1], own[2], given)
    none = (None,) * len(ADDED)
    call = call._replace(return_lse=True)
    found = autograd.apply(autograd.Attention, call, lambda: compute(*own, call), *own, *none)
    out, lse = found
    return out, lse


def test_gradients_of_out_and_of_the_lse() -> None:
    own = leaves()
    out, lse = followed(own)
    wanted_out, wanted_lse = jitattn.attention(*own, return_lse=True)
    for end, wanted in ((out, wanted_out), (lse, wanted_lse)):
        ours = torch.autograd.grad(end.sum(), own, retain_graph=True, allow_unused=True)
        theirs = torch.autograd.grad(wanted.sum(), own, retain_graph=True, allow_unused=True)
        for one, other in zip(ours, theirs, strict=True):
            other = torch.zeros_like(one) if other is None else other
            torch.testing.assert_close(one, other)


def test_a_second_derivative_is_refused_when_it_is_taken() -> None:
    own = leaves()
    out, _ = followed(own)
    first = torch.autograd.grad(out.sum(), own, create_graph=True)
    torch.testing.assert_close(
        first[0], torch.autograd.grad(jitattn.attention(*own).sum(), own[0])[0]
    )
    with pytest.raises(jitattn.UnsupportedError, match="move the tensors to the CPU"):
        torch.autograd.grad(first[0].sum(), own[0])


def test_forward_mode_is_refused() -> None:
    own = leaves()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(own[0].detach(), torch.ones_like(own[0]))
        with pytest.raises(jitattn.UnsupportedError, match="forward-mode"):
            followed([dual, *own[1:]])


def test_a_result_that_nobody_uses_costs_nothing() -> None:
    own = leaves()
    out, lse = followed(own)
    assert out.requires_grad
    assert lse.requires_grad
    (dq,) = torch.autograd.grad(own[0].sum() + 0.0 * out.detach().sum(), own[0])
    assert torch.equal(dq, torch.ones_like(dq))
