"""Which kernels exist for a set of choices, and building them side by side. Needs no GPU."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import time
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jitattn.errors import JitAttnError
from jitattn.gears import resolve_numerics
from jitattn.jit.build import build, stats
from jitattn.jit.spec import (
    Access,
    Dtype,
    KernelSpec,
    MaskKind,
    MergeSpec,
    Problem,
    RowClass,
)
from jitattn.tiles import fwd_spec

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one kernel."""

    spec: KernelSpec
    origin: str  #: "compiled", "disk", or "failed"
    seconds: float
    bytes: int
    error: str


def forward_specs(
    archs: Iterable[str],
    dtypes: Iterable[Dtype],
    head_dims: Iterable[tuple[int, int]],
    masks: Iterable[MaskKind],
) -> list[KernelSpec]:
    """Every kernel that calls with these properties can need: all row classes, and the merges.

    Parameters
    ----------
    head_dims : iterable of (head_dim, head_dim_v)

    Raises
    ------
    UnsupportedError
        An architecture is older than sm_80.
    """
    specs: dict[KernelSpec, None] = {}
    choices = itertools.product(archs, dtypes, head_dims, masks)
    for arch, dtype, (head_dim, head_dim_v), mask in choices:
        aligned = (head_dim * dtype.bytes) % 16 == 0 == (head_dim_v * dtype.bytes) % 16
        problem = Problem(
            dtype=dtype,
            out_dtype=dtype,
            head_dim=head_dim,
            head_dim_v=head_dim_v,
            mask=mask,
            numerics=resolve_numerics(None, dtype),
            access=Access.VEC16 if aligned else Access.ELEMENT,
        )
        for rows in RowClass:
            specs[fwd_spec(problem, arch, rows)] = None
        specs[MergeSpec(out_dtype=dtype, head_dim_v=head_dim_v, arch=arch)] = None
    return list(specs)


def build_all(specs: Sequence[KernelSpec], jobs: int | None = None) -> Iterator[Outcome]:
    """Build kernels in `jobs` processes, yielding outcomes as they come.

    Processes, not threads: NVRTC serialises much of a compile within a process.
    """
    jobs = min(jobs or os.cpu_count() or 1, len(specs))
    if jobs <= 1:
        yield from map(_build_one, specs)
        return
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(max_workers=jobs, mp_context=context)
    try:
        futures = {pool.submit(_build_one, spec): spec for spec in specs}
        for future in as_completed(futures):
            try:
                yield future.result()
            except BrokenExecutor:
                died = "a worker process died (out of memory?); try fewer with -j"
                yield Outcome(futures[future], "failed", 0.0, 0, died)
    finally:
        pool.shutdown(cancel_futures=True)


def _build_one(spec: KernelSpec) -> Outcome:
    start, compiled = time.perf_counter(), stats().compiled
    try:
        built = build(spec)
    except JitAttnError as error:
        return Outcome(spec, "failed", time.perf_counter() - start, 0, str(error))
    origin = "compiled" if stats().compiled > compiled else "disk"
    return Outcome(spec, origin, time.perf_counter() - start, len(built.cubin), "")
