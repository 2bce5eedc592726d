"""Measures the host time of warm calls beside SDPA's, and the Python function calls of each."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - as everyone has it
from _table import print_table
from _timing import Spread, host_times_in_turns

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_BATCH, _LENGTH, _HEADS, _DIM = 2, 512, 8, 64


class Report(Protocol):
    """A sink for benchmark figures."""

    def add(
        self, section: str, shape: str, provider: str, metric: str, figures: Spread
    ) -> None: ...


class HostCase(NamedTuple):
    """A jitattn call, the equivalent SDPA call, and the target ratio of their host times."""

    name: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    goal: float


def host_cases(device: str = "cuda") -> Iterator[HostCase]:
    """Yield calls so short that host time dominates."""
    attend: Any = jitattn.attention
    sdpa: Any = F.scaled_dot_product_attention

    def drawn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.bfloat16, device=device)

    q, k, v = (drawn(_BATCH, _LENGTH, _HEADS, _DIM) for _ in range(3))
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]

    def plain() -> Any:
        return sdpa(*heads_first)

    def causal() -> Any:
        return sdpa(*heads_first, is_causal=True)

    mask, window = jitattn.Causal(), jitattn.Window(128, 0)
    yield HostCase("plain", lambda: attend(q, k, v), plain, 1.0)
    yield HostCase("causal", lambda: attend(q, k, v, mask=mask), causal, 1.0)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    turned = [x.detach().transpose(1, 2).requires_grad_() for x in (q, k, v)]

    def followed() -> Any:
        with torch.enable_grad():
            return attend(*leaves)

    def followed_sdpa() -> Any:
        with torch.enable_grad():
            return sdpa(*turned)

    yield HostCase("with gradient", followed, followed_sdpa, 1.3)
    yield HostCase("window", lambda: attend(q, k, v, mask=window), causal, 1.4)
    bias = drawn(1, _HEADS, _LENGTH, _LENGTH)
    yield HostCase(
        "bias", lambda: attend(q, k, v, bias=bias), lambda: sdpa(*heads_first, attn_mask=bias), 1.4
    )
    ends = torch.arange(_BATCH + 1, dtype=torch.int32, device=device) * _LENGTH
    seqs = jitattn.Ragged.from_cu_seqlens(ends, _LENGTH)
    flat = [x.flatten(0, 1) for x in (q, k, v)]
    yield HostCase("ragged", lambda: attend(*flat, q_seqs=seqs, kv_seqs=seqs), plain, 1.4)
    table = torch.arange(_BATCH * _LENGTH // 64, dtype=torch.int32, device=device).view(_BATCH, -1)
    pages = jitattn.Paged(table, torch.full((_BATCH,), _LENGTH, dtype=torch.int32, device=device))
    paged = [x.reshape(-1, 64, _HEADS, _DIM) for x in (k, v)]
    yield HostCase("pages", lambda: attend(q, *paged, kv_seqs=pages), plain, 1.4)
    one, long_k, long_v = drawn(1, 8, 32, 128), drawn(1, 16384, 8, 128), drawn(1, 16384, 8, 128)
    chat = [x.transpose(1, 2) for x in (one, long_k, long_v)]
    yield HostCase(
        "split decode",
        lambda: attend(one, long_k, long_v),
        lambda: sdpa(*chat, enable_gqa=True),
        1.4,
    )
    ours, theirs = (_one_more(long_k.shape[1]) for _ in range(2))

    def growing() -> Any:
        length = next(ours)
        return attend(one, long_k[:, :length], long_v[:, :length])

    def growing_sdpa() -> Any:
        length = next(theirs)
        return sdpa(chat[0], chat[1][:, :, :length], chat[2][:, :, :length], enable_gqa=True)

    # cuDNN plans every new shape anew, in tens of milliseconds: SDPA's flash backend instead.
    had_cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    yield HostCase("decode with one more key each step", growing, growing_sdpa, 1.4)
    torch.backends.cuda.enable_cudnn_sdp(had_cudnn)
    x = drawn(1, 1024, _HEADS, _DIM)
    x_heads = x.transpose(1, 2)
    norm = jitattn.L2Norm()

    def normalized() -> Any:
        y, z = F.normalize(x_heads, dim=-1), F.normalize(x_heads, dim=-1)
        return sdpa(y, z, x_heads, scale=8.0)

    yield HostCase("cosine", lambda: attend(x, x, x, qk_norm=norm), normalized, 1.0)


def _one_more(most: int) -> Iterator[int]:
    """Yield growing key counts, new at every call as in decoding, up to the cache size."""
    while True:
        yield from range(most // 4, most + 1)


def python_calls(call: Callable[[], Any]) -> int:
    """Count the Python functions that a warm call enters."""
    for _ in range(3):
        call()
    count = 0

    def noted(frame: object, event: str, argument: object) -> None:
        del frame, argument
        nonlocal count
        count += event == "call"

    sys.setprofile(noted)
    try:
        call()
    finally:
        sys.setprofile(None)
    return count - 1  # without the case itself


def bench_host(report: Report, rounds: int) -> None:
    """Time warm eager calls on the host."""
    rows = []
    for case in host_cases():
        pair = {"jitattn": case.ours, "sdpa": case.theirs}
        found = host_times_in_turns(pair, rounds=rounds * 2)
        for provider, figures in found.items():
            report.add("host", case.name, provider, "host_us", figures)
        ours, theirs = found["jitattn"].p50, found["sdpa"].p50
        calls = python_calls(case.ours)
        rows.append((
            case.name, f"{ours:.1f}", f"{theirs:.1f}", f"{ours / theirs:.2f}", f"{case.goal:.1f}",
            str(calls),
        ))  # fmt: skip
    columns = ("call", "us", "SDPA us", "ratio", "goal", "Python calls")
    print_table("host time of a warm eager call", columns, rows)
