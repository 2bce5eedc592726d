"""Tests that calls of the doors never synchronize and can be captured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch

from jitattn.compat.dkernel import LocalStrideSparseAttention
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    increment_philox_state,
    triton_dropout_mask,
)
from tests.support import doors
from tests.support.capture import capture
from tests.support.compare import assert_independent

pytestmark = [
    pytest.mark.real_gpu,
    pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype"),
]
NAMES = list(doors.calls("cpu", torch.float32))


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", NAMES)
def test_a_call_waits_for_nothing(name: str) -> None:
    call = doors.calls("cuda", torch.float16)[name]
    call()  # kernels and lists
    with no_waiting():
        call()


@pytest.mark.parametrize("name", NAMES)
def test_a_call_is_captured(name: str) -> None:
    call = doors.calls("cuda", torch.float16)[name]
    expected = call()
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        found = call()
    graph.replay()
    is_drawn = name in ("fast_ops dropout", "fast_ops mask")
    if isinstance(expected, tuple):
        expected, found = expected[0], found[0]
    if not is_drawn:
        assert torch.equal(found, expected)
        return
    first = found.clone()
    graph.replay()  # draws anew
    assert not torch.equal(found, first)


def test_a_training_step_waits_for_nothing() -> None:
    """Of packed sequences; and of a bias with dropout."""
    ends = torch.tensor([0, 40, 192], device="cuda", dtype=torch.int32)
    layer = LocalStrideSparseAttention(2, 256, 16, 2, 3)
    x = torch.randn(192, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    y = torch.randn(2, 96, 2, 64, device="cuda", dtype=torch.float16, requires_grad=True)
    bias = torch.randn(1, 2, 96, 96, device="cuda", dtype=torch.float16, requires_grad=True)

    def step() -> None:
        with torch.enable_grad():
            layer(x, x, x, cu_seqlen_k=ends).sum().backward()
            flash_attn_triton(y, y, y, bias, True, 0.25).sum().backward()

    step()
    with no_waiting():
        step()


@pytest.mark.parametrize("between", [1, 2**32, 2**33, 5 * 2**40])
def test_masks_differ_however_far_the_generator_moves(between: int) -> None:
    """As where a call has 2^32 weights: of every call, the low half of the offset is the same."""
    torch.manual_seed(7)
    masks = []
    for _ in range(4):
        masks.append(triton_dropout_mask(0.5, 1, 2, 64, 64, "cuda"))
        increment_philox_state(between - masks[-1].numel() if between > 1 else 0)
    assert_independent(masks)


def test_the_memory_of_a_mask() -> None:
    triton_dropout_mask(0.1, 1, 1, 32, 32, "cuda")
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask = triton_dropout_mask(0.1, 4, 8, 2048, 2048, "cuda")
    assert torch.cuda.max_memory_allocated() - before < 2.1 * mask.numel()


def test_numbers_of_the_host_go_through_pinned_memory() -> None:
    """Paddings of dkernel may be on the CPU."""
    layer = LocalStrideSparseAttention(2, 256, 16, 2, 3)
    x = torch.randn(2, 96, 2, 64, device="cuda", dtype=torch.float16)
    used, left = torch.tensor([60, 90]), torch.tensor([3, 0])
    expected = layer(x, x, x, seqlens=used.cuda(), left_paddings=left.cuda())
    layer(x, x, x, seqlens=used, left_paddings=left)
    with no_waiting():
        found = layer(x, x, x, seqlens=used, left_paddings=left)
    assert torch.equal(found, expected)
