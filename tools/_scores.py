"""Benchmark of windows, masks and biases beside our own dense kernels, by attended pairs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table
from _timing import kernel_times

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable

    from _sequences import Report

_LENGTH: Final = 16384
_HEADS: Final = 16
_KEPT: Final = 4
_BLOCK: Final = 64


def bench_scores(report: Report, rounds: int) -> None:
    """TFLOP/s on attended pairs, and the share of the dense rate, at 16k tokens."""
    for dim in (64, 128):
        shape = (1, _LENGTH, _HEADS, dim)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        cases = _cases()
        calls = {name: _call(qkv, arguments) for name, (_, arguments) in cases.items()}
        times = kernel_times(calls, sets=1, rounds=rounds)
        rates = {
            name: 4e-6 * dim * _HEADS * pairs / times[name].p50
            for name, (pairs, _) in cases.items()
        }
        table = []
        for name, (pairs, _) in cases.items():
            base = "full" if pairs == _LENGTH**2 else "causal"
            report.add("scores", f"16k H16 D{dim} {name}", "jitattn", "kernel_us", times[name])
            share = rates[name] / rates[base]
            table.append((name, f"{times[name].p50:.0f}", f"{rates[name]:.0f}", f"{share:.2f}"))
        title = f"1 x 16k, 16 heads, D={dim}, bf16"
        print_table(title, ("what", "us", "TFLOP/s on attended pairs", "of dense"), table)


def _call(qkv: list[torch.Tensor], arguments: dict[str, Any]) -> Callable[[int], Any]:
    return lambda _: jitattn.attention(*qkv, **arguments)


def _cases() -> dict[str, tuple[float, dict[str, Any]]]:
    """Attended pairs of a head, and the arguments."""
    full, causal = float(_LENGTH**2), _LENGTH * (_LENGTH + 1) / 2
    bf16 = {"device": "cuda", "dtype": torch.bfloat16}
    keep = torch.ones(1, _LENGTH, device="cuda", dtype=torch.bool)
    matrix = torch.randn(1, 1, _LENGTH, _LENGTH, device="cuda")
    cases: dict[str, tuple[float, dict[str, Any]]] = {
        "full": (full, {}),
        "causal": (causal, {"mask": jitattn.Causal()}),
        "causal, sinks": (
            causal,
            {"mask": jitattn.Causal(), "sinks": torch.randn(_HEADS, device="cuda")},
        ),
        "causal, alibi": (
            causal,
            {"mask": jitattn.Causal(), "alibi_slopes": torch.rand(_HEADS, device="cuda")},
        ),
        "causal, softcap": (causal, {"mask": jitattn.Causal(), "softcap": 30.0}),
        "key padding": (full, {"mask": jitattn.KeyPadding(keep)}),
        "dense mask": (full, {"mask": jitattn.Dense(matrix > -3)}),
        "bias [1, 1, 1, Lkv] bf16": (full, {"bias": torch.randn(1, 1, 1, _LENGTH, **bf16)}),
        "bias [1, 1, Lq, Lkv] fp32": (full, {"bias": matrix}),
        "relative bias, reach 512": (
            full,
            {"relative_bias": torch.randn(_HEADS, 1025, device="cuda")},
        ),
    }
    for left in (1024, 4096):
        seen = (left + 1) * _LENGTH - left * (left + 1) / 2 + _KEPT * (_LENGTH - left - 1 - _KEPT)
        window = jitattn.Window(left, 0, keep_first=_KEPT)
        cases[f"window {left}, first {_KEPT}"] = (seen, {"mask": window})
    for local, stride in ((16, 8), (32, 8)):
        rule = jitattn.LocalStride(_BLOCK, local, stride)
        blocks = _LENGTH // _BLOCK
        row, column = torch.arange(blocks)[:, None], torch.arange(blocks)[None, :]
        near = row - column < local
        seen = 0.0
        for head in range(_HEADS):
            on_stride = (column + head * rule.step(_HEADS)) % stride == 0
            seen += float(((near | on_stride) & (column < row)).sum()) * _BLOCK**2
        seen = seen / _HEADS + blocks * _BLOCK * (_BLOCK + 1) / 2
        cases[f"local {local}, stride {stride}, blocks of {_BLOCK}"] = (seen, {"mask": rule})
    return cases
