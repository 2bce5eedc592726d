"""Benchmarks of WarpAttention, dkernel and flash-cosine-sim-attention, with their own shapes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table
from _timing import kernel_times
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable

    from _sequences import Report

BF16: Final = torch.bfloat16
#: Size limit of the plain versions' score matrices.
_LARGEST_PLAIN: Final = 16 * 2**30


def _flash(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, causal: bool
) -> Callable[..., Any]:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))

    def call(_: int) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(q, k, v, is_causal=causal)

    return call


def bench_warp_attention(report: Report, rounds: int) -> None:
    """Time WarpAttention's shapes: short and long queries on 128 to 16k keys, full."""
    for dim, len_q in itertools.product((64, 128), (16, 128, 1024)):
        table = []
        for len_kv in (2**power for power in range(7, 15)):
            if len_kv < len_q:
                continue
            q = torch.randn(4, len_q, 32, dim, device="cuda", dtype=BF16)
            k, v = torch.randn(2, 4, len_kv, 32, dim, device="cuda", dtype=BF16)
            calls = {
                "ours": _ours((q, k, v)),
                "flash": _flash(q, k, v, causal=False),
            }
            times = kernel_times(calls, sets=1, rounds=rounds)
            where = f"B4 q{len_q} kv{len_kv} H32 D{dim} full"
            work = 4e-6 * 4 * 32 * len_q * len_kv * dim
            for name, spread in times.items():
                report.add("warp_attention", where, name, "kernel_us", spread)
            ours, flash = times["ours"].p50, times["flash"].p50
            table.append(
                (f"{len_kv}", f"{work / ours:.1f}", f"{work / flash:.1f}", f"{flash / ours:.2f}")
            )
        title = f"WarpAttention's: 4 x {len_q} queries, 32 heads, D={dim}, bf16, TFLOP/s"
        print_table(title, ("keys", "gear 2", "sdpa flash", "ours is faster by"), table)


def bench_dkernel(report: Report, rounds: int) -> None:
    """Time dkernel's shapes: blocks of 64, 512 local tokens, stride 16, 1k to 64k tokens."""
    table = []
    for length in (2**power for power in range(10, 17)):
        q, k, v = torch.randn(3, 4, length, 16, 128, device="cuda", dtype=BF16)
        rule = jitattn.LocalStride(64, 8, 16)
        calls: dict[str, Callable[[int], Any]] = {
            "pattern": _ours((q, k, v), mask=rule),
            "causal": _ours((q, k, v), mask=jitattn.Causal()),
            "flash": _flash(q, k, v, causal=True),
        }
        times = kernel_times(calls, sets=1, rounds=rounds)
        for name, spread in times.items():
            report.add("dkernel", f"B4 {length} H16 D128", name, "kernel_us", spread)
        ours, dense, flash = (times[name].p50 for name in ("pattern", "causal", "flash"))
        table.append(
            (f"{length}", f"{ours:.0f}", f"{dense:.0f}", f"{flash:.0f}", f"{flash / ours:.2f}")
        )
    title = "dkernel's: 4 sequences, 16 heads, D=128, blocks of 64, 8 local, stride 16, bf16, us"
    print_table(title, ("tokens", "pattern", "our causal", "sdpa flash", "over flash"), table)


def bench_cosine(report: Report, rounds: int) -> None:
    """Time cosine attention against plain PyTorch and our softmax kernel, forward."""
    for dtype, kind in itertools.product(
        (torch.float16, torch.float32), ("full", "causal", "25 % masked")
    ):
        table = []
        for length in (128, 256, 512, 1024, 2048, 4096, 8192):
            q, k, v = torch.randn(3, 4, 8, length, 64, device="cuda", dtype=dtype)
            keep = torch.rand(4, length, device="cuda") > 0.25
            mask: Any = {
                "full": jitattn.Full(),
                "causal": jitattn.Causal(),
                "25 % masked": jitattn.KeyPadding(keep),
            }[kind]
            given = {"mask": mask, "scale": 10.0, "layout": "bhsd"}
            units = jitattn.l2norm(q), jitattn.l2norm(k)
            done = jitattn.L2Norm(normalize=False)
            calls: dict[str, Callable[[int], Any]] = {
                "ours": _ours((q, k, v), qk_norm=jitattn.L2Norm(), **given),
                "units": _ours((*units, v), qk_norm=done, **given),
                "softmax": _ours((*units, v), **given),
            }
            if 4 * 8 * length**2 * 8 <= _LARGEST_PLAIN:
                plain_call = plain_cosine(length, kind, keep)
                calls["plain"] = _of_tensors(plain_call, (q, k, v))
            times = kernel_times(calls, sets=1, rounds=rounds)
            for name, spread in times.items():
                report.add(
                    "cosine", f"B4 {length} H8 D64 {dtype} {kind}", name, "kernel_us", spread
                )
            ours = times["ours"].p50
            plain = times["plain"].p50 if "plain" in times else float("nan")
            table.append(
                (
                    f"{length}",
                    f"{ours:.1f}",
                    f"{plain:.0f}",
                    f"{plain / ours:.1f}",
                    f"{times['units'].p50:.1f}",
                    f"{times['softmax'].p50 / times['units'].p50:.2f}",
                )
            )
        title = f"Cosine: 4 x 8 heads, D=64, {str(dtype).removeprefix('torch.')}, {kind}, us"
        columns = ("tokens", "ours", "plain", "over plain", "units given", "over our softmax")
        print_table(title, columns, table)


def _ours(qkv: tuple[torch.Tensor, ...], **given: Any) -> Callable[[int], Any]:
    return lambda _: jitattn.attention(*qkv, **given)


def _of_tensors(
    function: Callable[..., Any], tensors: tuple[torch.Tensor, ...]
) -> Callable[[int], Any]:
    return lambda _: function(*tensors)


def plain_cosine(length: int, kind: str, keep: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Return cosine attention in plain PyTorch, with a precomputed mask."""
    hidden = None
    if kind == "causal":
        hidden = torch.ones(length, length, device=keep.device, dtype=torch.bool).triu(1)
    elif kind != "full":
        hidden = ~keep[:, None, None, :]

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        unit_q, unit_k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
        scores = unit_q @ unit_k.transpose(2, 3) * 10.0
        if hidden is not None:
            scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        return scores.softmax(dim=-1) @ v

    return call
