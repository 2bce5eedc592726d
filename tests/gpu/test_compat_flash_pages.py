"""Tests the FlashAttention door over pages on a GPU: values and gradients."""

from __future__ import annotations

import pytest
import torch

from tests.support.compat_flash_attn import CASES
from tests.support.compat_flash_pages import check_pages


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    check_pages(name, "cuda", dtype)


@pytest.mark.parametrize("page", [1, 3, 16, 64])
@pytest.mark.parametrize("used", [False, True])
def test_pages_of_any_size(page: int, used: bool) -> None:
    check_pages("causal", "cuda", torch.bfloat16, page, used)


def test_gradients_are_reproducible() -> None:
    check_pages("window", "cuda", torch.float16, deterministic=True)
