"""Host time of the compatibility functions, against the core call that each makes."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from _doors_bench_cases import DoorCase, cases
from _doors_published_cases import published_cases, stubbed_published_core
from _table import print_table
from _timing import Spread, host_times_in_turns, spread

import jitattn
from jitattn.compat.flash_attn import (
    _functions,
    _kvcache,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: Allowed overhead of a compatibility function over the core, in microseconds, on a GPU.
BUDGET: Final = 10.0
_B, _L, _H, _D, _ROOM, _PAGE = 2, 64, 2, 64, 256, 16
#: Without a GPU: calls per figure, and number of figures.
_CALLS, _FIGURES = 50, 100
#: Frames by which a caller is deeper: about 114 of such fill a piece of Python's stack.
_DEPTHS: Final = (0, 23, 46, 69, 92)


class Report(Protocol):
    """Destination of figures."""

    def add(
        self, section: str, shape: str, provider: str, metric: str, figures: Spread
    ) -> None: ...


def flash_attn_calls(device: str) -> Iterator[DoorCase]:
    """Yield calls of the FlashAttention functions."""
    q, k, v = qkv = _drawn(3, device, _B, _L, _H, _D)
    causal, window = jitattn.Causal(), jitattn.Window(16, 0)
    packed = torch.stack(qkv, dim=2)
    kv = packed[:, :, 1:]
    attend: Any = jitattn.attention
    varlen: Any = flash_attn_varlen_func

    def call(name: str, door: Callable[[], Any], core: Callable[[], Any]) -> DoorCase:
        return DoorCase("flash_attn", name, door, core)

    yield call("plain", lambda: flash_attn_func(q, k, v), lambda: attend(q, k, v))
    yield call(
        "causal",
        lambda: flash_attn_func(q, k, v, causal=True),
        lambda: attend(q, k, v, mask=causal),
    )
    yield call(
        "window",
        lambda: flash_attn_func(q, k, v, causal=True, window_size=(16, 0)),
        lambda: attend(q, k, v, mask=window),
    )
    yield call(
        "qkv packed", lambda: flash_attn_qkvpacked_func(packed), lambda: attend(*packed.unbind(2))
    )
    yield call(
        "kv packed", lambda: flash_attn_kvpacked_func(q, kv), lambda: attend(q, *kv.unbind(2))
    )

    flat = [x.flatten(0, 1) for x in qkv]
    flat_packed = packed.flatten(0, 1)
    cu = torch.arange(0, _B * _L + 1, _L, dtype=torch.int32, device=device)
    cu_k = cu.clone()
    seqs, seqs_k = (jitattn.Ragged.from_cu_seqlens(x, _L) for x in (cu, cu_k))
    both: Any = {"q_seqs": seqs, "kv_seqs": seqs_k}
    yield call(
        "varlen",
        lambda: varlen(*flat, cu, cu_k, _L, _L, causal=True),
        lambda: attend(*flat, mask=causal, **both),
    )
    yield call(
        "varlen qkv packed",
        lambda: flash_attn_varlen_qkvpacked_func(flat_packed, cu, _L, causal=True),
        lambda: attend(*flat_packed.unbind(1), mask=causal, q_seqs=seqs, kv_seqs=seqs),
    )
    width = _ROOM // _PAGE
    pages = _drawn(2, device, _B * width, _PAGE, _H, _D)
    table = torch.arange(_B * width, dtype=torch.int32, device=device).reshape(_B, width)
    in_pages = jitattn.Paged.from_cu_seqlens(table, cu_k, _L)
    yield call(
        "varlen, pages",
        lambda: varlen(flat[0], *pages, cu, cu_k, _L, _L, causal=True, block_table=table),
        lambda: attend(flat[0], *pages, mask=causal, q_seqs=seqs, kv_seqs=in_pages),
    )
    yield from _cache_calls(device, pages, table, causal)


def _cache_calls(
    device: str, pages: Any, table: torch.Tensor, causal: jitattn.Causal
) -> Iterator[DoorCase]:
    caches = _drawn(2, device, _B, _ROOM, _H, _D)
    (q,), new = _drawn(1, device, _B, 1, _H, _D), _drawn(2, device, _B, 1, _H, _D)
    used = torch.full((_B,), 100, dtype=torch.int32, device=device)
    cos, sin = torch.rand(2, _ROOM, _D // 2, device=device)
    rotary = jitattn.Rotary(cos, sin, interleaved=False)
    own: dict[str, Any] = {"length": used, "mask": causal}
    attend: Any = jitattn.attention_with_kvcache
    door: Any = flash_attn_with_kvcache

    def decode(*given: Any, **named: Any) -> Any:
        return door(q, *given, cache_seqlens=used, causal=True, **named)

    def call(name: str, door: Callable[[], Any], core: Callable[[], Any]) -> DoorCase:
        return DoorCase("flash_attn", name, door, core)

    yield call("cache", lambda: decode(*caches), lambda: attend(q, *caches, **own))
    yield call(
        "cache, int length",
        lambda: door(q, *caches, cache_seqlens=100, causal=True),
        lambda: attend(q, *caches, length=100, mask=causal),
    )
    yield call(
        "cache, LSE",
        lambda: decode(*caches, return_softmax_lse=True),
        lambda: attend(q, *caches, **own, return_lse=True),
    )
    yield call(
        "cache, int length, LSE",
        lambda: door(q, *caches, cache_seqlens=100, causal=True, return_softmax_lse=True),
        lambda: attend(q, *caches, length=100, mask=causal, return_lse=True),
    )
    yield call(
        "cache, pages",
        lambda: decode(*pages, block_table=table),
        lambda: attend(q, *pages, **own, block_table=table),
    )
    yield call(
        "cache, appending", lambda: decode(*caches, *new), lambda: attend(q, *caches, *new, **own)
    )
    yield call(
        "cache, appending to pages",
        lambda: decode(*pages, *new, block_table=table),
        lambda: attend(q, *pages, *new, **own, block_table=table),
    )
    yield call(
        "cache, appending with rotary",
        lambda: decode(*caches, *new, cos, sin, rotary_interleaved=False),
        lambda: attend(q, *caches, *new, **own, rotary=rotary),
    )


def _drawn(count: int, device: str, *shape: int) -> Any:
    return [torch.randn(shape, device=device, dtype=torch.float16) for _ in range(count)]


@contextlib.contextmanager
def stubbed_core() -> Iterator[None]:
    """Stub the core below the FlashAttention functions, to time only their own overhead."""
    out, lse = torch.zeros(1), torch.zeros(1)

    def stub(*given: Any, return_lse: bool = False, **named: Any) -> Any:
        return (out, lse) if return_lse else out

    places: tuple[tuple[Any, str], ...] = (
        (_functions, "attention"),
        (_kvcache, "attention_with_kvcache"),
    )
    before = [getattr(module, name) for module, name in places]
    try:
        for module, name in places:
            setattr(module, name, stub)
        yield
    finally:
        for (module, name), function in zip(places, before, strict=True):
            setattr(module, name, function)


def python_calls(call: Callable[[], Any]) -> int:
    """Count the Python functions that a call enters, itself excluded."""
    count = 0

    def note(_frame: Any, event: str, _argument: Any) -> None:
        nonlocal count
        count += event == "call"

    call()
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return count - 1


def bench_doors(report: Report, rounds: int) -> None:
    """Time compatibility functions against the core; without a GPU, their own overhead."""
    if not torch.cuda.is_available():
        _bench_own_part(report)
        return
    table = []
    for one in (*flash_attn_calls("cuda"), *cases("cuda"), *published_cases("cuda")):
        times = _middle_times({"core": one.core, "door": one.call}, rounds)
        for name, found in times.items():
            report.add("doors", f"{one.door}: {one.name}", name, "host_us", found)
        core, door = times["core"].p50, times["door"].p50
        over = door - core
        table.append(
            (
                f"{one.door}: {one.name}",
                f"{core:.1f}",
                f"{door:.1f}",
                f"{over:.1f}",
                "" if over <= BUDGET else "over",
            )
        )
    columns = ("call", "core us", "door us", "door's own us", f"{BUDGET:.0f} us")
    print_table("host time of warm calls", columns, table)


def _middle_times(calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Spread]:
    """Time core and door at several depths of the stack; return those of the median difference.

    Python keeps frames in pieces of 16 KiB. Where a call begins near the end of one, a piece is
    mapped and unmapped at every call that reaches beyond it, which takes many microseconds: of the
    door or of the core or of both, by chance of how deep the caller is.
    """
    found = [_deeper(depth, calls, rounds) for depth in _DEPTHS]
    found.sort(key=lambda times: times["door"].p50 - times["core"].p50)
    return found[len(found) // 2]


def _deeper(depth: int, calls: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Spread]:
    if depth:
        return _deeper(depth - 1, calls, rounds)
    # In turns: what a drifting clock adds is no part of the difference.
    return host_times_in_turns(calls, rounds=rounds)


def _bench_own_part(report: Report) -> None:
    table = []
    with stubbed_core(), stubbed_published_core():
        for one in (*flash_attn_calls("cpu"), *published_cases("cpu")):
            figures = _own_times(one.call)
            report.add("doors", f"{one.door}: {one.name}", "own part", "host_us", figures)
            table.append(
                (f"{one.door}: {one.name}", f"{figures.p20:.1f}", str(python_calls(one.call)))
            )
    print_table(
        "the doors' own part: with the core stubbed",
        ("call", "us", "Python calls"),
        table,
    )


def _own_times(call: Callable[[], Any]) -> Spread:
    samples = []
    for _ in range(_FIGURES):
        start = time.perf_counter()
        for _ in range(_CALLS):
            call()
        samples.append((time.perf_counter() - start) / _CALLS * 1e6)
    return spread(samples)
