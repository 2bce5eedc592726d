"""Random cases: the same in every run, and many of them divided among tests of their own.

A part is a test, so that several processes can share what would take one of them minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")

#: Tests that many cases are divided among; `check_part` takes the number of one as `part`.
PARTS = 10
in_parts = pytest.mark.parametrize("part", range(PARTS))


def cases(count: int) -> settings:
    """Settings for some cases, the same in every run."""
    return settings(
        max_examples=count,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


def check_part(
    part: int, count: int, strategy: SearchStrategy[T], check: Callable[[T], None]
) -> None:
    """Check the cases of one part of `count`."""

    @seed(part)
    @settings(cases(count // PARTS), derandomize=False)
    @given(strategy)
    def run(case: T) -> None:
        check(case)

    run()
