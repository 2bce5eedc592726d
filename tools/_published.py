"""Speed of the doors of sageattention and xformers against SDPA's flash backend and gear 2."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table
from _timing import kernel_times
from torch.nn.attention import SDPBackend, sdpa_kernel

import jitattn
from jitattn.compat.sageattention import sageattn
from jitattn.compat.xformers.ops import fmha

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from _doors import Report

#: Batch, tokens, heads, head dim.
_SHAPES: Final = ((1, 4096, 24, 128), (1, 16384, 24, 128), (2, 4096, 16, 64))


def bench_sageattention(report: Report, rounds: int) -> None:
    """Time `sageattn` against gear 2 and SDPA's flash backend, causal and not.

    On sm_90 it takes the kernels of wgmma, in 16 bits; those of mma.sync, in 8, are timed by
    `JITATTN_FAMILY=sm80 python tools/bench.py --section sageattention`.
    """
    table: list[tuple[str, ...]] = []
    for shape in _SHAPES:
        for causal in (False, True):
            qkv = _drawn(shape)
            mask = jitattn.Causal() if causal else jitattn.Full()
            calls = {
                "sageattn": _call(sageattn, qkv, tensor_layout="NHD", is_causal=causal),
                "gear 2": _call(jitattn.attention, qkv, mask=mask, gear=2),
                "sdpa flash": _sdpa(qkv, causal, SDPBackend.FLASH_ATTENTION),
            }
            table += _rows(report, "sageattention", shape, causal, calls, rounds)
    _print("sageattention, bf16", "sageattn", table)


def bench_xformers(report: Report, rounds: int) -> None:
    """Time `memory_efficient_attention` against SDPA's flash and efficient backends."""
    table: list[tuple[str, ...]] = []
    for shape in _SHAPES:
        for causal in (False, True):
            qkv = _drawn(shape)
            bias = fmha.LowerTriangularMask() if causal else None
            calls = {
                "xformers": _call(fmha.memory_efficient_attention, qkv, attn_bias=bias),
                "sdpa flash": _sdpa(qkv, causal, SDPBackend.FLASH_ATTENTION),
                "sdpa efficient": _sdpa(qkv, causal, SDPBackend.EFFICIENT_ATTENTION),
            }
            table += _rows(report, "xformers", shape, causal, calls, rounds)
    _print("xformers' memory_efficient_attention, bf16", "xformers", table)


def _call(
    function: Callable[..., Any], qkv: Sequence[torch.Tensor], **given: Any
) -> Callable[[int], Any]:
    return lambda _: function(*qkv, **given)


def _drawn(shape: tuple[int, int, int, int]) -> list[torch.Tensor]:
    return [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]


def _sdpa(qkv: Sequence[torch.Tensor], causal: bool, backend: SDPBackend) -> Callable[[int], Any]:
    q, k, v = (x.transpose(1, 2) for x in qkv)

    def call(_: int) -> Any:
        with sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def _rows(
    report: Report,
    section: str,
    shape: tuple[int, int, int, int],
    causal: bool,
    calls: dict[str, Callable[[int], Any]],
    rounds: int,
) -> list[tuple[str, ...]]:
    """Time calls in turns; a row each, with its time over that of the first."""
    batch, length, heads, dim = shape
    name = f"B{batch} {length} H{heads} D{dim}{' causal' if causal else ''}"
    times = kernel_times(calls, sets=1, rounds=rounds)
    ours = next(iter(times.values())).p50
    flops = 4 * batch * heads * dim * length**2 / (2 if causal else 1)
    rows: list[tuple[str, ...]] = []
    for provider, figures in times.items():
        report.add(section, name, provider, "kernel_us", figures)
        rows.append(
            (
                name,
                provider,
                f"{figures.p50:.1f}",
                f"{flops / figures.p50 / 1e6:.0f}",
                f"{figures.p50 / ours:.2f}x",
            )
        )
    return rows


def _print(title: str, ours: str, table: list[tuple[str, ...]]) -> None:
    print_table(title, ("shape", "provider", "us", "TFLOP/s", f"time / {ours}"), table)
