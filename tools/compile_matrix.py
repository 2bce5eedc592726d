"""The compile matrix: every row of the tile tables, compiled for its architecture. No GPU needed.

``python tools/compile_matrix.py`` compiles it and fails on an error or an unlisted spill;
`resource_report.py` prints its figures and tests/cpu/test_compile_matrix.py tests it.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _table import say

from jitattn.jit import compilers
from jitattn.kernels.bwd_tiles import bwd_spec, score_grad_spec, specs_of_backward
from jitattn.kernels.prepare_specs import HEAD_DIMS as DIMS_IN_8_BITS
from jitattn.kernels.prepare_specs import backward_in_halves, specs_for_gear, split_spec
from jitattn.kernels.tiles import fwd_spec
from jitattn.plan.choices import preset, specs_of
from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    RowClass,
    ScoreTarget,
    SeqLayout,
    Staging,
    Switch,
)
from jitattn.spec.kernel_spec import KernelSpec, MergeGradSpec, MergeSpec, Problem
from jitattn.values.gears import resolve_numerics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence

REPOSITORY: Final = Path(__file__).resolve().parents[1]
BUDGET_FILE: Final = REPOSITORY / "tests" / "data" / "resource_budget.json"

#: Architectures with a tile table of their own: the whole matrix.
TUNED: Final = ("sm_80", "sm_86", "sm_89", "sm_90")
#: Architectures that run untuned: the short matrix.
UNTUNED: Final = ("sm_87", "sm_100", "sm_120")

#: Head dims of real models; together with the largest of each tile row they are the matrix.
MODEL_DIMS: Final = (40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
ALL_DIMS: Final = tuple(range(16, 257, 16))
#: Where the sequences of q, and of k and v, lie, beside batched.
LAYOUTS: Final = (
    (SeqLayout.RAGGED, SeqLayout.RAGGED),
    (SeqLayout.BATCHED, SeqLayout.PAGED),
    (SeqLayout.RAGGED, SeqLayout.PAGED),
    (SeqLayout.BATCHED, SeqLayout.PAGED16),
)


#: Fields of optional inputs.
OPTIONAL: Final = (
    "bias", "relative_bias", "alibi", "softcap", "sinks", "key_padding", "dense", "dropout",
    "fixed_shift", "bias_staged", "dense_staged",
)  # fmt: skip
#: Masks, biases and the like: each alone, and two that meet in models.
FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"mask": MaskKind.WINDOW},
    {"mask": MaskKind.LOCAL_STRIDE},
    {"mask": MaskKind.WINDOW, "sinks": Switch.ON},
    {"mask": MaskKind.WINDOW, "softcap": Switch.ON},
    {"mask": MaskKind.WINDOW, "kv_layout": SeqLayout.PAGED16},
    {"bias": BiasKind.SAME},
    {"bias": BiasKind.FP32},
    {"relative_bias": Switch.ON},
    {"alibi": Switch.ON},
    {"bias": BiasKind.SAME, "bias_staged": Staging.ROW},
    {"bias": BiasKind.SAME, "bias_staged": Staging.MATRIX},
    {"bias": BiasKind.FP32, "bias_staged": Staging.MATRIX},
    {"mask": MaskKind.FULL, "key_padding": Switch.ON},
    {"mask": MaskKind.FULL, "dense": Switch.ON},
    {"dense": Switch.ON, "dense_staged": Staging.MATRIX},
    {"dropout": Switch.ON},
    {"fixed_shift": Switch.ON},
    {"mask": MaskKind.BLOCK_LISTS},
    {"mask": MaskKind.BLOCK_LISTS, "kv_layout": SeqLayout.PAGED},
    {"mask": MaskKind.BLOCK_LISTS, "kv_layout": SeqLayout.PAGED16},
    {"mask": MaskKind.BLOCK_LISTS, "dropout": Switch.ON},
)


#: The same of backward kernels.
BACKWARD_FEATURES: Final[tuple[dict[str, Any], ...]] = (
    {"mask": MaskKind.WINDOW},
    {"mask": MaskKind.LOCAL_STRIDE},
    {"mask": MaskKind.FINE_STRIDE},
    {"mask": MaskKind.BLOCK_LISTS},
    {"q_layout": SeqLayout.RAGGED, "kv_layout": SeqLayout.RAGGED},
    {"bias": BiasKind.SAME},
    {"bias": BiasKind.FP32},
    {"relative_bias": Switch.ON, "alibi": Switch.ON},
    {"softcap": Switch.ON},
    {"mask": MaskKind.FULL, "key_padding": Switch.ON},
    {"mask": MaskKind.FULL, "dense": Switch.ON},
    {"dropout": Switch.ON},
    {"sinks": Switch.ON},
    {"kv_layout": SeqLayout.PAGED},
)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one kernel costs; `error` is empty if it was built."""

    spec: dict[str, str | int]
    registers: int = 0
    spill_bytes: int = 0
    smem_bytes: int = 0
    cubin_bytes: int = 0
    compile_ms: float = 0.0
    origin: str = ""
    error: str = ""

    @property
    def name(self) -> str:
        """Return a short name: what tells this kernel from its neighbours."""
        return kernel_name(self.spec)


