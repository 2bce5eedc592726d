"""Tests the choice of calls whose fp32 inputs are split into fp16 parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.plan import prepare
from jitattn.request.layouts import parse
from jitattn.request.problem import Call, Runtime
from jitattn.spec.enums import Numerics, Switch
from jitattn.spec.kernel_spec import Problem


@pytest.fixture(autouse=True)
def _small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)


def parsed(
    dim: int = 64,
    dim_v: int = 64,
    len_q: int = 200,
    len_kv: int = 300,
    dtype: torch.dtype = torch.float32,
    **given: Any,
) -> tuple[Problem, Runtime, Call]:
    q, k = (torch.zeros(1, length, 2, dim, dtype=dtype) for length in (len_q, len_kv))
    v = torch.zeros(1, len_kv, 2, dim_v, dtype=dtype)
    _, call = bind(q, k, v, given)
    return *parse(q, k, v, call), call


def chosen(**given: Any) -> Any:
    """The problem of a call as fp16 parts, or None."""
    return prepare.kernel_problem(*parsed(**given), "sm_90")


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gear": 2},
        {"dim": 128, "dim_v": 16},
        {"mask": jitattn.Causal()},
        {"mask": jitattn.Window(9, 0)},
        {"mask": jitattn.LocalStride(64, 2, 3)},
        {"mask": jitattn.KeyPadding(torch.ones(1, 300, dtype=torch.bool))},
    ],
    ids=str,
)
def test_calls_that_have_parts(given: dict[str, Any]) -> None:
    assert chosen(**given).numerics is Numerics.F16X3


def test_gear_3_has_one_part() -> None:
    assert chosen(gear=3).numerics is Numerics.F16X1
    assert chosen(gear=4).numerics is Numerics.F16X1


def test_cosine_attention_has_its_maximum_looked_for() -> None:
    """Of weights far below the bound, parts would keep few bits."""
    given = {"qk_norm": jitattn.L2Norm(), "scale": 8.0}
    assert chosen(**given).fixed_shift is Switch.OFF
    assert chosen(**given).numerics is Numerics.F16X3
    q = torch.zeros(1, 200, 2, 64)
    _, call = bind(q, q, q, given)
    assert parse(q, q, q, call)[0].fixed_shift is Switch.ON


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": torch.float16},
        {"dim": 72},
        {"dim": 144},
        {"dim_v": 8},
        {"len_q": 64},
        {"len_kv": 0},
        {"scale": -1.0},
        {"softcap": 3.0},
        {"sinks": torch.zeros(2)},
        {"tile_rows": 64},
        {"mask": jitattn.LocalStride(16, 2, 3)},
        {"mask": jitattn.Dense(torch.ones(1, 1, 1, 300, dtype=torch.bool))},
        {"bias": torch.zeros(1, 1, 1, 300)},
        {"kv_seqs": jitattn.Padded(torch.tensor([200]))},
    ],
    ids=lambda given: ", ".join(given) or "none",
)
def test_calls_that_take_three_tf32_products(given: dict[str, Any]) -> None:
    assert chosen(**given) is None


def test_small_calls_take_three_tf32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen(len_q=200, len_kv=300) is not None
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 2 * 200 * 300 * 64 + 1)
    assert chosen(len_q=200, len_kv=300) is None
    assert chosen(len_q=201, len_kv=300) is not None


def chosen_backward(**given: Any) -> Any:
    """The same of the backward pass."""
    problem, runtime, _ = parsed(**given)
    return prepare.backward_kernel_problem(problem, runtime)


KEEP = jitattn.KeyPadding(torch.ones(1, 300, dtype=torch.bool))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"gear": 4},
        {"dim": 128, "dim_v": 16},
        {"mask": jitattn.Window(9, 0)},
        {"mask": jitattn.LocalStride(64, 2, 3)},
        {"mask": jitattn.Causal() & KEEP},
        {"softcap": 3.0, "sinks": torch.zeros(2)},
        {"alibi_slopes": torch.zeros(2)},
        {"dropout_p": 0.5, "dropout_state": torch.zeros(2, dtype=torch.int64)},
    ],
    ids=lambda given: ", ".join(given) or "none",
)
def test_backward_passes_that_have_parts(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(prepare, "LEAST_BACKWARD_PRODUCTS", 1)
    assert chosen_backward(**given).numerics is Numerics.F16X3


@pytest.mark.parametrize(
    "given",
    [
        {"dtype": torch.float16},
        {"dim": 72},
        {"dim": 144},
        {"dim_v": 8},
        {"mask": jitattn.LocalStride(16, 2, 3)},
        {"mask": jitattn.Dense(torch.ones(1, 1, 1, 300, dtype=torch.bool))},
        {"bias": torch.zeros(1, 1, 1, 300)},
        {"kv_seqs": jitattn.Padded(torch.tensor([200]))},
    ],
    ids=", ".join,
)
def test_backward_passes_that_take_three_tf32_products(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, Any]
) -> None:
    monkeypatch.setattr(prepare, "LEAST_BACKWARD_PRODUCTS", 1)
    assert chosen_backward(**given) is None


def test_small_backward_passes_take_three_tf32_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "LEAST_BACKWARD_PRODUCTS", 2 * 200 * 300 * 64 + 1)
    assert chosen_backward(len_q=200, len_kv=300) is None
    assert chosen_backward(len_q=201, len_kv=300) is not None
