"""Times, on one GPU, what a rank of a context-parallel call computes: its launches and merges.

Nothing travels: keys of other ranks are random numbers here. So the figure is the efficiency that
is left if all transfers are hidden, and it needs one GPU whatever the number of ranks.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import torch
from _parallel_bench import replaced
from _parallel_model import Work, layout_of
from _table import print_table
from _timing import Spread, spread

import jitattn
from jitattn.distributed import ring
from jitattn.distributed.blocks import Facts, blocks_of
from jitattn.distributed.options import Options
from jitattn.distributed.pieces import Span
from jitattn.distributed.ring import job_of, ring_attention
from jitattn.distributed.segments import count_of
from jitattn.distributed.transfers import NOTHING
from jitattn.values.rule_functions import Heads

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

_WORKS: Final = (Work(32768), Work(131072), Work(131072, window=4096, keep_first=4))
_RANKS: Final = (2, 4, 8)


def bench_parallel(report: Any, rounds: int) -> None:
    """Time ranks of rings and all-gathers beside the whole sequence."""
    rows = []
    for work in _WORKS:
        for backward in (False, True):
            name = f"{work.length} {work.mask} {'both' if backward else 'forward'}"
            whole = _times(_whole(work, backward), rounds)
            report.add("parallel", name, "one GPU", "call_us", whole)
            rows.append((name, "one GPU", f"{whole.p50 / 1e3:.2f}", ""))
            for ranks in _RANKS:
                for method in ("ring", "allgather"):
                    figures = max(
                        (_times(_rank(work, ranks, rank, method, backward), rounds)
                         for rank in {0, ranks - 1}),
                        key=lambda one: one.p50,
                    )  # fmt: skip
                    provider = f"{method} of {ranks}"
                    report.add("parallel", name, provider, "call_us", figures)
                    share = whole.p50 / figures.p50 / ranks
                    rows.append((name, provider, f"{figures.p50 / 1e3:.2f}", f"{share:.3f}"))
    columns = ("call", "what a rank computes", "ms", "efficiency")
    print_table("context parallelism without its transfers", columns, rows)


def _draw(rows: int, heads: int, work: Work) -> Tensor:
    return torch.randn(1, rows, heads, work.head_dim, device="cuda", dtype=torch.bfloat16)


def _passes(
    call: Callable[..., Tensor], tensors: tuple[Tensor, ...], backward: bool
) -> Callable[[], object]:
    """Return a call of a forward pass, or of both passes."""
    if not backward:
        return lambda: call(*tensors)
    leaves = [x.requires_grad_() for x in tensors]
    d_out = torch.randn_like(tensors[0])

    def both() -> object:
        with torch.enable_grad():
            return torch.autograd.grad(call(*leaves), leaves, d_out)

    return both


def _whole(work: Work, backward: bool) -> Callable[[], object]:
    heads = (work.heads_q, work.heads_kv, work.heads_kv)
    tensors = tuple(_draw(work.length, one, work) for one in heads)
    mask = work.mask
    return _passes(lambda q, k, v: jitattn.attention(q, k, v, mask=mask), tensors, backward)


def _rank(work: Work, ranks: int, rank: int, method: str, backward: bool) -> Callable[[], object]:
    """Return the call of a rank whose messages all arrive at once, with anything in them."""
    shards = layout_of(work, ranks)
    spans = (Span(0, work.length, 0, work.length),)
    options = Options(
        rule=work.mask, key_padding=None, function=None, scale=None, gear=None, softcap=None,
        relative_bias=None, alibi_slopes=None, sinks=None, score_mod=None, q_offset=None, kept=None,
        qk_norm=None, deterministic=False, num_splits=None, tile_rows=None,
        heads=Heads(work.heads_q, work.heads_kv), spans=spans, is_flat=False, q_seqs=None,
        kv_seqs=None,
    )  # fmt: skip
    facts = Facts(
        shards, shards, options.bounds, spans, False, False, options.follows_order, method
    )
    job = job_of(None, blocks_of(facts, rank), options, torch.bfloat16, rank)
    rows = count_of(shards[rank])
    heads = (work.heads_q, work.heads_kv, work.heads_kv)
    tensors = tuple(_draw(rows, one, work) for one in heads)
    return _passes(lambda q, k, v: ring_attention(q, k, v, job)[0], tensors, backward)


def _times(call: Callable[[], object], rounds: int) -> Spread:
    """Time a call, host and GPU together."""

    def post(*_: object) -> object:
        return NOTHING

    with replaced(ring, post=post):
        samples = []
        for _ in range(rounds + 1):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) * 1e6)
    return spread(samples[1:])
