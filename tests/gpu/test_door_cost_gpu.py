"""Calls of the doors on a GPU: none waits for the device, and all can be captured in a graph."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

from _doors import flash_attn_calls, other_calls


@pytest.mark.real_gpu
def test_no_call_waits() -> None:
    for one in (*flash_attn_calls("cuda"), *other_calls("cuda")):
        one.door()
        torch.cuda.set_sync_debug_mode("error")
        try:
            one.door()
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.real_gpu
def test_calls_are_captured() -> None:
    for one in flash_attn_calls("cuda"):
        wanted = one.door()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = one.door()
        graph.replay()
        if isinstance(out, tuple):
            (out, _), (wanted, _) = out, wanted
        assert torch.equal(out, wanted), one.name
