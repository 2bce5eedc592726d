"""Benchmark of windows, masks and biases against our dense kernels, by attended pairs."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table
from _timing import kernel_times

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from _sequences import Report

_LENGTH: Final = 16384
_HEADS: Final = 16
_KEPT: Final = 4
_BLOCK: Final = 64


def bench_scores(report: Report, rounds: int) -> None:
    """Report TFLOP/s on attended pairs, and the fraction of the dense rate, at 16k tokens."""
    for dim in (64, 128):
        shape = (1, _LENGTH, _HEADS, dim)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        cases = attended_cases()
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


def _call(
    qkv: list[torch.Tensor],
    arguments: dict[str, Any],
    function: Callable[..., Any] = jitattn.attention,
) -> Callable[[int], Any]:
    return lambda _: function(*qkv, **arguments)


def attended_cases() -> dict[str, tuple[float, dict[str, Any]]]:
    """Return attended pairs per head and the arguments of each case."""
    full, causal = float(_LENGTH**2), _LENGTH * (_LENGTH + 1) / 2
    bf16: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
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
    for left, kept in ((1024, 0), (1024, _KEPT), (4096, _KEPT)):
        seen = (left + 1) * _LENGTH - left * (left + 1) / 2 + kept * (_LENGTH - left - 1 - kept)
        name = f"window {left}, first {kept}" if kept else f"window {left}"
        cases[name] = (seen, {"mask": jitattn.Window(left, 0, keep_first=kept)})
    for block, local in ((64, 16), (64, 32), (32, 16), (32, 32), (16, 64), (16, 16)):
        rule = jitattn.LocalStride(block, local, 8, homo_head=True)
        name = f"local {local}, stride 8, blocks of {block}"
        cases[name] = (_seen(_blocks_of(rule), block), {"mask": rule})
    blocks = _blocks_of(jitattn.LocalStride(_BLOCK, 16, 8, homo_head=True))
    cases["the first of these, as BlockSparse"] = (
        _seen(blocks, _BLOCK),
        {"mask": jitattn.BlockSparse(blocks.cuda(), _BLOCK, causal=True)},
    )
    mixed = jitattn.PerHead([jitattn.Causal(), jitattn.Window(1024, 0)] * (_HEADS // 2))
    near = 1025 * _LENGTH - 1024 * 1025 / 2
    cases["half causal, half window 1024"] = ((causal + near) / 2, {"mask": mixed})
    return cases


def _blocks_of(rule: jitattn.LocalStride) -> torch.Tensor:
    """Return the visible blocks of a causal pattern that is the same for all heads."""
    count = _LENGTH // rule.block_size
    row, column = torch.arange(count)[:, None], torch.arange(count)[None, :]
    seen = (row - column < rule.local[0]) | (column % rule.vert_stride == 0)
    return seen & (column <= row)


def _seen(blocks: torch.Tensor, size: int) -> float:
    """Count the visible pairs of a causal block pattern whose diagonal is set."""
    count = len(blocks)
    return float(blocks.sum() - count) * size**2 + count * size * (size + 1) / 2


def bench_density(report: Report, rounds: int) -> None:
    """Time random causal patterns from dense to sparse against dense causal, at 16k tokens."""
    for dim, block in itertools.product((64, 128), (_BLOCK, 2 * _BLOCK)):
        shape = (1, _LENGTH, _HEADS, dim)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        calls = {"causal": _call(qkv, {"mask": jitattn.Causal()})}
        seen = {"causal": 1.0}
        count = _LENGTH // block
        generator = torch.Generator().manual_seed(0)
        for density in (1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1, 0.05, 0.02):
            blocks = torch.rand(count, count, generator=generator) < density
            blocks = (blocks | torch.eye(count, dtype=torch.bool)).tril()
            name = f"density {density}"
            seen[name] = _seen(blocks, block) / (_LENGTH * (_LENGTH + 1) / 2)
            rule = jitattn.BlockSparse(blocks.cuda(), block, causal=True)
            calls[name] = _call(qkv, {"mask": rule})
        times = kernel_times(calls, sets=1, rounds=rounds)
        table = []
        for name, part in seen.items():
            where = f"16k H16 D{dim}, blocks of {block}: {name}"
            report.add("density", where, "jitattn", "kernel_us", times[name])
            share = times[name].p50 / times["causal"].p50
            table.append((name, f"{part:.3f}", f"{times[name].p50:.0f}", f"{share:.3f}"))
        title = f"Random causal patterns in blocks of {block}, 1 x 16k, 16 heads, D={dim}, bf16"
        print_table(title, ("pattern", "pairs of causal", "us", "time of causal"), table)


def plot_density(rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Plot time against density, both relative to dense causal, from the rows of a report."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 5), layout="tight")
    axes = figure.subplots()
    curves: dict[str, dict[str, float]] = {}
    for row in rows:
        if row["section"] == "density":
            label, _, name = row["shape"].partition(": ")
            curves.setdefault(label, {})[name] = float(row["p50"])
    for label, times in curves.items():
        dense = times.pop("causal")
        found = {float(name.removeprefix("density ")): time for name, time in times.items()}
        densities = sorted(found)
        axes.plot(densities, [found[one] / dense for one in densities], "o-", label=label)
    axes.plot([0, 1], [0, 1], "--", color="gray", label="time as density")
    axes.axhline(1.0, color="lightgray")
    axes.set_xlabel("density: part of the blocks up to the diagonal that is set")
    axes.set_ylabel("time over dense causal")
    axes.set_title("Random causal patterns")
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def bench_flex(report: Report, rounds: int) -> None:
    """Time windows and patterns against FlexAttention with default options, at 16k tokens."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    for dim in (64, 128):
        shape = (1, _LENGTH, _HEADS, dim)
        qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
        turned = [x.transpose(1, 2).contiguous() for x in qkv]
        calls: dict[str, Callable[[int], Any]] = {}
        torch._dynamo.reset()  # otherwise its limit of recompiles is reached
        rules = _flex_rules()
        for name, (rule, mod) in rules.items():
            block_mask = create_block_mask(mod, None, None, _LENGTH, _LENGTH, device="cuda")
            flex = torch.compile(flex_attention, dynamic=False)
            calls[f"{name}, ours"] = _call(qkv, {"mask": rule})
            calls[f"{name}, flex"] = _call(turned, {"block_mask": block_mask}, flex)
        times = kernel_times(calls, sets=1, rounds=rounds)
        table = []
        for name in rules:
            ours, theirs = times[f"{name}, ours"], times[f"{name}, flex"]
            where = f"16k H16 D{dim} {name}"
            report.add("flex", where, "jitattn", "kernel_us", ours)
            report.add("flex", where, "flex", "kernel_us", theirs)
            ratio = theirs.p50 / ours.p50
            table.append((name, f"{ours.p50:.0f}", f"{theirs.p50:.0f}", f"{ratio:.2f}"))
        title = f"FlexAttention, 1 x 16k, 16 heads, D={dim}, bf16"
        print_table(title, ("mask", "ours, us", "flex, us", "ours is faster by"), table)


def _flex_rules() -> dict[str, tuple[Any, Callable[..., Any]]]:
    def window(left: int) -> Callable[..., Any]:
        return lambda b, h, q, k: (k <= q) & ((k >= q - left) | (k < _KEPT))

    def pattern(local: int, stride: int) -> Callable[..., Any]:
        return lambda b, h, q, k: (
            (k <= q) & ((q // _BLOCK - k // _BLOCK < local) | (k // _BLOCK % stride == 0))
        )

    rules: dict[str, tuple[Any, Callable[..., Any]]] = {
        "causal": (jitattn.Causal(), lambda b, h, q, k: k <= q)
    }
    for left in (1024, 4096):
        rules[f"window {left}"] = (jitattn.Window(left, 0, keep_first=_KEPT), window(left))
    for local in (16, 32):
        rule = jitattn.LocalStride(_BLOCK, local, 8, homo_head=True)
        rules[f"local {local}, stride 8"] = (rule, pattern(local, 8))
    return rules
