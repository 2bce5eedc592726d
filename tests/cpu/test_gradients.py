"""Gradients of the CPU path: random combinations against fp64 autograd of the reference."""

from __future__ import annotations

from hypothesis import given

from tests.support.gradients import GradCase, check_gradients, grad_cases
from tests.support.random_cases import cases


@cases(60)
@given(grad_cases(most_rows=130))
def test_random_gradients(case: GradCase) -> None:
    check_gradients(case, "cpu")
