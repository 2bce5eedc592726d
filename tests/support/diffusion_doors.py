"""Runs diffusers' models by the names of its backends: ``python -m tests.support.diffusion_doors``.

diffusers looks for packages once, when it is imported, so this is a process of its own. Prints how
many attention calls each backend has made, all of which must be ours, and how far its result is
from that of the native backend.
"""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch

import jitattn.compat
from jitattn.api import attention as api

BACKENDS = (
    "flash", "flash_varlen", "_flash_3", "_flash_varlen_3", "xformers", "sage", "sage_varlen",
    "_sage_qk_int8_pv_fp8_cuda", "_sage_qk_int8_pv_fp8_cuda_sm90", "_sage_qk_int8_pv_fp16_cuda",
    "_sage_qk_int8_pv_fp16_triton",
)  # fmt: skip
#: Largest relative difference from the native backend: fp32 on the CPU, bf16 on a GPU.
LIMITS = {"cpu": 1e-5, "cuda": 3e-2}
calls = 0


def counted(*given: Any) -> Any:
    global calls
    calls += 1
    return _run(*given)


_run = api.run


def result(model: Any, inputs: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """Return the result of a model, and how many calls of `jitattn.attention` made it."""
    global calls
    calls = 0
    with torch.no_grad():
        out = model(**inputs, return_dict=False)[0]
    return out.float(), calls


def main(device: str) -> None:
    warnings.simplefilter("ignore")
    names = ("flash_attn", "flash_attn_interface", "sageattention", "xformers")
    jitattn.compat.alias(*names, distribution=True)
    api.run = counted
    from diffusers.models import attention_dispatch
    from diffusers.models.attention_processor import XFormersAttnProcessor

    from tests.support.diffusion import flux, unet, wan

    if device == "cpu":  # diffusers registers this operator for CUDA alone
        operator = attention_dispatch._wrapped_flash_attn_3
        operator.register_kernel("cpu")(operator._init_fn)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    for make in (flux, wan, unet):
        model, inputs = make()
        model.to(device, dtype)
        moved = {
            key: x.to(device, dtype if x.is_floating_point() else None) for key, x in inputs.items()
        }
        if make is unet:  # its processors know xformers, and no dispatcher
            expected, count = result(model, moved)
            if device == "cpu":  # diffusers takes xformers to need a GPU
                model.set_attn_processor(XFormersAttnProcessor())
            else:
                model.enable_xformers_memory_efficient_attention()
            check("unet", "xformers", result(model, moved), expected, count, device)
            continue
        model.set_attention_backend("native")
        expected, count = result(model, moved)
        for backend in BACKENDS:
            model.set_attention_backend(backend)
            check(make.__name__, backend, result(model, moved), expected, count, device)


def check(
    model: str,
    backend: str,
    found: tuple[torch.Tensor, int],
    expected: torch.Tensor,
    count: int,
    device: str,
) -> None:
    out, ours = found
    error = ((out - expected).norm() / expected.norm()).item()
    print(model, backend, f"{ours} calls, {error:.1e}")  # noqa: T201
    assert count == 0, "the native backend calls jitattn"
    assert ours > 0, "the backend does not reach jitattn"
    assert error < LIMITS[device]


if __name__ == "__main__":
    main(sys.argv[1])
