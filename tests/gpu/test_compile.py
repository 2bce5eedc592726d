"""Tests torch.compile on a GPU: one graph, same results as eager, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.support.compare import rel_l2
from tests.support.compiled import CASES, inputs

pytestmark = pytest.mark.real_gpu


@pytest.mark.parametrize("name", list(CASES))
def test_one_graph_with_the_same_results(name: str) -> None:
    function, more = CASES[name]
    own = [x.detach().cuda().requires_grad_() for x in (*inputs(), *more)]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with torch.enable_grad():
        got, wanted = compiled(*own), function(*own)
    ones = torch.ones_like(wanted)
    assert torch.equal(got, wanted)
    gradients = (torch.autograd.grad(end, own, ones) for end in (got, wanted))
    for one, other in zip(*gradients, strict=True):
        assert rel_l2(one, other) < 1e-5
