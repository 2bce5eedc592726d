"""Benchmark of padded, paged and ragged sequences against dense calls of equal work."""

from __future__ import annotations

import functools
import itertools
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from _table import print_table
from _timing import Spread, kernel_times

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_HEADS_Q: Final = 32
_HEADS_KV: Final = 8
_DIM: Final = 128
_BF16: Final = torch.bfloat16


class Report(Protocol):
    """Destination of figures."""

    def add(
        self, section: str, shape: str, provider: str, metric: str, figures: Spread
    ) -> None: ...


def bench_sequences(report: Report, rounds: int) -> None:
    """Time decoding with lengths and pages, one long sequence among 63 short ones, prompts."""
    for batch, length in ((1, 8192), (8, 8192), (64, 8192), (1, 131072)):
        name = f"B{batch} q1 kv{length} H{_HEADS_Q}/{_HEADS_KV} D{_DIM}"
        _compare(report, name, _decode_calls(batch, length), rounds)
    _compare(report, "decode, 1 x 128k and 63 x 1k", _uneven_calls(), rounds)
    _compare(report, "causal prompts of 512 to 8k, 32k tokens", _prompt_calls(), rounds)
    for batch, length in ((1, 8192), (64, 8192)):
        name = f"one step of B{batch} on {length} keys in pages of 16, H{_HEADS_Q}/{_HEADS_KV}"
        _compare(report, name, _step_calls(batch, length), rounds)
    _compare(report, "8192 causal queries over 8192 keys", _paged_prompt_calls(8192), rounds)


def _decode_calls(batch: int, length: int) -> dict[str, Callable[[int], Any]]:
    q = _random(batch, 1, _HEADS_Q, _DIM)
    k, v = (_random(batch, length, _HEADS_KV, _DIM) for _ in range(2))
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    calls: dict[str, Callable[[int], Any]] = {
        "dense": lambda _: jitattn.attention(q, k, v),
        "padded": lambda _: jitattn.attention(q, k, v, kv_seqs=jitattn.Padded(lengths)),
    }
    for page_size, is_shuffled in ((16, False), (16, True), (1, True)):
        number = batch * length // page_size
        order = (torch.randperm if is_shuffled else torch.arange)(number, device="cuda")
        seqs = jitattn.Paged(order.reshape(batch, -1).int(), lengths)
        pages = [x.reshape(number, page_size, _HEADS_KV, _DIM) for x in (k, v)]
        name = f"pages of {page_size}, {'shuffled' if is_shuffled else 'in order'}"
        calls[name] = functools.partial(_paged, q, pages, seqs)
    return calls


def _paged(q: Tensor, pages: list[Tensor], seqs: jitattn.Paged, _: int) -> Any:
    return jitattn.attention(q, *pages, kv_seqs=seqs)


