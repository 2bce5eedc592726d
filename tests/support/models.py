"""Tiny random models of transformers, made from configs: nothing is downloaded."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

VOCABULARY, PAD, WINDOW = 97, 0, 6
#: Weights large enough, and a window short enough, that a forgotten mask or sink changes logits.
_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
}
_DECODER = {**_COMMON, "num_key_value_heads": 2, "pad_token_id": PAD, "head_dim": 16}
#: (config class, model class, arguments of the config)
_MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": WINDOW}),
    "gemma2": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {**_DECODER, "sliding_window": WINDOW, "attn_logit_softcapping": 5.0},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {**_DECODER, "sliding_window": WINDOW,
         "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {**_DECODER, "sliding_window": WINDOW, "num_local_experts": 2, "num_experts_per_tok": 1},
    ),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", _DECODER),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", {**_DECODER, "sliding_window": WINDOW}),
    "t5": (
        "T5Config",
        "T5ForConditionalGeneration",
        {"vocab_size": VOCABULARY, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2,
         "num_heads": 4, "initializer_factor": 1.0, "decoder_start_token_id": PAD},
    ),
    "bert": ("BertConfig", "BertForMaskedLM", {**_COMMON, "pad_token_id": PAD}),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {**{k: v for k, v in _COMMON.items() if k not in ("vocab_size", "max_position_embeddings")},
         "image_size": 32, "patch_size": 8},
    ),
}  # fmt: skip
DECODERS = ("llama", "mistral", "gemma2", "gemma3", "gpt_oss", "qwen3", "phi3")
MODELS = tuple(_MODELS)


def model_of(name: str, implementation: str, **more: Any) -> Any:
    """Return a model in evaluation mode; of a name, all have the same weights."""
    import transformers

    config_class, model_class, arguments = _MODELS[name]
    config = getattr(transformers, config_class)(**{**arguments, **more})
    config._attn_implementation = implementation
    torch.manual_seed(0)
    model = getattr(transformers, model_class)._from_config(
        config, attn_implementation=implementation
    )
    with torch.no_grad():
        for path, parameter in model.named_parameters():
            if path.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel()))
            if "relative_attention_bias" in path:
                parameter.normal_(std=2.0)
    return model.eval()


def tokens(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return random tokens but for padding."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, VOCABULARY, (batch, length), generator=generator)


def inputs_of(name: str, batch: int = 2, length: int = 23) -> dict[str, Tensor]:
    """Return the inputs of a model, without padding."""
    if name == "vit":
        generator = torch.Generator().manual_seed(2)
        return {"pixel_values": torch.randn(batch, 3, 32, 32, generator=generator)}
    ids = tokens(batch, length)
    if name == "t5":
        return {"input_ids": ids, "decoder_input_ids": tokens(batch, 9, seed=3)}
    return {"input_ids": ids}
