"""Tests diffusers' models on a GPU: with jitattn under SDPA, and by the names of backends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from jitattn.integrations import sdpa
from tests.support.compare import rel_l2
from tests.support.diffusion import MODELS

pytestmark = [
    pytest.mark.real_gpu,
    # Imported by a test alone: it looks for attention packages once, when it is.
    pytest.mark.skipif(importlib.util.find_spec("diffusers") is None, reason="needs diffusers"),
    pytest.mark.usefixtures("with_grad"),
    pytest.mark.skipif(
        not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="needs torch 2.11"
    ),
]


@pytest.mark.parametrize("name", MODELS)
def test_under_sdpa(name: str) -> None:
    """As near to fp32 as torch's flash kernel is, gradients too; every call is ours."""
    model, inputs = MODELS[name]()
    model = model.cuda().requires_grad_(False)
    backends = torch.nn.attention.SDPBackend

    def results(dtype: torch.dtype, backend: Any) -> tuple[Tensor, Tensor]:
        moved = {
            key: x.to("cuda", dtype if x.is_floating_point() else None) for key, x in inputs.items()
        }
        first = next(iter(moved.values())).requires_grad_()
        with torch.nn.attention.sdpa_kernel(backend):
            out = model.to(dtype)(**moved, return_dict=False)[0]
        (gradient,) = torch.autograd.grad(out.float().sin().sum(), first)
        return out.detach(), gradient

    truth = results(torch.float32, backends.MATH)
    theirs = results(torch.bfloat16, backends.FLASH_ATTENTION)
    with sdpa.activated():
        sdpa.counts(reset=True)
        found = results(torch.bfloat16, backends.FLASH_ATTENTION)
        counts = sdpa.counts()
    assert counts["jitattn"] > 0
    assert counts["jitattn_backward"] == counts["jitattn"]
    assert counts["torch"] == counts["torch_backward"] == 0
    for one, other, exact in zip(found, theirs, truth, strict=True):
        assert rel_l2(one, exact) < 1.5 * rel_l2(other, exact) + 1e-4


def test_by_the_names_of_backends() -> None:
    """Flux and Wan by each backend's name, Stable Diffusion's UNet by xformers'."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.diffusion_doors", "cuda"],
        capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert found.returncode == 0, found.stdout + found.stderr[-2000:]
    assert len(found.stdout.splitlines()) == 23
