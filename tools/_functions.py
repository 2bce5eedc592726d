"""Benchmark of score and mask functions against FlexAttention under torch.compile.

Calls are timed eagerly and take turns; a second figure of each is triton's, alone. FlexAttention's
block masks are made beforehand, ours by the first call.
"""

from __future__ import annotations

import functools
import statistics
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from _table import print_table, say
from _timing import Spread, spread

import jitattn
from jitattn import MaskMod
from jitattn.compat import flex_attention as ours

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from _sequences import Report

_HEADS: Final = 16
#: Sequences by length: 64k rows of a head in all.
_LENGTHS: Final = {4096: 4, 16384: 1}
_WINDOW: Final = 1024
_DOCUMENTS: Final = 16


class Case(NamedTuple):
    """A function of scores, one of masks, and our built-in that says the same, if there is one."""

    score: Callable[..., Any] | None = None
    mask: Callable[..., Any] | None = None
    built_in: dict[str, Any] | None = None


def cases(batch: int, length: int) -> dict[str, Case]:
    """Return functions of FlexAttention's documentation and of attention-gym's kind."""
    device = torch.device("cuda")
    slopes = torch.exp2(-torch.arange(1, _HEADS + 1, device=device) * 8.0 / _HEADS)
    table = torch.randn(_HEADS, 2 * length - 1, device=device)
    ids = torch.arange(length, device=device, dtype=torch.int32).expand(batch, length)
    ids = (ids // -(-length // _DOCUMENTS)).contiguous()
    prefix = torch.full((batch,), length // 3, device=device, dtype=torch.int32)
    width, reach = 64 if length < 2**14 else 128, 6

    def natten(b: Any, h: Any, q: Any, k: Any) -> Any:
        x, y = (q // width).clamp(reach, length // width - 1 - reach), q % width
        y = y.clamp(reach, width - 1 - reach)
        return ((x - k // width).abs() <= reach) & ((y - k % width).abs() <= reach)

    return {
        "none": Case(built_in={}),
        "causal": Case(mask=lambda b, h, q, k: q >= k, built_in={"mask": jitattn.Causal()}),
        "window": Case(
            mask=lambda b, h, q, k: (q >= k) & (q - k <= _WINDOW),
            built_in={"mask": jitattn.Window(_WINDOW, 0)},
        ),
        "prefix": Case(mask=lambda b, h, q, k: (k < prefix[b]) | (q >= k)),
        "documents": Case(mask=lambda b, h, q, k: ids[b, q] == ids[b, k]),
        "causal documents": Case(mask=lambda b, h, q, k: (ids[b, q] == ids[b, k]) & (q >= k)),
        "ALiBi": Case(
            lambda s, b, h, q, k: s + (k - q) * slopes[h], built_in={"alibi_slopes": slopes}
        ),
        "tanh cap": Case(
            lambda s, b, h, q, k: 20.0 * torch.tanh(s / 20.0), built_in={"softcap": 20.0}
        ),
        "relative": Case(lambda s, b, h, q, k: s + (q - k)),
        "table": Case(lambda s, b, h, q, k: s + table[h, k - q + length - 1]),
        "checkerboard": Case(lambda s, b, h, q, k: torch.where((k - q).abs() % 2 == 1, s * 0.5, s)),
        "NATTEN": Case(mask=natten),
    }


def bench_functions(report: Report, rounds: int, *, names: str = "", quick: bool = False) -> None:
    """Report forward and backward times and ratios.

    `names`: those of `cases`, with commas; empty: all. `quick`: D=128 and 4k tokens alone.
    """
    lengths = {4096: _LENGTHS[4096]} if quick else _LENGTHS
    for length, batch in lengths.items():
        for dim in (128,) if quick else (64, 128):
            _bench(report, rounds, names.split(",") if names else [], batch, length, dim)
    _bench_blocks(report, rounds)


def _bench(
    report: Report, rounds: int, names: list[str], batch: int, length: int, dim: int
) -> None:
    from torch.nn.attention.flex_attention import flex_attention

    shape = (batch, _HEADS, length, dim)
    qkv = [torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    leaves = [x.requires_grad_() for x in qkv]
    d_out = torch.randn_like(qkv[0])
    tables: dict[str, list[tuple[str, ...]]] = {"forward": [], "backward": [], "built-in": []}
    for name, case in cases(batch, length).items():
        if names and name not in names:
            continue
        torch._dynamo.reset()  # otherwise its limit of recompiles is reached
        try:
            flex = _compiled(flex_attention, case, batch, length)
            flex(*leaves)
        except Exception as error:  # noqa: BLE001 - any of inductor's: the line says that it failed
            say(f"FlexAttention, {name}: {str(error).strip().splitlines()[0][:100]}")
            flex = None
        given = {} if case.score is None else {"score_mod": case.score}
        mask = {} if case.mask is None else {"mask": MaskMod(case.mask)}
        calls = {"jitattn": _attend(given | mask)}
        if flex is not None:
            calls["flex"] = flex
        if case.built_in is not None:
            calls["built-in"] = _attend(case.built_in)
        where = f"{batch} x {length} H{_HEADS} D{dim} {name}"
        found = {}
        for part in ("forward", "backward"):
            timed = _timed(calls, leaves, d_out, rounds, backward=part == "backward")
            for provider, (in_turns, alone) in timed.items():
                report.add("functions", f"{where} {part}", provider, "kernel_us", in_turns)
                report.add("functions", f"{where} {part} alone", provider, "kernel_us", alone)
            found[part] = timed
            tables[part].append((name, *_columns(timed)))
        if "built-in" in calls:
            shares = (*_shares(found["forward"]), *_shares(found["backward"]))
            tables["built-in"].append((name, *shares))
    heads = ("function", "ours, us", "flex, us", "faster by", "alone")
    title = f"{batch} x {length}, {_HEADS} heads, D={dim}, bf16"
    for part in ("forward", "backward"):
        print_table(f"{title}, {part}", heads, tables[part])
    parts = ("function", "forward", "alone", "backward", "alone")
    print_table(f"{title}, share of our built-in's speed", parts, tables["built-in"])


def _attend(given: dict[str, Any]) -> Callable[..., torch.Tensor]:
    return lambda *qkv: jitattn.attention(*qkv, layout="bhsd", **given)


def _compiled(
    flex_attention: Callable[..., Any], case: Case, batch: int, length: int
) -> Callable[..., torch.Tensor]:
    from torch.nn.attention.flex_attention import create_block_mask

    blocks = None
    if case.mask is not None:
        make = torch.compile(create_block_mask)
        blocks = make(case.mask, batch, None, length, length, device="cuda")
    flex = torch.compile(flex_attention, dynamic=False)
    return lambda *qkv: flex(*qkv, score_mod=case.score, block_mask=blocks)


def _timed(
    calls: dict[str, Callable[..., torch.Tensor]],
    leaves: list[torch.Tensor],
    d_out: torch.Tensor,
    rounds: int,
    *,
    backward: bool,
) -> dict[str, tuple[Spread, Spread]]:
    """Return times of each call, in turns and alone, in microseconds."""
    from triton.testing import do_bench

    def timed(call: Callable[..., torch.Tensor]) -> Callable[[], object]:
        if not backward:
            return lambda: call(*(x.detach() for x in leaves))
        with torch.enable_grad():
            out = call(*leaves)
        return lambda: torch.autograd.grad(out, leaves, d_out, retain_graph=True)

    ready = {name: timed(call) for name, call in calls.items()}
    samples = dict(_in_turns(ready, rounds))
    alone = {name: float(do_bench(call, warmup=10, rep=40)) * 1e3 for name, call in ready.items()}
    return {name: (spread(samples[name]), spread([alone[name]])) for name in ready}


def _in_turns(
    calls: dict[str, Callable[[], object]], rounds: int
) -> Iterator[tuple[str, list[float]]]:
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds + 1):
        for name, call in calls.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            call()  # the caches of this call
            start.record()
            for _ in range(3):
                call()
            end.record()
            torch.cuda.synchronize()
            samples[name].append(start.elapsed_time(end) * 1e3 / 3)
    yield from ((name, times[1:]) for name, times in samples.items())  # the first is warm-up


def _columns(timed: dict[str, tuple[Spread, Spread]]) -> tuple[str, ...]:
    mine = timed["jitattn"]
    if "flex" not in timed:
        return f"{mine[0].p50:.0f}", "failed", "-", "-"
    theirs = timed["flex"]
    ratios = (f"{theirs[idx].p50 / mine[idx].p50:.2f}" for idx in range(2))
    return f"{mine[0].p50:.0f}", f"{theirs[0].p50:.0f}", *ratios


def _shares(timed: dict[str, tuple[Spread, Spread]]) -> tuple[str, str]:
    first, second = (timed["built-in"][idx].p50 / timed["jitattn"][idx].p50 for idx in range(2))
    return f"{first:.2f}", f"{second:.2f}"


def _bench_blocks(report: Report, rounds: int) -> None:
    """Time the making of blocks of 16k x 16k pairs, of one head."""
    from torch.nn.attention.flex_attention import create_block_mask

    from jitattn.request.mask_blocks import Sizes, simplified
    from jitattn.run import function_lists
    from jitattn.values.functions import traced
    from jitattn.values.masks import FunctionBlocks

    length, device = 16384, torch.device("cuda", 0)
    table = []
    for name, case in cases(1, length).items():
        if case.mask is None:
            continue
        torch._dynamo.reset()
        rule, _ = simplified(traced(None, MaskMod(case.mask)), Sizes(1, 1, length, length, True))
        sizes, make = (1, 1, length, length), torch.compile(create_block_mask)
        calls: dict[str, Callable[[], object]] = {
            "torch, compiled": functools.partial(make, case.mask, *sizes, device=device),
            "create_block_mask": functools.partial(
                ours.create_block_mask, case.mask, *sizes, device=device
            ),
        }
        if isinstance(rule, FunctionBlocks):
            stream = torch.cuda.current_stream().cuda_stream
            calls["lists"] = functools.partial(function_lists._made, rule, 1, 128, device, stream)
        try:
            times = {name: spread(found) for name, found in _in_turns(calls, rounds)}
        except Exception as error:  # noqa: BLE001 - of inductor's
            say(f"create_block_mask, {name}: {str(error).strip().splitlines()[0][:100]}")
            continue
        for provider, found in times.items():
            report.add("functions", f"blocks of {length}, {name}", provider, "us", found)
        texts = [f"{times[one].p50:.0f}" if one in times else "closed" for one in ("lists", *calls)]
        ratio = times["torch, compiled"].p50 / times["create_block_mask"].p50
        table.append((name, texts[0], texts[2], texts[1], f"{ratio:.1f}"))
    heads = ("mask", "lists, us", "create_block_mask, us", "torch's compiled, us", "faster by")
    print_table(f"Blocks of {length} x {length} pairs, one head", heads, table)
    ratios = [float(row[-1]) for row in table]
    if ratios:
        say(f"create_block_mask: {statistics.median(ratios):.1f} times as fast, median")
