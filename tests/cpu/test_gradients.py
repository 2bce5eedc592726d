"""Gradients of the CPU path: random combinations against fp64 autograd of the reference."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings

from tests.support.gradients import GradCase, check_gradients, grad_cases


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@given(grad_cases(most_rows=130))
def test_random_gradients(case: GradCase) -> None:
    check_gradients(case, "cpu")