def kernel_name(fields: dict[str, str | int]) -> str:
    """'sm_90 fwd bf16 d128 causal 128x64' and the like, from a spec's flat fields."""
    if "mask" not in fields:
        first = ("arch", "family")
        shown = {name: name if value == "on" else value for name, value in fields.items()}
        rest = [str(value) for name, value in shown.items() if name not in first and value != "off"]
        return " ".join([*(str(fields[name]) for name in first), *rest])
    dim, dim_v = fields["head_dim"], fields["head_dim_v"]
    parts = [
        fields["arch"],
        fields["family"],
        fields["dtype"] if fields["dtype"] == fields["out_dtype"] else f"{fields['dtype']}>fp32",
        f"d{dim}" if dim == dim_v else f"d{dim}/{dim_v}",
        *{fields["numerics"]} - {"f32_acc", "tf32x3"},
        fields["mask"],
        *(f"{name}={fields[name]}" for name in OPTIONAL if fields[name] not in ("off", "none")),
        *{str(fields[side]) for side in ("q_layout", "kv_layout")} - {"batched"},
        f"{fields['block_q']}x{fields['block_kv']}",
        f"{fields['warps_q']}x{fields['warps_kv']}w"
        if "warps_kv" in fields
        else f"{fields['num_warps']}w",
        f"{fields['stages']}st",
    ]
    parts += [fields["target"]] if "target" in fields else []
    parts += ["deterministic"] if fields.get("deterministic") == "on" else []
    parts += [fields["access"]] if fields["access"] == "element" else []
    return " ".join(map(str, parts))


def problem(dtype: Dtype, head_dim: int, mask: MaskKind = MaskKind.CAUSAL, **other: Any) -> Problem:
    """Return a problem with the default numerics; `other` sets further fields."""
    return Problem(
        dtype=dtype,
        out_dtype=other.pop("out_dtype", dtype),
        head_dim=head_dim,
        head_dim_v=other.pop("head_dim_v", head_dim),
        mask=mask,
        numerics=resolve_numerics(None, dtype),
        **other,
    )


def matrix(arch: str, *, full: bool = False, short: bool = False) -> list[KernelSpec]:
    """Return the specs of an architecture, each once.

    The tuned architectures get every row of the tile table at its largest head dim, the head dims
    of real models, every kernel of the presets, and one for each further class of the spec; `full`
    takes every multiple of 16 in every dtype and row class, `short` the last of all these only.
    """
    is_short = short or arch not in TUNED
    specs = _full(arch) if full else _short(arch) if is_short else _rows(arch)
    return list({spec.to_key(): spec for spec in specs}.values())


def _full(arch: str) -> Iterator[KernelSpec]:
    for dtype in Dtype:
        for rows in RowClass:
            for mask in (MaskKind.FULL, MaskKind.CAUSAL):
                for dim in ALL_DIMS:
                    yield fwd_spec(problem(dtype, dim, mask), arch, rows)
    yield from _rows(arch)


def _rows(arch: str) -> Iterator[KernelSpec]:
    for dtype in (Dtype.BF16, Dtype.FP32):
        for rows in RowClass:
            # The last head dim of a run of equal tiles needs the most registers and shared memory.
            largest = {}
            for dim in ALL_DIMS:
                spec = fwd_spec(problem(dtype, dim), arch, rows)
                largest[spec.tile] = spec
            yield from largest.values()
    for dim in MODEL_DIMS:
        yield fwd_spec(problem(Dtype.BF16, dim), arch, RowClass.MANY)
    yield from specs_of(preset(["all"]), [arch])
    for q_layout, kv_layout in LAYOUTS:
        for dim in (64, 128):
            for rows in RowClass:
                pair = problem(Dtype.BF16, dim, q_layout=q_layout, kv_layout=kv_layout)
                yield fwd_spec(pair, arch, rows)
    for features in FEATURES:
        for dim, rows in ((64, RowClass.MANY), (128, RowClass.MANY), (128, RowClass.ROWS16)):
            yield fwd_spec(problem(Dtype.BF16, dim, **features), arch, rows)
    yield from _backward(arch)
    yield from _gears(arch)
    yield from _short(arch)


