"""Tests that FlashAttention's calls on a GPU never synchronize and can be captured."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from tests.support.capture import capture

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from _doors import flash_attn_calls


@pytest.mark.real_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_no_call_waits() -> None:
    for one in flash_attn_calls("cuda"):
        one.call()
        torch.cuda.set_sync_debug_mode("error")
        try:
            one.call()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.real_gpu
def test_calls_are_captured() -> None:
    for one in flash_attn_calls("cuda"):
        wanted = one.call()
        graph = torch.cuda.CUDAGraph()
        with capture(graph):
            out = one.call()
        graph.replay()
        if isinstance(out, tuple):
            (out, _), (wanted, _) = out, wanted
        assert torch.equal(out, wanted), one.name
