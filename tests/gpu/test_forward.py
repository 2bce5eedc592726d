"""Tests the forward kernels over the grids: values, LSE, poisoned surroundings."""

from __future__ import annotations

import pytest

import jitattn
from tests.support.check import check_case
from tests.support.grids import EDGE, FULL, Case

pytestmark = pytest.mark.usefixtures("_precompiled")


@pytest.mark.parametrize("case", EDGE, ids=[f"EDGE-{case.name}" for case in EDGE])
def test_edge(case: Case) -> None:
    check_case(case, jitattn.attention, "cuda")


@pytest.mark.slow
@pytest.mark.usefixtures("full_grid")
@pytest.mark.parametrize("case", FULL, ids=[f"FULL-{case.name}" for case in FULL])
def test_full(case: Case) -> None:
    check_case(case, jitattn.attention, "cuda")
