"""Tests apply_rotary on the CPU path, its operators, and its errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitattn
from jitattn import InvalidInputError, Rotary
from tests.support.random_cases import cases
from tests.support.rotary import RotaryCase, check_rotary, rotary_cases

TABLES = torch.rand(2, 40, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
ROTARY = Rotary(*TABLES, interleaved=False)
X = torch.randn(2, 5, 3, 16, generator=torch.Generator().manual_seed(1))


@cases(300)
@given(rotary_cases())
def test_random_calls(case: RotaryCase) -> None:
    check_rotary(case, "cpu")


def index(*numbers: int) -> Tensor:
    return torch.tensor(numbers, dtype=torch.int32)


def test_a_leaf_is_turned_in_place() -> None:
    x = X.clone().requires_grad_()
    out = jitattn.apply_rotary(x, ROTARY, inplace=True)
    assert x.is_leaf
    assert x.data_ptr() == out.data_ptr()
    assert torch.equal(x, jitattn.apply_rotary(X, ROTARY))
    out.sum().backward()
    true = X.clone().requires_grad_()
    jitattn.apply_rotary(true, ROTARY).sum().backward()
    assert torch.equal(x.grad, true.grad)


def test_what_was_computed_before_notices_the_write() -> None:
    x = X.clone().requires_grad_()
    y = x.exp()  # needs its result for its gradient
    z = jitattn.apply_rotary(y, ROTARY, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_derivatives_of_every_order_and_of_the_tables() -> None:
    own = (X[:, :2, :1, :10], *(table[:5] for table in TABLES))
    wide = [x.double().requires_grad_() for x in own]

    def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return jitattn.apply_rotary(x, Rotary(cos, sin, interleaved=True), offset=index(0, 4))

    assert torch.autograd.gradcheck(turned, wide)
    assert torch.autograd.gradgradcheck(turned, wide)
    _, tangent = torch.func.jvp(lambda x: jitattn.apply_rotary(x, ROTARY), (X,), (X,))
    torch.testing.assert_close(tangent, jitattn.apply_rotary(X, ROTARY))


def test_fp64_is_computed_in_fp64() -> None:
    x, tables = X.double(), [table.double() for table in TABLES]
    out = jitattn.apply_rotary(x, Rotary(*tables, interleaved=False))
    cos, sin = (table[:5, None] for table in tables)
    a, b = x[..., :4], x[..., 4:8]
    assert torch.equal(out[..., :4], a * cos - b * sin)
    assert torch.equal(out[..., 4:8], b * cos + a * sin)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("wants", [False, True])
@pytest.mark.parametrize("kind", ["int", "each", "ragged"])
def test_one_graph_with_the_same_results(kind: str, wants: bool, inplace: bool) -> None:
    more: dict[str, Any] = {"offset": index(3, 38) if kind == "each" else 3}
    own = X
    if kind == "ragged":
        own, more["cu_seqlens"] = X.flatten(0, 1), index(1, 5, 9)

    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        out = jitattn.apply_rotary(x, ROTARY, inplace=inplace, **more)
        return out, out * 2.0

    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        torch._dynamo.reset()
        x = own.clone().requires_grad_(wants)
        out = run(x)
        results.append([*out, x.detach()])
        if wants:
            results[-1] += torch.autograd.grad(out[1].square().sum(), x)
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_operators_keep_the_rules_of_operators() -> None:
    found = [*TABLES, index(1, 2), None, 0, True]
    own = X.clone().requires_grad_()
    for name, arguments in (("apply_rotary", (own, *found, False)), ("apply_rotary_", (X, *found))):
        operator = getattr(torch.ops.jitattn, name).default
        done = torch.library.opcheck(operator, arguments)
        assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"x": None}, "x is NoneType"),
        ({"x": X.int()}, "floating point"),
        ({"x": X[0]}, r"\[B, L, H, D\]"),
        ({"cu_seqlens": index(0, 2)}, r"\[total, H, D\]"),
        ({"x": X[0], "cu_seqlens": index()}, "cu_seqlens is empty"),
        ({"x": X[0], "cu_seqlens": torch.ones(2)}, "cu_seqlens is torch.float32"),
        ({"rotary": TABLES}, "rotary is a tuple"),
        ({"rotary": Rotary(*torch.ones(2, 40, 9), interleaved=True)}, "turn 18 columns"),
        ({"rotary": Rotary(*torch.ones(2, 4, 2), interleaved=True)}, "has rows up to position 4"),
        ({"offset": 36}, "40 positions, but x has rows up to position 40"),
        ({"offset": -1}, "offset=-1"),
        ({"offset": 1.5}, "offset=1.5"),
        ({"offset": index(1)}, "offset has 1 entries"),
        ({"offset": torch.ones(2)}, "offset is torch.float32"),
        ({"layout": "hbsd"}, "layout='hbsd'"),
        ({"x": X[:, :1].expand(2, 5, 3, 16), "inplace": True}, "must not overlap"),
        ({"offset": torch.ones(2, dtype=torch.int32, device="meta")}, "on one device"),
    ],
)
def test_wrong_calls_are_refused(change: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        jitattn.apply_rotary(**{"x": X, "rotary": ROTARY, **change})


@pytest.mark.parametrize("inplace", [False, True])
def test_tensors_without_memory_give_the_like(inplace: bool) -> None:
    """No kernel is launched for them."""
    with FakeTensorMode():
        x = torch.empty(2, 5, 3, 16, dtype=torch.float16, device="cuda")
        tables = [torch.empty(9, 4, device="cuda") for _ in range(2)]
        offset = torch.empty(2, dtype=torch.int32, device="cuda")
        rotary = Rotary(*tables, interleaved=True)
        out = jitattn.apply_rotary(x, rotary, offset=offset, inplace=inplace)
        assert (out.shape, out.dtype, out.device) == (x.shape, x.dtype, x.device)
    meta = jitattn.apply_rotary(
        X.to("meta"), Rotary(*(t.to("meta") for t in TABLES), interleaved=False), inplace=inplace
    )
    assert (meta.shape, meta.device.type) == (X.shape, "meta")


def test_nothing_to_turn() -> None:
    for shape in ((0, 5, 3, 16), (2, 0, 3, 16), (2, 5, 0, 16)):
        assert jitattn.apply_rotary(torch.zeros(shape), ROTARY).shape == shape
    none = Rotary(torch.ones(5, 0), torch.ones(5, 0), interleaved=True)
    assert torch.equal(jitattn.apply_rotary(X, none), X)
    nowhere = Rotary(torch.ones(0, 4), torch.ones(0, 4), interleaved=True)
    flat = X.flatten(0, 1)
    assert torch.equal(jitattn.apply_rotary(flat, nowhere, cu_seqlens=index(0, 10)), flat)
    assert torch.equal(jitattn.apply_rotary(flat, ROTARY, cu_seqlens=index(0)), flat)
