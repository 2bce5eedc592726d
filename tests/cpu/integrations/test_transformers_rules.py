"""Tests that masks of transformers' models carry their rule, whatever layers say of themselves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.0")

import transformers

from jitattn.integrations.transformers import register
from tests.support.compare import rel_l2
from tests.support.models import model_of, tokens

register()
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

_SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_DECODER: dict[str, Any] = {**_SIZES, "num_key_value_heads": 2, "pad_token_id": 0}
#: Models whose layers do not say what their mask is, and such as compute attention themselves.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    # Encoders without `is_causal`.
    "splinter": ("SplinterConfig", "SplinterModel", _SIZES),
    "clap": ("ClapTextConfig", "ClapTextModel", _SIZES),
    # `is_causal` is True in the layers.
    "two sides": (
        "MistralConfig",
        "MistralForCausalLM",
        {**_DECODER, "is_causal": False, "sliding_window": 6},
    ),
    # The layers do not hand their window on.
    "phimoe": (
        "PhimoeConfig",
        "PhimoeForCausalLM",
        {**_DECODER, "num_local_experts": 2, "num_experts_per_tok": 2, "sliding_window": 6},
    ),
    # Masks alone are of the interface; attention is the model's.
    "bloom": (
        "BloomConfig",
        "BloomForCausalLM",
        {"vocab_size": 97, "hidden_size": 64, "n_layer": 2, "n_head": 4},
    ),
    # They index the mask as a matrix.
    "doge": ("DogeConfig", "DogeForCausalLM", {**_DECODER, "keep_window_size": 8}),
}


def made(name: str, implementation: str) -> Any:
    config, model, arguments = MODELS[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(0)
    found = getattr(transformers, model)._from_config(
        getattr(transformers, config)(**arguments), attn_implementation=implementation
    )
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2, generator=generator)
    return found.eval()


def first(outputs: Any) -> Tensor:
    found: Tensor = outputs[0]
    return found


@pytest.mark.parametrize("side", ["none", "ones", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_results(name: str, side: str) -> None:
    ids = tokens(2, 19)
    mask = torch.ones_like(ids)
    if side in ("left", "right"):
        mask[1, slice(5) if side == "left" else slice(-5, None)] = 0
    given = {} if side == "none" else {"attention_mask": mask}
    expected = first(made(name, "eager")(input_ids=ids, **given))
    found = first(made(name, "jitattn")(input_ids=ids, **given))
    assert rel_l2(found[mask.bool()], expected[mask.bool()]) < 2e-6


@torch.no_grad()
def test_windows_on_both_sides() -> None:
    """Of an encoder, which count the distance and not the tokens."""
    layers = {"sliding_window": 6, "layer_types": ["sliding_attention"] * 2, "head_dim": 16}
    part = transformers.T5GemmaModuleConfig(**_DECODER, **layers)
    config = transformers.T5GemmaConfig(encoder=part, decoder=part, vocab_size=97)
    found = []
    for implementation in ("eager", "jitattn"):
        torch.manual_seed(0)
        model = transformers.T5GemmaForConditionalGeneration._from_config(
            config, attn_implementation=implementation
        )
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
        found.append(model.eval()(input_ids=tokens(2, 19), decoder_input_ids=tokens(2, 9)).logits)
    assert rel_l2(found[1], found[0]) < 2e-6


@torch.no_grad()
def test_a_compiled_encoder() -> None:
    """Where no rule can be kept beside a mask, the mask says that it is not causal."""
    ids = tokens(2, 19)
    compiled = torch.compile(made("splinter", "jitattn"), backend="eager")
    expected = first(made("splinter", "eager")(input_ids=ids))
    assert rel_l2(first(compiled(input_ids=ids)), expected) < 2e-6


@torch.no_grad()
def test_positions_are_for_any_batch() -> None:
    eager, ours = model_of("llama", "eager"), model_of("llama", "jitattn")
    ids = tokens(2, 12)
    alone = torch.cat([eager(input_ids=part).logits for part in ids.split((5, 7), 1)], 1)
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    for batch in (1, 2, 1):
        found = ours(input_ids=ids[:batch], position_ids=positions, use_cache=True).logits
        assert rel_l2(found, alone[:batch]) < 2e-6


@pytest.mark.parametrize("kind", ["jump", "constant", "restart"])
@torch.no_grad()
def test_positions_beside_a_mask_describe_no_documents(kind: str) -> None:
    """A mask that is given makes one sequence of the tokens."""
    eager, ours = model_of("llama", "eager"), model_of("llama", "jitattn")
    ids = tokens(1, 12)
    positions = torch.arange(12)[None]
    if kind == "jump":
        positions[:, 5:] += 4
    elif kind == "constant":
        positions = torch.zeros_like(positions)
    else:
        positions[:, 5:] -= 5
    given = {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)}
    assert rel_l2(ours(**given).logits, eager(**given).logits) < 2e-6


@torch.no_grad()
def test_a_matrix_of_integers() -> None:
    eager, ours = model_of("llama", "eager"), model_of("llama", "jitattn")
    ids = tokens(1, 10)
    seen = torch.ones(10, 10).tril(-1) + torch.eye(10)
    mask = seen.int()[None, None]
    expected = eager(input_ids=ids).logits
    assert rel_l2(ours(input_ids=ids, attention_mask=mask).logits, expected) < 2e-6