def _uneven_calls() -> dict[str, Callable[[int], Any]]:
    """Return calls with equal (the ideal) and unequal lengths, of the same number of keys."""
    lengths = [131072, *[1024] * 63]
    total = sum(lengths)
    k, v = (_random(total, _HEADS_KV, _DIM) for _ in range(2))
    q = _random(64, 1, _HEADS_Q, _DIM)

    def ragged(own: list[int]) -> jitattn.Ragged:
        cumulative = torch.tensor([0, *torch.tensor(own).cumsum(0).tolist()]).cuda().int()
        return jitattn.Ragged.from_cu_seqlens(cumulative, max_length=max(own))

    even, uneven = ragged([total // 64] * 64), ragged(lengths)
    last = ragged([*lengths[1:], lengths[0]])
    return {
        "even lengths": lambda _: jitattn.attention(q, k, v, kv_seqs=even),
        "long one first": lambda _: jitattn.attention(q, k, v, kv_seqs=uneven),
        "long one last": lambda _: jitattn.attention(q, k, v, kv_seqs=last),
    }


def _prompt_calls() -> dict[str, Callable[[int], Any]]:
    """Return ragged causal prompts, and each prompt alone with jitattn and SDPA's flash backend."""
    lengths = [512, 8192, 2048, 1024, 4096, 512, 8192, 8192]
    total = sum(lengths)
    q = _random(total, _HEADS_Q, _DIM)
    k, v = (_random(total, _HEADS_KV, _DIM) for _ in range(2))
    cumulative = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()]).cuda().int()
    seqs = jitattn.Ragged.from_cu_seqlens(cumulative, max_length=max(lengths))
    bounds = cumulative.tolist()
    parts = [
        tuple(x[first:last][None] for x in (q, k, v)) for first, last in itertools.pairwise(bounds)
    ]

    def one_by_one(_: int) -> None:
        for part in parts:
            jitattn.attention(*part, mask=jitattn.Causal())

    def flash(_: int) -> None:
        for part in parts:
            own_q, own_k, own_v = (x.transpose(1, 2) for x in part)
            torch.nn.functional.scaled_dot_product_attention(
                own_q, own_k, own_v, is_causal=True, enable_gqa=True
            )

    return {
        "one after another": one_by_one,
        "ragged": lambda _: jitattn.attention(
            q, k, v, mask=jitattn.Causal(), q_seqs=seqs, kv_seqs=seqs
        ),
        "sdpa, one after another": flash,
    }


def _step_calls(batch: int, length: int) -> dict[str, Callable[[int], Any]]:
    """Return attention alone, with the append, and with rotary embedding, in the same pages."""
    q, k, v = (_random(batch, 1, heads, _DIM) for heads in (_HEADS_Q, _HEADS_KV, _HEADS_KV))
    width = length // 16
    pages = [_random(batch * width, 16, _HEADS_KV, _DIM) for _ in range(2)]
    table = torch.randperm(batch * width, device="cuda").reshape(batch, width).int()
    lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
    angle = torch.rand(length, _DIM // 2, device="cuda")
    rotary = jitattn.Rotary(angle.cos(), angle.sin(), interleaved=False)
    seqs = jitattn.Paged(table, lengths)
    new: dict[str, Any] = {"k": k, "v": v, "length": lengths - 1, "block_table": table}
    return {
        "attention": lambda _: jitattn.attention(q, *pages, mask=jitattn.Causal(), kv_seqs=seqs),
        "append": lambda _: jitattn.attention_with_kvcache(q, *pages, **new),
        "append, rotary": lambda _: jitattn.attention_with_kvcache(q, *pages, **new, rotary=rotary),
    }


def _paged_prompt_calls(length: int) -> dict[str, Callable[[int], Any]]:
    """Return a long prompt: dense, with a length, and over shuffled pages of 16."""
    q = _random(1, length, _HEADS_Q, _DIM)
    k, v = (_random(1, length, _HEADS_KV, _DIM) for _ in range(2))
    lengths = torch.full((1,), length, dtype=torch.int32, device="cuda")
    table = torch.randperm(length // 16, device="cuda")[None].int()
    pages = [x.reshape(-1, 16, _HEADS_KV, _DIM) for x in (k, v)]
    causal = jitattn.Causal()
    return {
        "dense": lambda _: jitattn.attention(q, k, v, mask=causal),
        "padded": lambda _: jitattn.attention(
            q, k, v, mask=causal, kv_seqs=jitattn.Padded(lengths)
        ),
        "pages of 16, shuffled": lambda _: jitattn.attention(
            q, *pages, mask=causal, kv_seqs=jitattn.Paged(table, lengths)
        ),
    }


def _compare(
    report: Report, name: str, calls: dict[str, Callable[[int], Any]], rounds: int
) -> None:
    times = kernel_times(calls, sets=1, rounds=rounds)
    first = next(iter(times.values())).p50
    table = []
    for provider, figures in times.items():
        report.add("sequences", name, provider, "kernel_us", figures)
        table.append((provider, f"{figures.p50:.1f}", f"{figures.p50 / first:.3f}"))
    print_table(name, ("layout", "us", "of the first"), table)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device="cuda", dtype=_BF16)