def _gears(arch: str) -> Iterator[KernelSpec]:
    """Numerics that no default gear has; fp16 accumulators where a call can get them."""
    kinds = [(Dtype.BF16, Numerics.SPLIT_P), (Dtype.FP32, Numerics.TF32)]
    if arch in ("sm_86", "sm_89"):
        kinds.append((Dtype.FP16, Numerics.F16_ACC))
    for dtype, numerics in kinds:
        for dim in (64, 128, 192, 256):
            yield fwd_spec(_geared(dtype, dim, numerics), arch, RowClass.MANY)
        yield fwd_spec(_geared(dtype, 128, numerics, MaskKind.FULL), arch, RowClass.MANY)
        yield fwd_spec(_geared(dtype, 128, numerics, MaskKind.WINDOW), arch, RowClass.MANY)
        ragged = replace(
            _geared(dtype, 128, numerics), q_layout=SeqLayout.RAGGED, kv_layout=SeqLayout.RAGGED
        )
        yield fwd_spec(ragged, arch, RowClass.MANY)
        for rows in (RowClass.ROWS16, RowClass.ROWS64):
            yield fwd_spec(_geared(dtype, 128, numerics), arch, rows)
    for dim in DIMS_IN_8_BITS:
        for mask in (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE):
            yield from specs_for_gear(problem(Dtype.BF16, dim, mask), 4, arch)
    yield from specs_for_gear(problem(Dtype.FP16, 128), 4, arch)
    yield from specs_for_gear(problem(Dtype.FP16, 128, head_dim_v=64), 4, arch)
    for dim, mask in itertools.product(DIMS_IN_8_BITS, (MaskKind.CAUSAL, MaskKind.WINDOW)):
        yield from _in_8_bits(arch, dim, mask, SeqLayout.RAGGED)
    for dim, layout in itertools.product(DIMS_IN_8_BITS, (SeqLayout.PAGED, SeqLayout.PAGED16)):
        for mask in (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE):
            yield from _in_8_bits(arch, dim, mask, layout)
    for numerics, dim in itertools.product((Numerics.F16X3, Numerics.F16X1), (16, 64, 80, 128)):
        yield split_spec(_geared(Dtype.FP32, dim, numerics), arch)
        for mask in (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE):
            yield fwd_spec(_geared(Dtype.FP32, dim, numerics, mask), arch, RowClass.MANY)
    for numerics, dim in itertools.product((Numerics.F16X3, Numerics.F16X1), (64, 128)):
        padded = _geared(Dtype.FP32, dim, numerics, MaskKind.FULL, key_padding=Switch.ON)
        yield fwd_spec(padded, arch, RowClass.MANY)
    unequal = replace(problem(Dtype.FP32, 128, head_dim_v=64), numerics=Numerics.F16X3)
    yield split_spec(unequal, arch)
    yield fwd_spec(unequal, arch, RowClass.MANY)


def _geared(
    dtype: Dtype, dim: int, numerics: Numerics, mask: MaskKind = MaskKind.CAUSAL, **other: Any
) -> Problem:
    return replace(problem(dtype, dim, mask, **other), numerics=numerics)


def _in_8_bits(arch: str, dim: int, mask: MaskKind, kv_layout: SeqLayout) -> Iterator[KernelSpec]:
    q_layout = SeqLayout.RAGGED
    asked = problem(Dtype.BF16, dim, mask, q_layout=q_layout, kv_layout=kv_layout)
    yield from specs_for_gear(asked, 4, arch)


