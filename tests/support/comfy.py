"""The calls that ComfyUI's attention functions make of sageattention, xformers and flash_attn.

As comfy/ldm/modules/attention.py of Comfy-Org/ComfyUI makes them (read at 05080f60): what it looks
up when it is imported, and layouts, keywords and masks of `attention_sage`, `attention_xformers`
and `attention_flash`, which take q, k and v [B, L, H * D], or [B, H, L, D] with `skip_reshape`.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import torch
from torch import Tensor


class Comfy:
    """What the module finds when it is imported, under the names of the packages."""

    def __init__(self) -> None:
        self.sageattn = importlib.import_module("sageattention").sageattn
        self.sage_takes_masks = "attn_mask" in inspect.signature(self.sageattn).parameters
        self.xformers: Any = importlib.import_module("xformers")
        importlib.import_module("xformers.ops")
        self.flash_attn_func = importlib.import_module("flash_attn").flash_attn_func

    def xformers_is_usable(self) -> bool:
        """As its model_management asks."""
        return self.xformers._has_cpp_library and self.xformers.version.__version__ > "0.0.26"

    def sage(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *,
             skip_reshape: bool = False) -> Tensor:  # fmt: skip
        given: dict[str, Any] = {"is_causal": False, "sm_scale": None, "smooth_k": False}
        if mask is not None:
            assert self.sage_takes_masks
            given["attn_mask"] = _four(mask)
        if skip_reshape:
            out = self.sageattn(q, k, v, tensor_layout="HND", **given)
            return out.transpose(1, 2).flatten(2)
        q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
        return self.sageattn(q, k, v, tensor_layout="NHD", **given).flatten(2)

    def by_xformers(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None,
                    *, skip_reshape: bool = False) -> Tensor:  # fmt: skip
        if skip_reshape:
            q, k, v = (x.permute(0, 2, 1, 3) for x in (q, k, v))
        else:
            q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
        if mask is not None:  # a slice of a wider tensor, expanded over batch and heads
            mask = _four(mask)
            width = mask.shape[-1]
            wide = q.new_empty(*mask.shape[:2], q.shape[1], width + 8 - width % 8)
            wide[..., :width] = mask
            mask = wide[..., :width].expand(q.shape[0], heads, -1, -1)
        own = self.xformers.ops.memory_efficient_attention
        return own(q, k, v, attn_bias=mask, scale=None).flatten(2)

    def flash(self, q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None = None, *,
              skip_reshape: bool = False) -> Tensor:  # fmt: skip
        assert mask is None
        if skip_reshape:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        else:
            q, k, v = (x.unflatten(2, (heads, -1)) for x in (q, k, v))
        out = torch.ops.jitattn_tests.comfy_flash(q, k, v)
        return out.flatten(2)

    def registered(self) -> Any:
        """Its function of FlashAttention in an operator of its own, as it registers that."""

        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return self.flash_attn_func(q, k, v, dropout_p=0.0, causal=False, softmax_scale=None)

        call.__annotations__ = {"q": Tensor, "k": Tensor, "v": Tensor, "return": Tensor}
        return torch.library.custom_op("jitattn_tests::comfy_flash", call, mutates_args=())


def _four(mask: Tensor) -> Tensor:
    """Return a mask [Lq, Lkv] or [B, Lq, Lkv] as [B, 1, Lq, Lkv]."""
    mask = mask[None] if mask.dim() == 2 else mask
    return mask[:, None] if mask.dim() == 3 else mask


def check(device: str, dtype: torch.dtype, limit: float) -> None:
    """Check every function against SDPA in fp32, with and without masks and reshaping."""
    from jitattn.compat import alias

    from .compare import rel_l2

    with alias("sageattention", "xformers", "flash_attn"):
        comfy = Comfy()
        assert comfy.xformers_is_usable()
        operator = comfy.registered()
        generator = torch.Generator().manual_seed(3)
        heads, shapes = 4, ((2, 90, 256), (2, 77, 256), (2, 77, 256))
        q, k, v = (torch.randn(x, generator=generator).to(device, dtype) for x in shapes)
        turned = [x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v)]
        masks = [None, torch.randn(90, 77, generator=generator).to(device, dtype)]
        masks.append(torch.randn(2, 90, 77, generator=generator).to(device, dtype))
        for function in (comfy.sage, comfy.by_xformers, comfy.flash):
            for mask in masks if function != comfy.flash else masks[:1]:
                bias = None if mask is None else _four(mask).float()
                wanted = torch.nn.functional.scaled_dot_product_attention(
                    *(x.float() for x in turned), attn_mask=bias
                )
                wanted = wanted.transpose(1, 2).flatten(2)
                assert rel_l2(function(q, k, v, heads, mask), wanted) < limit
                own = function(*turned, heads, mask, skip_reshape=True)
                assert rel_l2(own, wanted) < limit
        del operator
