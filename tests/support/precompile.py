"""Compiles the kernels of tests in parallel, before the tests need them one by one.

The kernels go to the disk cache, and the tests read them there. Of the processes that share a run
(pytest -n), one compiles, and the others wait for it.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from filelock import FileLock

from jitattn.cache.entry import sha256
from jitattn.jit.pool import build_all
from jitattn.kernels.fwd import fwd_spec
from jitattn.kernels.fwd_sm90 import FwdSm90Spec
from jitattn.request.layouts import parse
from jitattn.request.problem import Call, Runtime
from jitattn.run.execute import has_wgmma
from jitattn.spec.enums import Access, MaskKind, RowClass, SeqLayout
from jitattn.spec.kernel_spec import KernelSpec, Problem
from jitattn.values.gears import resolve_numerics
from jitattn.values.tensors import DTYPES

from .grids import Case
from .inputs import call_arguments, poisoned

#: Compiles specs and returns the errors.
CompileOnce = Callable[[Sequence[KernelSpec]], list[str]]


def row_class(runtime: Runtime) -> RowClass:
    """Return the row class of a call after GQA packing."""
    group = runtime.heads_q // runtime.heads_kv if runtime.heads_kv else 1
    rows = runtime.len_q * group
    return next((c for c in (RowClass.ROWS16, RowClass.ROWS64) if rows <= c), RowClass.MANY)


def kernels_of(problem: Problem, arch: str, rows: RowClass) -> list[KernelSpec]:
    """Return the forward kernels that calls of a row class can take."""
    specs: list[KernelSpec] = [fwd_spec(problem, arch, rows)]
    if has_wgmma(arch):
        specs += FwdSm90Spec.of_calls(problem, None, arch, [rows])
    return specs


def specs_of(cases: Iterable[Case], arch: str) -> list[KernelSpec]:
    """Return the distinct kernels of the cases on `arch`, merge kernels included."""
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
        specs |= dict.fromkeys(kernels_of(problem, arch, row_class(runtime)))
    return list(specs)


def forward_specs(
    kinds: Iterable[tuple[torch.dtype, int]],
    layouts: Iterable[tuple[SeqLayout, SeqLayout]],
    arch: str,
) -> list[KernelSpec]:
    """Return the forward kernels of dtypes with head dims and of (q, kv) layouts, full and causal.

    Every row class has one.
    """
    masks = (MaskKind.FULL, MaskKind.CAUSAL)
    specs: list[KernelSpec] = []
    for (dtype, dim), mask, (q, kv), rows in itertools.product(kinds, masks, layouts, RowClass):
        problem = Problem(
            dtype=DTYPES[dtype],
            out_dtype=DTYPES[dtype],
            head_dim=dim,
            head_dim_v=dim,
            mask=mask,
            numerics=resolve_numerics(None, DTYPES[dtype]),
            q_layout=q,
            kv_layout=kv,
            access=Access.VEC16 if dim * 2 % 16 == 0 else Access.ELEMENT,
        )
        specs += kernels_of(problem, arch, rows)
    return specs


def compile_once(specs: Sequence[KernelSpec], shared: Path) -> list[str]:
    """Compile specs into the cache; return the errors. `shared` is a folder of this run."""
    if os.environ.get("JITATTN_CACHE", "rw") != "rw":
        return []
    name = sha256("\n".join(sorted(spec.to_key() for spec in specs)).encode())[:16]
    done = shared / f"compiled-{name}"
    with FileLock(f"{done}.lock"):
        if not done.exists():
            errors = [outcome.error for outcome in build_all(specs) if outcome.error]
            done.write_text("\n".join(errors))
        return done.read_text().splitlines()
