"""Tiny random models of diffusers, made from configs: nothing is downloaded.

diffusers looks for packages when it is imported, which is when a model is made.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def flux() -> tuple[Any, dict[str, Tensor]]:
    """Return a Flux transformer and its inputs."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 16, 4),
        "encoder_hidden_states": torch.randn(1, 8, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.zeros(16, 3),
        "txt_ids": torch.zeros(8, 3),
    }


def wan() -> tuple[Any, dict[str, Tensor]]:
    """Return a Wan transformer of videos and its inputs."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4,
        out_channels=4, text_dim=16, freq_dim=256, ffn_dim=32, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", rope_max_seq_len=32,
    )  # fmt: skip
    return model.eval(), {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "encoder_hidden_states": torch.randn(1, 6, 16),
        "timestep": torch.tensor([1]),
    }


def unet() -> tuple[Any, dict[str, Tensor]]:
    """Return a UNet as Stable Diffusion has it, with attention to itself and to text."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=16, in_channels=4, out_channels=4, layers_per_block=1,
        block_out_channels=(32, 64), norm_num_groups=8, cross_attention_dim=32,
        attention_head_dim=8, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    return model.eval(), {
        "sample": torch.randn(2, 4, 16, 16),
        "encoder_hidden_states": torch.randn(2, 77, 32),
        "timestep": torch.tensor([1, 7]),
    }


MODELS = {"flux": flux, "wan": wan, "unet": unet}
