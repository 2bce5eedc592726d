"""Tests the overhead of the FlashAttention door: no tensor operations, few Python calls."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.operators import Operators

sys.path.insert(0, str(Path(__file__).resolve().parents[3] / "tools"))

from _doors import flash_attn_calls, python_calls, stubbed_core

CALLS = {one.name: one for one in flash_attn_calls("cpu")}
#: Operations of the door itself: a packed tensor is taken apart, an LSE written as the original's.
OPERATIONS = {
    "qkv packed": ["aten.unbind.int"],
    "kv packed": ["aten.unbind.int"],
    "varlen qkv packed": ["aten.unbind.int"],
    "cache, LSE": ["aten.threshold_.default"],
    "cache, int length, LSE": ["aten.threshold_.default"],
}
MOST_CALLS = 10


@pytest.mark.parametrize("name", list(CALLS))
def test_no_operation_and_few_calls(name: str) -> None:
    """Each operation is a launch, or a view for a microsecond or two; so are ten Python calls."""
    with stubbed_core():
        with Operators() as operators:
            CALLS[name].call()
        assert [str(one) for one in operators.called] == OPERATIONS.get(name, [])
        assert python_calls(CALLS[name].call) <= MOST_CALLS


@pytest.mark.parametrize("name", list(CALLS))
def test_the_core_call_is_what_the_door_amounts_to(name: str) -> None:
    door, core = CALLS[name].call(), CALLS[name].core()
    if isinstance(door, tuple):
        (door, _), (core, _) = door, core
    assert torch.equal(door, core)
