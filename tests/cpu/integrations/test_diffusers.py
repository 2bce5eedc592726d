"""Tests diffusers' transformers with jitattn by the names of its attention backends."""

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


@needs_diffusers
def test_models_by_name() -> None:
    """Flux and Wan by each backend's name, Stable Diffusion's UNet by xformers' processor."""
    found = subprocess.run(
        [sys.executable, "-m", "tests.support.diffusion_doors", "cpu"],
        capture_output=True, text=True, check=False, cwd=ROOT,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr[-2000:]
    assert len(found.stdout.splitlines()) == 23
