"""Tests the overhead of the doors of sageattention, xformers, FlashAttention 3 and 4."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.operators import Operators
from tests.support.waiting import NoWaiting

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from _doors import python_calls
from _doors_published_cases import published_cases, stubbed_published_core

CALLS = {f"{one.door}: {one.name}": one for one in published_cases("cpu", torch.float32)}
MOST_CALLS = 12


@pytest.mark.parametrize("name", list(CALLS))
def test_no_launch_and_few_calls(name: str) -> None:
    """A call has views at most, each of which takes a microsecond or two; so do ten of Python's.

    Nothing of it waits for a device.
    """
    with stubbed_published_core():
        CALLS[name].call()  # what is made once
        with Operators() as operators, NoWaiting():
            CALLS[name].call()
        assert [str(one) for one in operators.called if not one.is_view] == []
        assert python_calls(CALLS[name].call) <= MOST_CALLS


@pytest.mark.parametrize("name", list(CALLS))
def test_the_core_call_is_what_the_door_amounts_to(name: str) -> None:
    door, core = CALLS[name].call(), CALLS[name].core()
    if isinstance(door, tuple):  # an LSE; FlashAttention 4's is always there
        core, lse = core if isinstance(core, tuple) else (core, None)
        assert door[1] is lse or torch.equal(door[1], lse)
        door = door[0]
    assert torch.equal(door.reshape(core.shape), core)
