"""Tests errors that occur on a GPU only."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.inputs import random_qkv


@pytest.mark.real_gpu
def test_mixed_devices() -> None:
    q, k, v = random_qkv(dtype=torch.bfloat16, device="cuda")
    with pytest.raises(jitattn.InvalidInputError, match="one device"):
        jitattn.attention(q, k.cpu(), v)


def test_grid_limit_is_said_before_the_launch() -> None:
    # 2**31 CTAs, from inputs of 128 bytes and a result of 1 GiB.
    q = torch.empty(1, 1, 1, 64, device="cuda", dtype=torch.bfloat16).expand(2**17, 1, 64, 64)
    with pytest.raises(jitattn.UnsupportedError, match="2147483648 CTAs"):
        jitattn.explain(q, q, q, num_splits=256)
    with pytest.raises(jitattn.UnsupportedError, match="2147483648 CTAs"):
        jitattn.attention(q, q, q, num_splits=256)
