"""Tests the calls of ComfyUI's attention module, under the packages' names."""

from __future__ import annotations

import torch

from tests.support import comfy


def test_sage_xformers_and_flash() -> None:
    comfy.check("cpu", torch.float32, 1e-5)
