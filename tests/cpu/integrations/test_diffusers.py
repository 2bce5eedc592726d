"""Tests diffusers' transformers with jitattn by the names of FlashAttention's backends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers"
)
ROOT = Path(__file__).parents[3]
#: diffusers looks for packages when it is imported, so the alias comes first.
SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import jitattn.compat
jitattn.compat.alias("flash_attn", distribution=True)
import torch
import jitattn.compat.flash_attn._functions as functions
from tests.support.diffusion import flux, wan

calls = 0
attend = functions._attend
def counted(*args, **kwargs):
    global calls
    calls += 1
    return attend(*args, **kwargs)
functions._attend = counted

for make in (flux, wan):
    model, inputs = make()
    def run(backend):
        model.set_attention_backend(backend)
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]
    expected = run("native")
    assert calls == 0
    for backend in ("flash", "flash_varlen"):
        error = (run(backend) - expected).norm() / expected.norm()
        assert error < 1e-5, (make, backend, error)
        assert calls > 0, (make, backend)
        calls = 0
print("equal")
"""


@needs_diffusers
def test_models_by_name() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert found.stdout.split() == ["equal"], found.stderr[-2000:]
