"""Tests apply_rotary on a GPU: random calls, graphs, and calls without a kernel."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch._subclasses import FakeTensorMode

import jitattn
from jitattn import Rotary
from jitattn.plan.choices import specs_of
from tests.support.capture import capture
from tests.support.precompile import CompileOnce
from tests.support.random_cases import cases, check_part, in_parts
from tests.support.rotary import RotaryCase, check_rotary, rotary_cases


@pytest.fixture(scope="module", autouse=True)
def _compiled(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel all kernels that the random cases can need."""
    dtypes = ["fp16", "bf16", "fp32"]
    specs = specs_of([{"family": "rotary", "dtype": dtypes, "table_dtype": dtypes}], [arch])
    assert len(specs) == 36
    assert compile_once(specs) == []


@cases(150)
@given(rotary_cases())
def test_random_calls(case: RotaryCase) -> None:
    check_rotary(case, "cuda")


@pytest.mark.usefixtures("full_grid")
@in_parts
def test_many_random_calls(part: int) -> None:
    check_part(part, 2000, rotary_cases(), lambda case: check_rotary(case, "cuda"))


def tables(rows: int, half: int, dtype: torch.dtype = torch.float32) -> Rotary:
    angle = 7 * torch.rand(rows, half, device="cuda")
    return Rotary(angle.cos().to(dtype), angle.sin().to(dtype), interleaved=False)


def test_derivatives_of_every_order() -> None:
    x = torch.randn(2, 5, 3, 16, device="cuda", requires_grad=True)
    rotary = tables(5, 8)
    with torch.enable_grad():
        out = jitattn.apply_rotary(x, rotary)
        (first,) = torch.autograd.grad(out.square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(first, 2 * x, atol=1e-5, rtol=1e-5)  # a rotation keeps lengths
    torch.testing.assert_close(second, torch.full_like(x, 2.0), atol=1e-5, rtol=1e-5)


def test_gradients_of_tables_and_fp64() -> None:
    x = torch.randn(2, 5, 3, 16, device="cuda", dtype=torch.float64)
    rotary = tables(5, 8, torch.float64)
    wide = jitattn.apply_rotary(x, rotary)
    host = Rotary(rotary.cos.cpu(), rotary.sin.cpu(), interleaved=False)
    torch.testing.assert_close(wide.cpu(), jitattn.apply_rotary(x.cpu(), host))
    cos = rotary.cos.float().requires_grad_()
    with torch.enable_grad():
        own = Rotary(cos, rotary.sin.float(), interleaved=False)
        jitattn.apply_rotary(x.float(), own).sum().backward()
    assert cos.grad is not None
    torch.testing.assert_close(
        cos.grad.double(), (x[..., :8] + x[..., 8:]).sum((0, 2)), atol=1e-4, rtol=1e-4
    )


def test_more_rows_than_a_wave() -> None:
    x = torch.randn(4, 1500, 8, 128, device="cuda", dtype=torch.bfloat16)
    rotary = tables(1500, 64, torch.bfloat16)
    out = jitattn.apply_rotary(x, rotary)
    host = Rotary(rotary.cos.cpu(), rotary.sin.cpu(), interleaved=False)
    wanted = jitattn.apply_rotary(x.cpu(), host)
    torch.testing.assert_close(out.cpu(), wanted, atol=0.0, rtol=2.0**-8)


@pytest.mark.real_gpu
def test_in_a_graph() -> None:
    x = torch.randn(2, 3, 4, 64, device="cuda", dtype=torch.float16)
    rotary = tables(100, 32, torch.float16)
    offset = torch.zeros(2, dtype=torch.int32, device="cuda")
    jitattn.apply_rotary(x, rotary, offset=offset)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.apply_rotary(x, rotary, offset=offset)
    for step in (0, 5, 97, 99):
        offset.fill_(step)
        graph.replay()
        assert torch.equal(out, jitattn.apply_rotary(x, rotary, offset=offset))


@pytest.mark.real_gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_compiled(inplace: bool) -> None:
    own = torch.randn(2, 5, 3, 16, device="cuda")
    rotary = tables(9, 8)

    def function(x: Tensor) -> Tensor:
        return jitattn.apply_rotary(x, rotary, offset=2, inplace=inplace) * 2.0

    for wants in (False, True):
        x = own.clone().requires_grad_(wants)
        with torch.enable_grad():
            out = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
            if wants:
                out.square().sum().backward()
                torch.testing.assert_close(x.grad, 8 * own, atol=1e-4, rtol=1e-4)
        wanted = jitattn.apply_rotary(own, rotary, offset=2)
        torch.testing.assert_close(out, 2 * wanted)
        assert torch.equal(x, wanted if inplace else own)


@pytest.mark.real_gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_tensors_without_memory_give_the_like(inplace: bool) -> None:
    with FakeTensorMode(), torch.enable_grad():
        x = torch.empty(2, 5, 3, 16, device="cuda", requires_grad=True)
        own = [torch.empty(9, 4, device="cuda") for _ in range(2)]
        out = jitattn.apply_rotary(x, Rotary(*own, interleaved=True), inplace=inplace)
        out.sum().backward()
        assert x.grad.shape == out.shape == x.shape
