"""Tests context-parallel attention on 2, 3, 4 and 8 ranks beside one process, with gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.parallel import in_own_process
from tests.support.parallel_cases import CASES

TOLERANCES = {case.name: case.tolerance for case in CASES}


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
@pytest.mark.parametrize(("ranks", "fewest"), [(2, 250), (3, 120), (4, 160), (8, 80)])
def test_as_one_process(ranks: int, fewest: int) -> None:
    errors = in_own_process("tests.support.parallel", str(ranks))
    assert len(errors) >= fewest
    wrong = {
        name: error
        for name, error in errors.items()
        if not error <= TOLERANCES[name.rsplit(", ", 2)[0]]
    }
    assert not wrong
