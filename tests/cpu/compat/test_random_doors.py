"""Tests random calls of sageattention, xformers, FlashAttention 3 and 4 on the CPU path."""

from __future__ import annotations

import pytest
import torch

from tests.support import compat_random_flash3 as drawn_flash
from tests.support import compat_random_sage as drawn_sage
from tests.support import compat_random_xformers as drawn_xformers

FP32 = torch.float32


@pytest.mark.parametrize("seed", range(25))
def test_sageattn(seed: int) -> None:
    drawn_sage.check_sage(seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(10))
def test_sageattn_varlen(seed: int) -> None:
    drawn_sage.check_sage_varlen(seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(40))
def test_xformers(seed: int) -> None:
    drawn_xformers.check_batched(seed, FP32, "cpu")


@pytest.mark.parametrize("name", drawn_xformers.BLOCKS)
@pytest.mark.parametrize("seed", range(5))
def test_xformers_sequences(name: str, seed: int) -> None:
    drawn_xformers.check_blocks(name, seed, FP32, "cpu")


@pytest.mark.parametrize("name", drawn_flash.FA3)
@pytest.mark.parametrize("seed", range(8))
def test_flash_attn_3(name: str, seed: int) -> None:
    drawn_flash.check_fa3(name, seed, FP32, "cpu")


@pytest.mark.parametrize("seed", range(20))
def test_flash_attn_3_with_a_cache(seed: int) -> None:
    drawn_flash.check_fa3_cache(seed, FP32, "cpu")


@pytest.mark.parametrize("name", drawn_flash.FA4)
@pytest.mark.parametrize("seed", range(6))
def test_flash_attn_4(name: str, seed: int) -> None:
    drawn_flash.check_fa4(name, seed, FP32, "cpu")
