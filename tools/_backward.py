"""Benchmarks of backward passes: dense against FlashAttention-2, sparse rules, cosine attention."""

from __future__ import annotations

import itertools
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import torch
from _scores import attended_cases
from _seeds import plain_cosine
from _table import print_table
from _timing import kernel_times

import jitattn
from jitattn.api.attention import bind
from jitattn.run.backward import run_backward

if TYPE_CHECKING:
    from collections.abc import Callable

    from _sequences import Report

_HEADS: Final = 16
#: Sparse rules that users train with.
_PATTERNS: Final = (
    "window 1024",
    "window 1024, first 4",
    "window 4096, first 4",
    "local 16, stride 8, blocks of 64",
    "local 32, stride 8, blocks of 64",
    "local 16, stride 8, blocks of 32",
    "local 32, stride 8, blocks of 32",
    "local 64, stride 8, blocks of 16",
    "the first of these, as BlockSparse",
    "causal, softcap",
    "causal, alibi",
    "key padding",
)
#: Largest score matrix in bytes for the plain PyTorch baseline.
_LARGEST_PLAIN: Final = 24e9


def bench_backward(report: Report, rounds: int) -> None:
    """Time the backward pass: dense against FlashAttention-2, then rules by attended pairs."""
    for dim in (64, 128):
        table = []
        for (batch, length), causal in itertools.product(((1, 16384), (4, 4096)), (False, True)):
            shape = (batch, length, _HEADS, dim)
            q, k, v, d_out = (
                torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(4)
            )
            rule = jitattn.Causal() if causal else jitattn.Full()
            calls = {
                "jitattn": _ours(q, k, v, d_out, mask=rule),
                "deterministic": _ours(q, k, v, d_out, mask=rule, deterministic=True),
                "sdpa flash": _flash(q, k, v, d_out, causal),
            }
            times = kernel_times(calls, sets=1, rounds=rounds)
            pairs = length * (length + 1) / 2 if causal else length**2
            kind = "causal" if causal else "full"
            ours = times["jitattn"].p50
            for name, spread in times.items():
                where = f"B{batch} {length} H{_HEADS} D{dim} {kind}"
                report.add("backward", where, name, "kernel_us", spread)
                rate = 10e-6 * dim * _HEADS * batch * pairs / spread.p50
                ratio = f"{spread.p50 / ours:.2f}"
                table.append((where, name, f"{spread.p50:.0f}", f"{rate:.0f}", ratio))
        columns = ("shape", "provider", "us", "TFLOP/s", "time / ours")
        print_table(f"Backward pass, D={dim}, bf16", columns, table)
        _bench_patterns(dim, report, rounds)
    _bench_cosine(report, rounds)


def _bench_patterns(dim: int, report: Report, rounds: int) -> None:
    cases = attended_cases()
    names = ("full", "causal", *_PATTERNS)
    length = 16384
    tensors = [
        torch.randn(1, length, _HEADS, dim, device="cuda", dtype=torch.bfloat16) for _ in range(4)
    ]
    calls = {name: _ours(*tensors, **cases[name][1]) for name in names}
    times = kernel_times(calls, sets=1, rounds=rounds)
    rates = {name: 10e-6 * dim * _HEADS * cases[name][0] / times[name].p50 for name in names}
    table = []
    for name in names:
        base = "full" if cases[name][0] == length**2 else "causal"
        where = f"16k H{_HEADS} D{dim} {name}"
        report.add("backward", where, "jitattn", "kernel_us", times[name])
        share = rates[name] / rates[base]
        table.append((name, f"{times[name].p50:.0f}", f"{rates[name]:.0f}", f"{share:.2f}"))
    columns = ("what", "us", "TFLOP/s on attended pairs", "of dense")
    print_table(f"Backward pass, 1 x 16k, {_HEADS} heads, D={dim}, bf16", columns, table)


def _bench_cosine(report: Report, rounds: int) -> None:
    """Time forward and backward of cosine attention against plain PyTorch."""
    for dtype, kind in itertools.product(
        (torch.float16, torch.float32), ("full", "causal", "25 % masked")
    ):
        table = []
        for length in (128, 256, 512, 1024, 2048, 4096, 8192):
            tensors = [
                torch.randn(4, 8, length, 64, device="cuda", dtype=dtype).requires_grad_()
                for _ in range(3)
            ]
            d_out = torch.randn_like(tensors[0])
            keep = torch.rand(4, length, device="cuda") > 0.25
            mask: Any = {
                "full": jitattn.Full(),
                "causal": jitattn.Causal(),
                "25 % masked": jitattn.KeyPadding(keep),
            }[kind]
            given = {"mask": mask, "scale": 10.0, "layout": "bhsd", "qk_norm": jitattn.L2Norm()}
            calls = {"ours": _step(partial(jitattn.attention, **given), tensors, d_out)}
            if 4 * 8 * length**2 * 12 <= _LARGEST_PLAIN:
                calls["plain"] = _step(plain_cosine(length, kind, keep), tensors, d_out)
            times = kernel_times(calls, sets=1, rounds=rounds)
            for name, spread in times.items():
                where = f"B4 {length} H8 D64 {dtype} {kind}, forward and backward"
                report.add("backward", where, name, "kernel_us", spread)
            ours = times["ours"].p50
            plain = times["plain"].p50 if "plain" in times else float("nan")
            table.append((f"{length}", f"{ours:.1f}", f"{plain:.0f}", f"{plain / ours:.1f}"))
        title = f"Cosine, forward and backward: {str(dtype).removeprefix('torch.')}, {kind}, us"
        print_table(title, ("tokens", "ours", "plain", "over plain"), table)


def _ours(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, **given: Any
) -> Callable[[int], Any]:
    """Return the backward pass of a jitattn call, as autograd runs it."""
    tensors, call = bind(q, k, v, given)
    out, lse = jitattn.attention(q, k, v, **given, return_lse=True)
    return lambda _: run_backward(
        tensors["q"], tensors["k"], tensors["v"], out, lse, d_out, None, call
    )


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, d_out: torch.Tensor, causal: bool
) -> Callable[[int], Any]:
    """Return the backward pass of FlashAttention-2, as SDPA runs it."""
    q, k, v, d_out = (x.transpose(1, 2).contiguous() for x in (q, k, v, d_out))
    aten = torch.ops.aten
    out, lse, starts_q, starts_k, max_q, max_k, seed, offset, _ = (
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)
    )
    numbers = (starts_q, starts_k, max_q, max_k, 0.0, causal, seed, offset)
    return lambda _: aten._scaled_dot_product_flash_attention_backward(
        d_out, q, k, v, out, lse, *numbers
    )


def _step(
    function: Callable[..., torch.Tensor], tensors: list[torch.Tensor], d_out: torch.Tensor
) -> Callable[[int], Any]:
    def call(_: int) -> Any:
        with torch.enable_grad():
            out = function(*tensors)
        return torch.autograd.grad(out, tensors, d_out)

    return call
