"""Correctness, speed and overlap of context-parallel attention, as one of several ranks."""

from __future__ import annotations

import contextlib
import time
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from _parallel_model import Machine, Work, predict
from _table import print_table

import jitattn
from jitattn.distributed import context_parallel_attention, heads, plan, ring, shard
from jitattn.distributed.transfers import NOTHING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import Tensor

    from jitattn.distributed import Plan

METHODS: Final = ("ring", "allgather", "ulysses")
#: Lengths at which results are compared with one GPU's.
_COMPARED: Final = {"cuda": (8192, 32768 + 13), "cpu": (64, 77)}
_FEWEST_CALLS: Final = 2


def _inputs(work: Work, device: str, seed: int = 0) -> list[Tensor]:
    """Return q, k, v and the gradient of out of the whole sequence, alike on every rank."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    sizes = (work.heads_q, work.heads_kv, work.heads_kv, work.heads_q)
    return [
        torch.randn(
            1, work.length, size, work.head_dim, device=device, dtype=dtype, generator=generator
        )
        for size in sizes
    ]


def _differentiated(call: Callable[..., Tensor], inputs: Sequence[Tensor], d_out: Tensor) -> Any:
    """Return out and the gradients."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = call(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


def _is_first() -> bool:
    return dist.get_rank() == 0


