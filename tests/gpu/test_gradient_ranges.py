"""Tests gradients with scores far from 0, sinks far above them, and fp32 results."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.reference import reference
from tests.support.compare import rel_l2

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
#: Relative error of gradients, of terms of one size; offsets of 1e4 leave fp32 scores 1e-3.
LIMIT = {FP16: 2e-3, BF16: 1e-2, FP32: 2e-3}
OFFSETS = (-1e4, -300.0, -95.0, 0.0, 95.0, 300.0, 1e4)


def tensors(
    dtype: torch.dtype, length: int = 100, device: str = "cuda", dim: int = 64
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shape = (2, length, 2, dim)
    return [torch.randn(shape, generator=generator).to(device, dtype) for _ in "qkv"]


def both_gradients(
    qkv: list[torch.Tensor],
    others: dict[str, torch.Tensor],
    d_out: torch.Tensor | None,
    d_lse: torch.Tensor | None,
    **arguments: Any,
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Gradients of a call, and true ones in fp64, of q, k, v and `others`, through out and LSE."""
    found = []
    for is_true in (False, True):
        kind = torch.float64 if is_true else None
        own = [x.detach().to(kind or x.dtype).requires_grad_() for x in qkv]
        more = {name: x.detach().to(kind or x.dtype).requires_grad_() for name, x in others.items()}
        given = {**arguments, **more}
        with torch.enable_grad():
            if is_true:
                given.pop("out_dtype", None)
                out, lse = reference(*own, **given, return_lse=True)
            else:
                out, lse = jitattn.attention(*own, **given, return_lse=True)
        pairs = [(out, d_out), (lse, d_lse)]
        pairs = [(x, dx.to(x.dtype)) for x, dx in pairs if dx is not None]
        ends, starts = zip(*pairs, strict=True)
        inputs = [*own, *more.values()]
        gradients = torch.autograd.grad(ends, inputs, starts, allow_unused=True)
        found.append(
            [
                torch.zeros_like(x) if dx is None else dx
                for x, dx in zip(inputs, gradients, strict=True)
            ]
        )
    return found[0], found[1]


def assert_right(found: list[torch.Tensor], truth: list[torch.Tensor], dtype: torch.dtype) -> None:
    for got, true in zip(found, truth, strict=True):
        assert torch.isfinite(got).all()
        smallest = torch.finfo(got.dtype).smallest_normal
        if true.abs().max() < smallest:  # not representable
            assert got.abs().max() <= 2 * smallest
        else:
            assert rel_l2(got, true) < LIMIT[dtype]


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8)).cuda()


@pytest.mark.parametrize("through", ["out", "lse", "both"])
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_sinks_far_from_the_scores(dtype: torch.dtype, through: str) -> None:
    qkv = tensors(dtype)
    d_out = None if through == "lse" else randn(2, 100, 2, 64)
    d_lse = None if through == "out" else randn(2, 2, 100)
    for offset in OFFSETS:
        others = {"sinks": torch.tensor([offset, offset + 1.0], device="cuda")}
        found, truth = both_gradients(qkv, others, d_out, d_lse, mask=jitattn.Causal())
        assert_right(found, truth, dtype)


def shifts(name: str, offset: float) -> dict[str, torch.Tensor]:
    """Arguments that move all scores by an offset, or in its direction."""
    if name == "bias":
        return {"bias": torch.full((1, 1, 1, 100), offset, device="cuda")}
    if name == "bias of rows":
        return {"bias": torch.full((1, 2, 100, 100), offset, device="cuda")}
    if name == "relative_bias":
        return {"relative_bias": torch.full((2, 7), offset, device="cuda")}
    return {"alibi_slopes": torch.full((2,), -offset / 10.0, device="cuda")}


