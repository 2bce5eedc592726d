"""Compile every kernel of a grid in parallel, before the tests ask for them one by one.

NVRTC holds a lock, so the work is spread over processes. They write to the shared cache directory
and the tests read from it; with the cache off this would do nothing, and is skipped.
"""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

from jitattn.jit.enums import RowClass
from jitattn.jit.spec import KernelSpec
from jitattn.problem import Call, Runtime, parse
from jitattn.tiles import fwd_spec

from .grids import Case
from .inputs import call_arguments, poisoned


def row_class(runtime: Runtime) -> RowClass:
    """The class of a call's rows after GQA packing."""
    group = runtime.heads_q // runtime.heads_kv if runtime.heads_kv else 1
    rows = runtime.len_q * group
    return next((c for c in (RowClass.ROWS16, RowClass.ROWS64) if rows <= c), RowClass.MANY)


def specs_of(cases: Iterable[Case], arch: str) -> list[KernelSpec]:
    """The distinct kernels that the cases need on `arch`, merges included."""
    specs: dict[KernelSpec, None] = {}
    for case in cases:
        sizes = {
            "q": (case.len_q, case.heads_q, case.head_dim, case.dtype),
            "k": (case.len_kv, case.heads_kv, case.head_dim, case.dtype),
            "v": (case.len_kv, case.heads_kv, case.head_dim_v, case.dtype),
        }
        q, k, v = (
            poisoned(
                name, case, length=length, heads=heads, dim=dim, dtype=dtype, device="cpu"
            ).tensor
            for name, (length, heads, dim, dtype) in sizes.items()
        )
        given = {"gear": None, "out": None, "q_seqs": None, "kv_seqs": None, "return_lse": True}
        problem, runtime = parse(q, k, v, Call(**{**given, **call_arguments(case)}))
        specs[fwd_spec(problem, arch, row_class(runtime))] = None
    return list(specs)


def compile_all(specs: Iterable[KernelSpec], workers: int | None = None) -> dict[str, str]:
    """Compile specs into the cache; returns the errors by spec (a test meets them again)."""
    specs = list(specs)
    if not specs or os.environ.get("JITATTN_CACHE", "rw") != "rw":
        return {}
    workers = workers or min(len(specs), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=workers, mp_context=context) as pool:
        errors = list(pool.map(_compile_one, specs, chunksize=1))
    return {spec.to_key(): error for spec, error in zip(specs, errors, strict=True) if error}


def _compile_one(spec: KernelSpec) -> str:
    from jitattn.errors import JitAttnError
    from jitattn.jit.build import build

    try:
        build(spec)
    except JitAttnError as error:
        return str(error)
    return ""