def _print(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    if _is_first():
        print_table(title, columns, rows)


# ---- correct


def bench_correct(device: str, works: Sequence[Work], sizes: tuple[str, int]) -> None:
    """Compare every method with one GPU, and two runs with each other."""
    del sizes
    rows = []
    first = works[0]
    for length in _COMPARED[device]:
        for window in sorted({work.window for work in works}, key=lambda one: one or 0):
            keep = max(work.keep_first for work in works) if window else 0
            work = Work(length, first.heads_q, first.heads_kv, first.head_dim, window, keep)
            whole = _inputs(work, device)
            wanted = _differentiated(
                lambda q, k, v, mask=work.mask: jitattn.attention(q, k, v, mask=mask),
                whole[:3],
                whole[3],
            )
            for layout in ("contiguous", "zigzag", "striped"):
                own = plan(work.mask, length, layout=layout)
                rows += [_compared(work, own, method, whole, wanted) for method in METHODS]
            del whole, wanted
    columns = ("tokens", "mask", "layout", "method", "out", "dq", "dk", "dv", "same bits")
    _print(f"largest error on {dist.get_world_size()} ranks, relative to the largest value",
           columns, rows)  # fmt: skip


def _compared(
    work: Work, own: Plan, method: str, whole: Sequence[Tensor], wanted: Sequence[Tensor]
) -> tuple[object, ...]:
    mine = [shard(x, own) for x in whole]

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found: Tensor = context_parallel_attention(
            q, k, v, mask=work.mask, plan=own, method=method, deterministic=True
        )
        return found

    runs = [_differentiated(call, mine[:3], mine[3]) for _ in range(2)]
    same = all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    errors = torch.tensor(
        [
            float((a.float() - shard(b, own).float()).abs().max()) / float(b.float().abs().max())
            for a, b in zip(runs[0], wanted, strict=True)
        ]
        + [0.0 if same else 1.0],
        device=whole[0].device,
    )
    dist.all_reduce(errors, op=dist.ReduceOp.MAX)
    *found, differs = errors.tolist()
    shown = [f"{one:.1e}" for one in found]
    return work.length, _mask(work), own.layout, method, *shown, "no" if differs else "yes"


def _mask(work: Work) -> str:
    return "causal" if work.window is None else f"window {work.window}"


# ---- speed


def seconds_of(call: Callable[[], object], device: str, budget: float) -> float:
    """Return the median seconds of a call on the slowest rank."""
    call()
    samples: list[float] = []
    begin = time.monotonic()
    while True:
        _settle(device)
        dist.barrier()
        start = time.perf_counter()
        call()
        _settle(device)
        samples.append(time.perf_counter() - start)
        left = torch.tensor(
            [1.0 if len(samples) < _FEWEST_CALLS or time.monotonic() - begin < budget else 0.0],
            device=device,
        )
        dist.broadcast(left, 0)
        if not left.item():
            break
    figure = torch.tensor([sorted(samples)[len(samples) // 2]], device=device, dtype=torch.float64)
    dist.all_reduce(figure, op=dist.ReduceOp.MAX)
    return float(figure)


def _settle(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _peak(device: str, call: Callable[[], object]) -> float:
    """Return the GiB that a call takes beside what is there before it."""
    if device != "cuda":
        return 0.0
    _settle(device)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call()
    _settle(device)
    return (torch.cuda.max_memory_allocated() - before) / 2**30


def bench_speed(device: str, works: Sequence[Work], machine: Machine, budget: float) -> None:
    """Time one GPU, every method, and torch's ring attention."""
    ranks = dist.get_world_size()
    for work in works:
        for backward in (False, True):
            rows: list[tuple[object, ...]] = []
            one = _row_of_one(work, device, backward, budget, machine, rows)
            for method in METHODS:
                layout = "contiguous" if method == "ulysses" else "auto"
                own = plan(work.mask, work.length, layout=layout)  # type: ignore[arg-type]
                call = _timed(work, own, method, device, backward)
                seconds, peak = seconds_of(call, device, budget), _peak(device, call)
                predicted = predict(work, ranks, method, machine, backward=backward)
                rows.append((
                    f"{method}, {own.layout}", f"{seconds * 1e3:.2f}",
                    f"{work.length / seconds / 1e3:.0f}", f"{one / seconds:.2f}",
                    f"{one / seconds / ranks:.3f}", f"{predicted.efficiency:.3f}", f"{peak:.2f}",
                ))  # fmt: skip
                del call
            _add_torch(work, device, backward, budget, one, rows)
            title = f"{work.length} tokens, {_mask(work)}, {'both' if backward else 'forward'}"
            columns = ("on", "ms", "ktok/s", "times one", "efficiency", "predicted", "GiB")
            _print(f"{title}, {ranks} ranks", columns, rows)


def _row_of_one(
    work: Work, device: str, backward: bool, budget: float, machine: Machine,
    rows: list[tuple[object, ...]],
) -> float:  # fmt: skip
    """Time one GPU; print its rate, which the model takes."""
    q, k, v, d_out = _inputs(work, device)

    def call() -> object:
        if not backward:
            with torch.no_grad():
                return jitattn.attention(q, k, v, mask=work.mask)
        return _differentiated(
            lambda q, k, v: jitattn.attention(q, k, v, mask=work.mask), (q, k, v), d_out
        )

    seconds, peak = seconds_of(call, device, budget), _peak(device, call)
    flops = work.pairs * work.heads_q * work.head_dim * (14 if backward else 4)
    rows.append((
        f"one ({flops / seconds * 1e-12:.0f} TFLOP/s)", f"{seconds * 1e3:.2f}",
        f"{work.length / seconds / 1e3:.0f}", "1.00", "1.000", "", f"{peak:.2f}",
    ))  # fmt: skip
    del machine
    return seconds


def _timed(work: Work, own: Plan, method: str, device: str, backward: bool) -> Callable[[], object]:
    """Return a call of this rank's shards."""
    whole = _inputs(work, device)
    q, k, v, d_out = (shard(x, own) for x in whole)
    del whole
    given: dict[str, Any] = {"mask": work.mask, "plan": own, "method": method}

    def call() -> object:
        if not backward:
            with torch.no_grad():
                return context_parallel_attention(q, k, v, **given)
        return _differentiated(
            lambda q, k, v: context_parallel_attention(q, k, v, **given), (q, k, v), d_out
        )

    return call


def _add_torch(
    work: Work, device: str, backward: bool, budget: float, one: float,
    rows: list[tuple[object, ...]],
) -> None:  # fmt: skip
    """Time torch's own ring attention with SDPA, and with ours under it; causal masks only."""
    if work.window is not None or device != "cuda":
        return
    import jitattn.integrations.sdpa as sdpa

    for name, context in (("torch's ring", contextlib.nullcontext()), ("ours under torch's",
                          sdpa.activated())):  # fmt: skip
        try:
            with context:
                seconds = _torch_seconds(work, device, backward, budget)
                counts = sdpa.counts() if name.startswith("ours") else {}
        except (RuntimeError, NotImplementedError, AssertionError, TypeError) as error:
            first = str(error).splitlines()[:1]
            rows.append(
                (f"{name}: {type(error).__name__} {first}"[:70], "-", "-", "-", "-", "", "")
            )
            continue
        served = f" {counts['jitattn']} of {counts['jitattn'] + counts['torch']}" if counts else ""
        rows.append((
            f"{name}{served}", f"{seconds * 1e3:.2f}", f"{work.length / seconds / 1e3:.0f}",
            f"{one / seconds:.2f}", f"{one / seconds / dist.get_world_size():.3f}", "", "",
        ))  # fmt: skip


def _torch_seconds(work: Work, device: str, backward: bool, budget: float) -> float:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.functional import scaled_dot_product_attention

    mesh = init_device_mesh(device, (dist.get_world_size(),))
    buffers = [x.transpose(1, 2).contiguous() for x in _inputs(work, device)]
    with (
        context_parallel(mesh, buffers=buffers, buffer_seq_dims=[2] * 4),
        sdpa_kernel(SDPBackend.FLASH_ATTENTION),
    ):
        q, k, v, d_out = buffers

        def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def call() -> object:
            if not backward:
                with torch.no_grad():
                    return attend(q, k, v)
            return _differentiated(attend, (q, k, v), d_out)

        return seconds_of(call, device, budget)


# ---- overlap


def bench_overlap(device: str, works: Sequence[Work], budget: float) -> None:
    """Time computing alone, transfers alone, and both."""
    rows = []
    for work in works:
        for backward in (False, True):
            for method in METHODS:
                layout = "contiguous" if method == "ulysses" else "auto"
                own = plan(work.mask, work.length, layout=layout)  # type: ignore[arg-type]
                call = _timed(work, own, method, device, backward)
                both = seconds_of(call, device, budget / 2)
                with _without_transfers():
                    computing = seconds_of(call, device, budget / 2)
                with _without_computing():
                    moving = seconds_of(call, device, budget / 2)
                hidden = 1 - max(0.0, both - computing) / moving if moving else 1.0
                rows.append((
                    work.length, _mask(work), "both" if backward else "forward", method,
                    f"{computing * 1e3:.2f}", f"{moving * 1e3:.2f}", f"{both * 1e3:.2f}",
                    f"{max(0.0, hidden):.2f}",
                ))  # fmt: skip
                del call
    columns = ("tokens", "mask", "pass", "method", "compute ms", "transfer ms", "both ms", "hidden")
    _print("transfers behind computing", columns, rows)


@contextlib.contextmanager
def replaced(module: object, **parts: object) -> Iterator[None]:
    """Put other parts into a module for a while."""
    before = {name: getattr(module, name) for name in parts}
    for name, part in parts.items():
        setattr(module, name, part)
    try:
        yield
    finally:
        for name, part in before.items():
            setattr(module, name, part)


@contextlib.contextmanager
def _without_transfers() -> Iterator[None]:
    """Let nothing travel: what should have arrived is whatever the memory holds."""

    def post(*_: object) -> object:
        return NOTHING

    with replaced(ring, post=post), replaced(heads, post=post):
        yield


@contextlib.contextmanager
def _without_computing() -> Iterator[None]:
    """Let nothing be computed but what travels."""

    def compute(*_: object) -> None:
        return None

    def differentiate(inputs: tuple[Tensor, ...], *_: object) -> tuple[Tensor, Tensor]:
        return inputs[1].float(), inputs[2].float()

    from jitattn.distributed import attention as front

    def whole_attention(
        q: Tensor, k: Tensor, v: Tensor, options: object, out_dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        del k, options
        out = q[..., : v.shape[3]].to(out_dtype)
        return out, q[..., 0].transpose(1, 2).float()

    with (
        replaced(ring, compute=compute, differentiate=differentiate),
        replaced(front, whole_attention=whole_attention),
    ):
        yield
