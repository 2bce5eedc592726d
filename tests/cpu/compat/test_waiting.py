"""Tests that no door synchronizes the device, with CPU tensors that claim to be on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import doors
from tests.support.waiting import NoWaiting

CALLS = doors.calls("cpu", torch.float32)
#: These compute nothing themselves; the core's part has tests on a GPU.
MODULES = (
    "dkernel._module",
    "fast_ops.flash_attention.flash_attention",
    "fast_ops.flash_attention.flash_attention_triton",
    "flash_cosine_sim_attention",
    "warp_attention",
)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def attention(q: torch.Tensor, *args: object, **given: Any) -> Any:
        lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1]) if given.get("return_lse") else None
        return q if lse is None else (q, lse)

    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
    for module in MODULES:
        monkeypatch.setattr(f"jitattn.compat.{module}.attention", attention)


@pytest.mark.usefixtures("on_gpu")
@pytest.mark.parametrize("name", [name for name in CALLS if name != "cosine plain"])
def test_a_door_waits_for_nothing(name: str) -> None:
    CALLS[name]()  # what is made once
    with NoWaiting():
        CALLS[name]()


@pytest.mark.usefixtures("on_gpu")
def test_modules_of_inference_mode_wait_for_nothing() -> None:
    """Their patterns would have no version counter, and be compared."""
    with torch.inference_mode():
        calls = doors.calls("cpu", torch.float32)
        for name, call in calls.items():
            if name.startswith("dkernel"):
                call()
                with NoWaiting():
                    call()


def test_waiting_is_noticed() -> None:
    x = torch.ones(3)
    for waits in (lambda: x.tolist(), lambda: bool(x[0]), lambda: int(x.max()), lambda: x.cpu()):
        with NoWaiting(), pytest.raises(AssertionError, match="waits for the device"):
            waits()
