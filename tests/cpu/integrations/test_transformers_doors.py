"""Tests transformers' models by the names of FlashAttention 2, 3 and 4."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.0")

from transformers.utils import import_utils

import jitattn.compat
from jitattn.api import attention as api
from tests.support.compare import rel_l2
from tests.support.models import model_of, tokens


@pytest.mark.filterwarnings("ignore:diffusers was imported before")  # by another test
@pytest.mark.parametrize(
    ("version", "name", "claimed"),
    [
        (2, "flash_attn", True),
        (3, "flash_attn_interface", True),
        (4, "flash_attn", ("flash-attn", "flash-attn-4")),
    ],
)
def test_models_by_name(
    version: int, name: str, claimed: bool | tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Left padding, windows, and with version 4 sinks: as eager, by calls of ours."""
    calls, run = [], api.run

    def counted(*given: Any) -> Any:
        calls.append(1)
        return run(*given)

    # It takes these packages for usable where torch sees a GPU.
    monkeypatch.setattr(import_utils, "is_torch_cuda_available", lambda: True)
    monkeypatch.setattr(api, "run", counted)
    ids = tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[1, :13] = 0
    with jitattn.compat.alias(name, distribution=claimed), torch.no_grad():
        for model in ("mistral", "gpt_oss") if version == 4 else ("mistral",):
            truth = model_of(model, "eager")(input_ids=ids, attention_mask=mask).logits
            calls.clear()
            found = model_of(model, f"flash_attention_{version}")(
                input_ids=ids, attention_mask=mask
            ).logits
            assert calls
            assert rel_l2(found[mask.bool()], truth[mask.bool()]) < 1e-5
