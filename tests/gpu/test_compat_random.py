"""Tests random calls of the doors on a GPU."""

from __future__ import annotations

import pytest
import torch

from tests.support import compat_random as drawn
from tests.support import compat_random_dkernel as drawn_dkernel
from tests.support import compat_random_flash as drawn_flash

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
pytestmark = [
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
    pytest.mark.usefixtures("with_grad"),
]


@DTYPES
@pytest.mark.parametrize("name", drawn_flash.FLASH)
@pytest.mark.parametrize("seed", range(6))
def test_flash_attn(name: str, seed: int, dtype: torch.dtype) -> None:
    drawn_flash.check_flash(name, seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_flash_attn_with_a_cache(seed: int, dtype: torch.dtype) -> None:
    drawn_flash.check_flash_cache(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_cosine_sim(seed: int, dtype: torch.dtype) -> None:
    drawn.check_cosine(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("seed", range(12))
def test_fast_ops(seed: int, dtype: torch.dtype) -> None:
    drawn.check_fast_ops(seed, dtype, "cuda")


@DTYPES
@pytest.mark.parametrize("where", drawn_dkernel.DKERNEL)
@pytest.mark.parametrize("seed", range(4))
def test_dkernel(where: str, seed: int, dtype: torch.dtype) -> None:
    drawn_dkernel.check_dkernel(where, seed, dtype, "cuda")
