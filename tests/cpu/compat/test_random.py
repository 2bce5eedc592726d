"""Tests random calls of the doors on the CPU path: all arguments, forward and backward."""

from __future__ import annotations

import pytest
import torch

from tests.support import compat_random as drawn
from tests.support import compat_random_dkernel as drawn_dkernel
from tests.support import compat_random_flash as drawn_flash

FP32 = torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.parametrize("name", drawn_flash.FLASH)
@pytest.mark.parametrize("seed", range(12))
def test_flash_attn(name: str, seed: int) -> None:
    drawn_flash.check_flash(name, seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(25))
def test_flash_attn_with_a_cache(seed: int) -> None:
    drawn_flash.check_flash_cache(seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(30))
def test_cosine_sim(seed: int) -> None:
    drawn.check_cosine(seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(25))
def test_fast_ops(seed: int) -> None:
    drawn.check_fast_ops(seed, FP32, "cpu")


@pytest.mark.parametrize("where", drawn_dkernel.DKERNEL)
@pytest.mark.parametrize("seed", range(6))
def test_dkernel(where: str, seed: int) -> None:
    drawn_dkernel.check_dkernel(where, seed, FP32, "cpu")
