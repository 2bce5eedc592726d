"""Tests models of transformers on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.0")

import jitattn.compat
from jitattn.integrations.transformers import register
from tests.support.compare import rel_l2
from tests.support.models import DECODERS, MODELS, inputs_of, model_of, tokens

pytestmark = [
    pytest.mark.real_gpu,
    pytest.mark.usefixtures("with_grad"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32


def on_gpu(name: str, implementation: str, dtype: torch.dtype) -> Any:
    return model_of(name, implementation).to("cuda", dtype)


def results(model: Any, inputs: dict[str, Tensor], keep: Any) -> tuple[Tensor, Tensor]:
    dtype = next(model.parameters()).dtype
    moved = {
        key: x.to("cuda", dtype if x.is_floating_point() else None) for key, x in inputs.items()
    }
    logits = model(**moved).logits[keep]
    model.zero_grad()
    logits.float().square().mean().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return logits.detach(), torch.cat(gradients)


@pytest.mark.parametrize("side", ["none", "left", "right"])
@pytest.mark.parametrize("dtype", [FP32, BF16, FP16], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, dtype: torch.dtype, side: str) -> None:
    """As near to eager fp32 as eager of the same dtype is, or nearer."""
    if side != "none" and name in ("vit", "t5"):
        pytest.skip("has no such padding")
    register()
    inputs, keep = inputs_of(name, length=70), slice(None)
    if side != "none":
        mask = torch.ones(2, 70, dtype=torch.long)
        mask[1, slice(20) if side == "left" else slice(-20, None)] = 0
        inputs["attention_mask"], keep = mask, mask.bool()
    truth = results(on_gpu(name, "eager", FP32), inputs, keep)
    found = results(on_gpu(name, "jitattn", dtype), inputs, keep)
    eager = truth if dtype is FP32 else results(on_gpu(name, "eager", dtype), inputs, keep)
    for one, other, exact_one in zip(found, eager, truth, strict=True):
        assert one.isfinite().all()
        assert rel_l2(one, exact_one) < 1.5 * rel_l2(other, exact_one) + 2e-5


@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", DECODERS)
def test_generate(name: str, cache: str | None) -> None:
    """Equal tokens in fp32 for 64 steps, with left padding."""
    register()
    ids = tokens(2, 20).cuda()
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    expected, found = (
        on_gpu(name, implementation, FP32).generate(
            ids, attention_mask=mask, max_new_tokens=64, min_new_tokens=64, do_sample=False,
            cache_implementation=cache, disable_compile=True,
        )
        for implementation in ("eager", "jitattn")
    )  # fmt: skip
    assert torch.equal(found, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_packed(name: str) -> None:
    register()
    ids = tokens(1, 60).cuda()
    positions = torch.cat([torch.arange(25), torch.arange(35)])[None].cuda()
    eager, ours = on_gpu(name, "eager", FP32), on_gpu(name, "jitattn", FP32)
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split((25, 35), 1)], 1)
    assert rel_l2(ours(input_ids=ids, position_ids=positions).logits, alone) < 1e-5


@pytest.mark.filterwarnings("ignore:diffusers was imported before")  # by another test
@pytest.mark.parametrize(
    ("version", "name", "claimed"),
    [
        (2, "flash_attn", True),
        (3, "flash_attn_interface", True),
        (4, "flash_attn", ("flash-attn", "flash-attn-4")),
    ],
)
def test_as_flash_attention(version: int, name: str, claimed: Any) -> None:
    """A program that knows FlashAttention alone."""
    ids = tokens(2, 50).cuda()
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    truth = on_gpu("mistral", "eager", FP32)(input_ids=ids, attention_mask=mask).logits
    with jitattn.compat.alias(name, distribution=claimed):
        model = on_gpu("mistral", f"flash_attention_{version}", BF16)
        found = model(input_ids=ids, attention_mask=mask).logits
    keep = mask.bool()
    assert rel_l2(found[keep], truth[keep]) < 5e-2
