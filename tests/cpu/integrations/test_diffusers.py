"""Tests diffusers' transformers with jitattn by the names of FlashAttention's backends."""

from __future__ import annotations

import importlib.util
import subprocess
import sys

import pytest

needs_diffusers = pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None, reason="needs diffusers"
)
#: diffusers looks for packages when it is imported, so the alias comes first.
SCRIPT = """
import warnings
warnings.simplefilter("ignore")
import jitattn.compat
jitattn.compat.alias("flash_attn", distribution=True)
import torch
import jitattn.compat.flash_attn._functions as functions
from diffusers import FluxTransformer2DModel, WanTransformer3DModel

calls = 0
attend = functions._attend
def counted(*args, **kwargs):
    global calls
    calls += 1
    return attend(*args, **kwargs)
functions._attend = counted

def check(model, inputs):
    global calls
    model.eval()
    def run(backend):
        model.set_attention_backend(backend)
        with torch.no_grad():
            return model(**inputs, return_dict=False)[0]
    expected = run("native")
    assert calls == 0
    for backend in ("flash", "flash_varlen"):
        error = (run(backend) - expected).norm() / expected.norm()
        assert error < 1e-5, (type(model), backend, error)
        assert calls > 0, (type(model), backend)
        calls = 0

torch.manual_seed(0)
check(
    FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    ),
    dict(
        hidden_states=torch.randn(1, 16, 4), encoder_hidden_states=torch.randn(1, 8, 32),
        pooled_projections=torch.randn(1, 32), timestep=torch.tensor([1.0]),
        img_ids=torch.zeros(16, 3), txt_ids=torch.zeros(8, 3),
    ),
)
check(
    WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    ),
    dict(
        hidden_states=torch.randn(1, 4, 2, 8, 8), encoder_hidden_states=torch.randn(1, 6, 16),
        timestep=torch.tensor([1]),
    ),
)
print("equal")
"""


@needs_diffusers
def test_models_by_name() -> None:
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False
    )
    assert found.stdout.split() == ["equal"], found.stderr[-2000:]