def _backward(arch: str) -> Iterator[KernelSpec]:
    bf16, fp32 = Dtype.BF16, Dtype.FP32
    for dim in (32, 64, 96, 128, 192, 256):
        yield bwd_spec(problem(bf16, dim), arch)
    for dim in (64, 128):
        yield bwd_spec(problem(bf16, dim, MaskKind.FULL), arch)
        yield bwd_spec(problem(bf16, dim), arch, deterministic=True)
        for features in BACKWARD_FEATURES:
            yield bwd_spec(problem(bf16, dim, **features), arch)
    for dim in (64, 128, 256):
        yield bwd_spec(problem(fp32, dim), arch)
    yield from _backward_in_halves(arch)
    yield bwd_spec(problem(bf16, 192, head_dim_v=128), arch)
    yield bwd_spec(problem(bf16, 100, access=Access.ELEMENT), arch)
    biased = problem(bf16, 128, bias=BiasKind.FP32, relative_bias=Switch.ON)
    for target in ScoreTarget:
        yield score_grad_spec(biased, arch, target)
    yield score_grad_spec(problem(bf16, 256, bias=BiasKind.SAME), arch, ScoreTarget.MATRIX)
    listed = problem(bf16, 64, MaskKind.BLOCK_LISTS, bias=BiasKind.SAME)
    yield score_grad_spec(listed, arch, ScoreTarget.MATRIX)


def _backward_in_halves(arch: str) -> Iterator[KernelSpec]:
    for dim in (16, 64, 80, 128):
        own = _geared(Dtype.FP32, dim, Numerics.F16X3)
        yield split_spec(own, arch, gradients=True)
        yield bwd_spec(own, arch)
    for dim in (64, 128):
        yield bwd_spec(_geared(Dtype.FP32, dim, Numerics.F16X3, MaskKind.FULL), arch)
        yield bwd_spec(_geared(Dtype.FP32, dim, Numerics.F16X3), arch, deterministic=True)
        for features in BACKWARD_FEATURES:
            asked = backward_in_halves(problem(Dtype.FP32, dim, **features))
            if asked is not None:
                yield bwd_spec(asked, arch)


def _short(arch: str) -> Iterator[KernelSpec]:
    many, bf16 = RowClass.MANY, Dtype.BF16
    for dim in (64, 128):
        yield fwd_spec(problem(bf16, dim), arch, many)
        yield fwd_spec(problem(bf16, dim, MaskKind.FULL), arch, many)
    for rows in (RowClass.ROWS16, RowClass.ROWS64):
        yield fwd_spec(problem(bf16, 128), arch, rows)
    yield fwd_spec(problem(Dtype.FP16, 128), arch, many)
    yield fwd_spec(problem(Dtype.FP32, 128), arch, many)
    yield fwd_spec(problem(bf16, 128, out_dtype=Dtype.FP32), arch, many)
    yield fwd_spec(problem(bf16, 192, head_dim_v=128), arch, many)
    for dim in (7, 128):
        yield fwd_spec(problem(bf16, dim, access=Access.ELEMENT), arch, many)
    yield fwd_spec(problem(Dtype.FP32, 33, access=Access.ELEMENT), arch, many)
    for merging in (MergeSpec, MergeGradSpec):
        yield merging(dtype=bf16, out_dtype=bf16, head_dim_v=128, arch=arch)
    yield from specs_of([{"family": ["append", "rotary"], "dtype": ["bf16", "fp32"]}], [arch])
    mixed = {"family": ["append", "rotary"], "dtype": "bf16", "table_dtype": "fp32"}
    yield from specs_of([mixed], [arch])
    yield from specs_of_backward(problem(bf16, 64), arch)
    yield from specs_of_backward(problem(Dtype.FP32, 33, access=Access.ELEMENT), arch)
    yield score_grad_spec(problem(bf16, 64, bias=BiasKind.SAME), arch, ScoreTarget.ROW)
    norms = {
        "family": ["norm", "norm_grad"],
        "dtype": ["bf16", "fp32"],
        "head_dim": 64,
        "groups": [1, 8],
    }
    yield from specs_of([norms], [arch])


def build_one(spec: KernelSpec) -> Figures:
    """Build one kernel through the cache, and return its figures."""
    from jitattn.errors import JitAttnError
    from jitattn.jit import build

    try:
        built = build.build(spec)
    except JitAttnError as error:
        return Figures(spec.to_dict(), error=f"{type(error).__name__}: {error}")
    meta = built.metadata
    return Figures(
        spec.to_dict(),
        registers=meta.registers,
        spill_bytes=meta.spill_bytes,
        smem_bytes=meta.smem_bytes,
        cubin_bytes=len(built.cubin),
        compile_ms=meta.compile_ms,
        origin=str(built.origin),
    )


