"""Tests dropout of the fast-ops door: call state and generator offsets."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch

from jitattn.compat.fast_ops.flash_attention import flash_attention_triton as door
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    increment_philox_state,
    triton_dropout_mask,
)
from tests.support.compare import assert_independent
from tests.support.memory import PeakMemory

CUDA = torch.device("cuda", 0)


@dataclass
class FakeGenerator:
    """A GPU's generator, as far as its offset goes."""

    offset: int = 4
    drawn_at: list[int] = field(default_factory=list)

    def initial_seed(self) -> int:
        return 11

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0
        self.offset = offset

    def draw(self, device: torch.device) -> torch.Tensor:
        """As torch.randint does: numbers of seed and offset, which moves by 4."""
        assert device == CUDA
        self.drawn_at.append(self.offset)
        self.offset += 4
        return torch.tensor([self.offset, 0])


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGenerator:
    generator = FakeGenerator()
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,), raising=False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(door, "dropout_state", generator.draw)
    return generator


def test_the_generator_moves_as_the_originals(gpu: FakeGenerator) -> None:
    """And every call draws at another offset, whatever its size."""
    counts = [1, 5, 16 * 16 * 4096 * 4096, 1 << 32, 1 << 40, 3]
    expected = [4]
    for count in counts:
        door._next_state(count, CUDA)
        expected.append(expected[-1] + -(-count // 4) * 4)
        assert gpu.offset == expected[-1]
    assert gpu.drawn_at == expected[:-1]
    door._skip_state(7, CUDA)
    assert gpu.offset == expected[-1] + 8
    assert increment_philox_state(1) == (11, expected[-1] + 8)
    assert len(gpu.drawn_at) == len(counts)  # a call without dropout draws nothing


def test_a_captured_call_leaves_the_offset_to_torch(
    gpu: FakeGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(gpu, "set_offset", None)
    monkeypatch.setattr(gpu, "get_offset", None)
    door._next_state(1000, CUDA)
    door._skip_state(1000, CUDA)
    assert gpu.offset == 8


def test_masks_of_consecutive_calls_differ() -> None:
    torch.manual_seed(3)
    masks = [triton_dropout_mask(0.5, 1, 2, 32, 32, "cpu") for _ in range(8)]
    assert_independent(masks)


def test_a_mask_takes_a_byte_a_weight_beside_itself() -> None:
    with PeakMemory() as memory:
        mask = triton_dropout_mask(0.1, 2, 4, 512, 1024, "cpu")
    assert memory.peak <= 2 * mask.numel()


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_calls_compile(dropout_p: float) -> None:
    q = torch.randn(2, 33, 3, 24)
    compiled = torch.compile(
        lambda q: flash_attn_triton(q, q, q, None, True, dropout_p),
        fullgraph=True,
        backend="aot_eager",
    )
    if not dropout_p:
        torch.testing.assert_close(compiled(q), flash_attn_triton(q, q, q, None, True))
    else:
        assert not torch.equal(compiled(q), compiled(q))
