"""Reproducible random cases, divided among several tests if there are many.

Each part is a test, so that several processes can share cases that take minutes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis.strategies import SearchStrategy

T = TypeVar("T")

#: Number of tests that share many cases; `check_part` takes the index of one as `part`.
PARTS = 10
in_parts = pytest.mark.parametrize("part", range(PARTS))


def cases(count: int) -> settings:
    """Return settings for reproducible cases."""
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