@pytest.mark.parametrize("name", ["bias", "bias of rows", "relative_bias", "alibi_slopes"])
@pytest.mark.parametrize("has_sinks", [False, True], ids=["plain", "sinks"])
def test_scores_far_from_0(name: str, has_sinks: bool) -> None:
    qkv = tensors(FP16)
    d_out, d_lse = randn(2, 100, 2, 64), randn(2, 2, 100)
    for offset in OFFSETS:
        others = shifts(name, offset)
        if has_sinks:
            others["sinks"] = torch.tensor([0.0, 1.0], device="cuda")
        found, truth = both_gradients(qkv, others, d_out, d_lse)
        terms = truth[3].abs().amax() if name == "alibi_slopes" else 0.0
        # Gradients of offsets alone cancel: by the size of their terms.
        for got, true in zip(found, truth, strict=True):
            assert torch.isfinite(got).all()
            error = (got.double() - true).norm()
            floor = 1e-3 * max(1.0, float(terms)) * true.numel() ** 0.5
            assert error <= 3e-3 * true.norm() + floor


def test_gradients_of_fp32_results_that_mostly_pass_the_range() -> None:
    """Those that do not are small by cancellation: they are what they are at another size."""
    qkv = tensors(FP16)
    d_out = randn(2, 100, 2, 64) * 1e7
    arguments = {"mask": jitattn.Causal(), "out_dtype": FP32}
    found, truth = both_gradients(qkv, {}, d_out, None, **arguments)
    small, _ = both_gradients(qkv, {}, d_out * 2.0**-20, None, **arguments)
    for got, one, true in zip(found, small, truth, strict=True):
        most = torch.finfo(FP16).max
        assert (true.abs() > most).any()
        wanted = one.double() * 2.0**20
        fits = wanted.abs() < 0.98 * most
        assert fits.any()
        torch.testing.assert_close(got.double()[fits], wanted[fits], rtol=2e-3, atol=0.1)


@pytest.mark.parametrize("size", [1e-8, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_gradients_of_fp32_results(dtype: torch.dtype, size: float) -> None:
    qkv = tensors(dtype)
    qkv[2] = (qkv[2].float() * 0.02).to(dtype)  # so that gradients of q and k are representable
    d_out = randn(2, 100, 2, 64) * size
    d_out[:, ::7] *= 1e-2
    found, truth = both_gradients(qkv, {}, d_out, None, mask=jitattn.Causal(), out_dtype=FP32)
    assert_right_where_representable(found, truth, LIMIT[dtype])


def assert_right_where_representable(
    found: list[torch.Tensor], truth: list[torch.Tensor], limit: float
) -> None:
    for got, true in zip(found, truth, strict=True):
        fits = true.abs() < 0.98 * torch.finfo(got.dtype).max
        assert fits.any()
        assert torch.isfinite(got[fits]).all()
        ulp = 2.0**-24 if got.dtype is FP16 else 0.0
        error = (got.double() - true)[fits].norm()
        assert error <= limit * true[fits].norm() + ulp * true.numel() ** 0.5


@pytest.mark.parametrize("size", [1e-8, 1e5])
def test_every_gradient_of_an_fp32_result(size: float) -> None:
    """With dropout, biases, sinks and the LSE beside it; lists, ragged and split."""
    qkv = tensors(FP16, 200)
    qkv = [qkv[0], qkv[1], qkv[2] * 0.05]
    d_out, d_lse = randn(2, 200, 2, 64) * size, randn(2, 2, 200) * size
    others = {
        "bias": randn(1, 1, 200, 200),
        "relative_bias": randn(2, 9),
        "alibi_slopes": randn(2).abs(),
        "sinks": randn(2),
    }
    arguments = {"dropout_p": 0.25, "dropout_state": jitattn.dropout_state("cuda")}
    found, truth = both_gradients(qkv, others, d_out, d_lse, out_dtype=FP32, **arguments)
    assert_right_where_representable(found, truth, 4e-3)


def test_a_row_of_nan_in_the_gradient_stays_in_its_place() -> None:
    qkv = tensors(FP16)
    own = [x.requires_grad_() for x in qkv]
    d_out = randn(2, 100, 2, 64)
    d_out[0, 10, 0] = float("nan")
    with torch.enable_grad():
        out = jitattn.attention(*own, mask=jitattn.Causal(), out_dtype=FP32)
    dq, dk, dv = torch.autograd.grad(out, own, d_out)
    assert torch.isfinite(dq[0, :10]).all()
    assert torch.isfinite(dq[0, 11:]).all()
    assert torch.isfinite(dq[1]).all()
    assert dq[0, 10, 0].isnan().all()
    assert torch.isfinite(dk[1]).all()
    assert torch.isfinite(dv[1]).all()
