"""Measures a language model of transformers, in tokens per second, by attention implementation."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table, say
from _timing import spread

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _sequences import Report

#: The shape of Llama 3.2 1B, with fewer words.
_CONFIG: Final = {
    "vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64,
    "max_position_embeddings": 16384,
}  # fmt: skip
_PREFILL, _TRAINED, _PROMPT, _BATCH, _NEW = 8192, 4096, 2048, 8, 64
#: Name in the table, and of the implementation; the third is SDPA with torch's flash kernels alone.
_PROVIDERS: Final = (
    ("jitattn", "jitattn"), ("sdpa", "sdpa"), ("sdpa, flash", "sdpa"), ("eager", "eager"),
)  # fmt: skip


def bench_models(report: Report, rounds: int) -> None:
    """Time a prompt, a training step, and generation with a growing cache, of random weights."""
    try:
        import transformers
    except ImportError:
        say("models: needs transformers")
        return
    from jitattn.integrations.transformers import register

    register()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**_CONFIG, pad_token_id=0)  # type: ignore[arg-type]
    with torch.device("cuda"):
        model: Any = transformers.LlamaForCausalLM(config).bfloat16()
    samples: dict[tuple[str, str], list[float]] = {}
    for turn in range(rounds + 1):  # providers take turns; the first turn is warm-up
        for provider, implementation in _PROVIDERS:
            model.set_attn_implementation(implementation)
            with _backend(provider):
                for work, rate in _rates(model):
                    if turn > 0:
                        samples.setdefault((work, provider), []).append(rate)
    found = {key: spread(rates) for key, rates in samples.items()}
    rows = []
    for (work, provider), figures in sorted(found.items()):
        report.add("models", work, provider, "tokens_per_s", figures)
        ratio = found[work, "jitattn"].p50 / figures.p50
        rows.append((work, provider, f"{figures.p50:.0f}", f"{ratio:.3f}"))
    title = "A Llama of 1.1 B parameters, bf16, D=64, 32 query heads on 8 of keys"
    print_table(title, ("work", "attention", "tokens/s", "ours over it"), rows)


def _rates(model: Any) -> Iterator[tuple[str, float]]:
    """Yield each work and its tokens per second."""
    prompt = torch.randint(1, 32000, (1, _PREFILL), device="cuda")
    prompts = torch.randint(1, 32000, (_BATCH, _PROMPT), device="cuda")
    model.eval()
    yield (
        f"prompt of {_PREFILL}",
        _PREFILL / _seconds(lambda: model(input_ids=prompt, logits_to_keep=1, use_cache=False)),
    )

    def generate(count: int) -> None:
        model.generate(
            prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=count,
            min_new_tokens=count, do_sample=False,
        )  # fmt: skip

    first, all_of_them = _seconds(lambda: generate(1)), _seconds(lambda: generate(1 + _NEW))
    yield f"{_BATCH} x {_NEW} new after {_PROMPT}", _BATCH * _NEW / (all_of_them - first)

    def train() -> None:
        with torch.enable_grad():
            ids = prompt[:, :_TRAINED]
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad()

    model.train()
    yield f"training on {_TRAINED}", _TRAINED / _seconds(train)


def _backend(provider: str) -> contextlib.AbstractContextManager[None]:
    if "flash" not in provider:
        return contextlib.nullcontext()
    flash: contextlib.AbstractContextManager[None] = torch.nn.attention.sdpa_kernel(
        torch.nn.attention.SDPBackend.FLASH_ATTENTION
    )
    return flash


def _seconds(call: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - start