def build_all(
    specs: Sequence[KernelSpec],
    *,
    jobs: int | None = None,
    on_done: Callable[[Figures], None] | None = None,
) -> list[Figures]:
    """Build kernels in `jobs` processes, and return their figures in the order of `specs`."""
    jobs = min(jobs or os.cpu_count() or 1, max(len(specs), 1))
    results: dict[int, Figures] = {}
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        futures = {pool.submit(build_one, spec): index for index, spec in enumerate(specs)}
        for future in as_completed(futures):
            figures = results[futures[future]] = future.result()
            if on_done is not None:
                on_done(figures)
    return [results[index] for index in range(len(specs))]


@dataclass(frozen=True, slots=True)
class Allowance:
    """A kernel that may spill, and why."""

    match: dict[str, str | int]
    spill_bytes: int
    reason: str

    def covers(self, spec: dict[str, str | int]) -> bool:
        """Whether every field named in `match` has that value in the spec."""
        return all(spec.get(key) == value for key, value in self.match.items())


def load_budget(path: Path = BUDGET_FILE) -> list[Allowance]:
    """Read the budget file; every entry needs fields, a figure and a reason."""
    if not path.exists():
        return []
    budget = [Allowance(**entry) for entry in json.loads(path.read_text())["spills"]]
    for entry in budget:
        if not entry.match or entry.spill_bytes <= 0 or not entry.reason.strip():
            raise ValueError(f"{path.name}: {entry} needs match, spill_bytes above 0 and a reason")
    return budget


def problems(figures: Iterable[Figures], budget: Sequence[Allowance]) -> list[str]:
    """Return one line for each kernel that failed or spills more than the budget allows."""
    lines = []
    for row in figures:
        allowed = max((a.spill_bytes for a in budget if a.covers(row.spec)), default=0)
        if row.error:
            lines.append(f"{row.name}: {row.error}")
        elif row.spill_bytes > allowed:
            lines.append(
                f"{row.name}: spills {row.spill_bytes} bytes, {allowed} allowed "
                f"({row.registers} registers)"
            )
    return lines


def parse_arches(text: str) -> tuple[str, ...]:
    """'80,90' or 'sm_80,sm_90' → ('sm_80', 'sm_90')."""
    return tuple(f"sm_{part.strip().removeprefix('sm_')}" for part in text.split(","))


def collect(
    arches: Sequence[str], *, full: bool, short: bool, jobs: int | None, quiet: bool
) -> list[Figures]:
    """Build the matrices of some architectures, in the user's cache or a fresh temporary one."""
    specs = [spec for arch in arches for spec in matrix(arch, full=full, short=short)]
    count = 0

    def progress(figures: Figures) -> None:
        nonlocal count
        count += 1
        if not quiet:
            state = figures.error.partition("\n")[0] or f"{figures.compile_ms:.0f} ms"
            say(f"[{count}/{len(specs)}] {figures.name}: {state}")

    with tempfile.TemporaryDirectory(prefix="jitattn-matrix-") as folder:
        # The budget is of the newest compiler that is installed, whatever this driver could load.
        newest = str(max(compilers.installed(), default=""))
        defaults = {"JITATTN_CACHE_DIR": folder, "JITATTN_NVRTC": newest}
        added = {name: value for name, value in defaults.items() if name not in os.environ}
        os.environ.update(added)
        try:
            return build_all(specs, jobs=jobs, on_done=progress)
        finally:
            for name in added:
                del os.environ[name]


def main(argv: Sequence[str] | None = None) -> int:
    """Compile the matrix; return 1 if a kernel fails or spills unlisted."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--arch", default=",".join(TUNED + UNTUNED), help="80,90 or sm_80,sm_90")
    parser.add_argument("--full", action="store_true", help="every multiple of 16, dtype and mask")
    parser.add_argument("--short", action="store_true", help="one for each class of the spec")
    parser.add_argument("-j", "--jobs", type=int, default=None)
    parser.add_argument("--json", action="store_true", help="figures on stdout, nothing else")
    arguments = parser.parse_args(argv)

    start = time.perf_counter()
    figures = collect(
        parse_arches(arguments.arch),
        full=arguments.full,
        short=arguments.short,
        jobs=arguments.jobs,
        quiet=arguments.json,
    )
    seconds = time.perf_counter() - start
    bad = problems(figures, load_budget())
    if arguments.json:
        say(json.dumps([asdict(row) for row in figures], indent=1))
    else:
        compiled = sum(row.compile_ms for row in figures) / 1e3
        say(f"{len(figures)} kernels, {compiled:.1f} s in the compiler, {seconds:.1f} s in all")
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
