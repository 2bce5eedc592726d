"""Tests the doors' overhead per call: few Python functions, no GPU work."""

from __future__ import annotations

import sys
from pathlib import Path
from types import FrameType

import pytest
import torch

import jitattn
from tests.cpu.compat.test_waiting import MODULES
from tests.support.operators import Operators

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
from _doors_bench_cases import DoorCase, cases

#: Calls of functions of ours, for a call of the core that does nothing.
MOST_CALLS = {"cosine": 2, "fast_ops": 6, "warp": 8, "dkernel": 14}
CASES = {f"{case.door} {case.name}": case for case in cases("cpu", torch.float32)}
PACKAGE = str(Path(jitattn.__file__).parent)


@pytest.fixture(autouse=True)
def _core_that_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    for module in MODULES:
        monkeypatch.setattr(f"jitattn.compat.{module}.attention", lambda q, *_, **__: q)


def calls_of_ours(case: DoorCase) -> int:
    count = 0

    def profile(frame: FrameType, event: str, _: object) -> None:
        nonlocal count
        count += event == "call" and frame.f_code.co_filename.startswith(PACKAGE)

    sys.setprofile(profile)
    try:
        case.call()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("name", list(CASES))
def test_a_door_calls_few_functions(name: str) -> None:
    case = CASES[name]
    case.call()  # what is made once
    assert 0 < calls_of_ours(case) <= MOST_CALLS[case.door]


@pytest.mark.parametrize("name", list(CASES))
def test_a_door_launches_nothing(name: str) -> None:
    """But for the state of a generator that has no offset: of the CPU."""
    case = CASES[name]
    case.call()
    with Operators() as operators:
        case.call()
    draws = case.door == "fast_ops" and not case.name.startswith("class")
    drawn = {"aten.randint.low_generator"} if draws else set()
    assert {str(one) for one in operators.called if not one.is_view} == drawn
