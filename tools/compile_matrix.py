"""Compile the matrix of kernels: every tile-table row on its architecture. No GPU needed.

``python tools/compile_matrix.py`` fails on a compile error or an unlisted spill;
`resource_report.py` prints the figures and tests/cpu/tools/test_compile_matrix.py tests the matrix.
Figures of unchanged kernels come from tests/data/kernel_figures.json, by cache keys computed from
the present sources; ``--verify N`` compiles one of N of these all the same and compares,
``--rebuild`` compiles all, ``--update`` writes the file.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import _figures
from _table import say

from jitattn.jit import compilers
from jitattn.jit.pool import num_processors
from jitattn.plan.choices import preset, specs_of
from jitattn.spec.enums import MatrixSize
from jitattn.spec.kernel_spec import SWITCHES, KernelSpec, families

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

REPOSITORY: Final = Path(__file__).resolve().parents[1]
BUDGET_FILE: Final = REPOSITORY / "tests" / "data" / "resource_budget.json"

#: Architectures with a tile table of their own: the whole matrix.
TUNED: Final = ("sm_80", "sm_86", "sm_89", "sm_90")
#: Architectures that run untuned: the short matrix.
UNTUNED: Final = ("sm_87", "sm_100", "sm_120")

#: Warnings that the templates still have (of attention/score.cuh); any other fails the matrix.
KNOWN_WARNINGS: Final = ("loop is not reachable",)
#: Fields of optional inputs.
OPTIONAL: Final = ("bias", *SWITCHES, "bias_staged", "dense_staged")
#: Fields that names show with a unit, of kernels that have them.
_COUNTS: Final = (("num_warps", "w"), ("stages", "st"))


@dataclass(frozen=True, slots=True)
class Figures:
    """Registers, spills and compile time of one kernel; `error` is empty if it was built."""

    spec: dict[str, str | int]
    registers: int = 0
    spill_bytes: int = 0
    smem_bytes: int = 0
    cubin_bytes: int = 0
    compile_ms: float = 0.0
    origin: str = ""
    error: str = ""
    key: str = ""  #: in the cache, of the compiler that made it
    compiler: str = ""

    @property
    def name(self) -> str:
        """Return a short name that distinguishes this kernel from similar ones."""
        return kernel_name(self.spec)


def kernel_name(fields: dict[str, str | int]) -> str:
    """Format a short name such as 'sm_90 fwd bf16 d128 causal 128x64' from a spec's flat fields."""
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
    ]
    if "warps_kv" in fields:
        parts.append(f"{fields['warps_q']}x{fields['warps_kv']}w")
    parts += [f"{fields[name]}{unit}" for name, unit in _COUNTS if name in fields]
    parts += [fields["target"]] if "target" in fields else []
    parts += ["deterministic"] if fields.get("deterministic") == "on" else []
    parts += [fields["access"]] if fields["access"] == "element" else []
    return " ".join(map(str, parts))


def matrix(arch: str, *, full: bool = False, short: bool = False) -> list[KernelSpec]:
    """Return the distinct specs of an architecture.

    The tuned architectures get every row of the tile table at its largest head dim, the head dims
    of real models, every kernel of the presets, and one for each further class of the spec; `full`
    takes every multiple of 16 in every dtype and row class, `short` the last of all these only.
    """
    size = MatrixSize.TUNED if arch in TUNED and not short else MatrixSize.SHORT
    if full:
        size = MatrixSize.FULL
    specs = [spec for family in families().values() for spec in family.matrix(arch, size)]
    if size >= MatrixSize.TUNED:
        specs += specs_of(preset(["all"]), [arch])
    return list({spec.to_key(): spec for spec in specs}.values())


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
        error=warning_in(meta.log),
        registers=meta.registers,
        spill_bytes=meta.spill_bytes,
        smem_bytes=meta.smem_bytes,
        cubin_bytes=len(built.cubin),
        compile_ms=meta.compile_ms,
        origin=str(built.origin),
        key=meta.key,
        compiler=meta.toolchain,
    )


def warning_in(log: str) -> str:
    """Return the first warning in the log of a compiler, those that are known aside; else ""."""
    lines = (line.strip() for line in log.splitlines() if re.search(r"\bwarning\b", line, re.I))
    lines = (line for line in lines if not line.startswith("Remark:"))
    first = next((line for line in lines if not any(one in line for one in KNOWN_WARNINGS)), "")
    return f"the compiler warns: {first}" if first else ""


def kept(specs: Sequence[KernelSpec]) -> dict[KernelSpec, Figures]:
    """Return the stored figures of kernels whose cache keys are unchanged."""
    from jitattn.jit import build

    figures, compiler = _figures.load()
    found = {}
    for spec in specs if figures else ():
        key = build.key_of(spec)
        row = figures.get(key)
        if row is not None:
            values = dict(zip(_figures.FIELDS, row, strict=True))
            found[spec] = Figures(
                spec.to_dict(), **values, origin="kept", key=key, compiler=compiler
            )
    return found


def sample(known: Mapping[KernelSpec, Figures], one_of: int, part: int) -> list[KernelSpec]:
    """Select about one in `one_of` kernels by key; each `part` selects different ones."""
    return [
        spec
        for spec, figures in known.items()
        if int(figures.key[:8], 16) % one_of == part % one_of
    ]


def verified(built: Figures, before: Figures) -> Figures:
    """Return the built figures, with an error if they differ from the stored ones."""
    differences = [
        f"{name} {getattr(built, name)}, kept as {getattr(before, name)}"
        for name in _figures.FIELDS
        if name != "compile_ms" and getattr(built, name) != getattr(before, name)
    ]
    if built.error or not differences:
        return built
    return replace(built, error=f"kept figures are wrong: {', '.join(differences)}")


def update(figures: Sequence[Figures]) -> None:
    """Write the figures of whole matrices to the file, by cache key.

    Raises
    ------
    ValueError
        They are of several compilers.
    """
    compilers_seen = {one.compiler for one in figures}
    if len(compilers_seen) != 1:
        raise ValueError(f"figures of several compilers: {sorted(compilers_seen)}; use --rebuild")
    rows = {
        one.key: [
            round(value) if name == "compile_ms" else value
            for name, value in ((name, getattr(one, name)) for name in _figures.FIELDS)
        ]
        for one in figures
    }
    _figures.save(rows, compilers_seen.pop())


def build_all(
    specs: Sequence[KernelSpec],
    *,
    jobs: int | None = None,
    on_done: Callable[[Figures], None] | None = None,
) -> list[Figures]:
    """Build kernels in `jobs` processes, and return their figures in the order of `specs`."""
    jobs = min(jobs or num_processors(), max(len(specs), 1))
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
    """A kernel that may spill, with the limit and the reason."""

    match: dict[str, str | int]
    spill_bytes: int
    reason: str

    def covers(self, spec: dict[str, str | int]) -> bool:
        """Return whether the spec has all field values of `match`."""
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
    """Parse '80,90' or 'sm_80,sm_90' → ('sm_80', 'sm_90')."""
    return tuple(f"sm_{part.strip().removeprefix('sm_')}" for part in text.split(","))


def parse_verify(text: str) -> tuple[int, int]:
    """Parse '50:13' → (50, 13); '50' → (50, day number), so that each day verifies others."""
    one_of, colon, part = text.partition(":")
    if int(one_of) < 1:
        raise ValueError(f"{text}: one of {one_of}")
    return int(one_of), int(part) if colon else datetime.date.today().toordinal()


def collect(
    arches: Sequence[str],
    *,
    full: bool,
    short: bool,
    jobs: int | None,
    quiet: bool,
    rebuild: bool = False,
    verify: tuple[int, int] | None = None,
) -> list[Figures]:
    """Build the matrices of some architectures, in the user's cache or a fresh temporary one.

    Parameters
    ----------
    rebuild : bool
        Build kernels whose figures are kept, too.
    verify : tuple of int, optional
        Build one of so many of these, too, and compare; the second number is which (`sample`).
    """
    specs = [spec for arch in arches for spec in matrix(arch, full=full, short=short)]
    missing: list[KernelSpec] = []
    count = 0

    def progress(figures: Figures) -> None:
        nonlocal count
        count += 1
        if not quiet:
            state = figures.error.partition("\n")[0] or f"{figures.compile_ms:.0f} ms"
            say(f"[{count}/{len(missing)}] {figures.name}: {state}")

    with tempfile.TemporaryDirectory(prefix="jitattn-matrix-") as folder:
        # The budget is for the newest installed compiler, even if this driver cannot load its code.
        newest = str(max(compilers.installed(), default=""))
        defaults = {"JITATTN_CACHE_DIR": folder, "JITATTN_NVRTC": newest}
        added = {name: value for name, value in defaults.items() if name not in os.environ}
        os.environ.update(added)
        try:
            known = {} if rebuild else kept(specs)
            again = (
                {} if verify is None else {one: known.pop(one) for one in sample(known, *verify)}
            )
            missing += [spec for spec in specs if spec not in known]
            which = f" ({len(again)} to verify, part {verify[1] % verify[0]})" if verify else ""
            print(
                f"{len(specs)} kernels, {len(missing)} to compile{which} by {compilers.chosen()}",
                file=sys.stderr,
            )
            built = dict(zip(missing, build_all(missing, jobs=jobs, on_done=progress), strict=True))
            built |= {spec: verified(built[spec], before) for spec, before in again.items()}
            return [known[spec] if spec in known else built[spec] for spec in specs]
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
    parser.add_argument("--rebuild", action="store_true", help="compile what has not changed, too")
    parser.add_argument(
        "--verify",
        metavar="N[:PART]",
        type=parse_verify,
        default=None,
        help="compile one of N that have not changed, another each day (or PART), and compare",
    )
    parser.add_argument("--update", action="store_true", help="keep the figures of all matrices")
    arguments = parser.parse_args(argv)
    everything = ",".join(TUNED + UNTUNED)
    if arguments.update and (arguments.arch != everything or arguments.full or arguments.short):
        parser.error("--update keeps the figures of all matrices: no --arch, --full or --short")

    start = time.perf_counter()
    figures = collect(
        parse_arches(arguments.arch),
        full=arguments.full,
        short=arguments.short,
        jobs=arguments.jobs,
        quiet=arguments.json,
        rebuild=arguments.rebuild,
        verify=arguments.verify,
    )
    seconds = time.perf_counter() - start
    bad = problems(figures, load_budget())
    if arguments.json:
        say(json.dumps([asdict(row) for row in figures], indent=1))
    else:
        built = [row for row in figures if row.origin == "compiled"]
        compiled = sum(row.compile_ms for row in built) / 1e3
        say(
            f"{len(figures)} kernels, {len(built)} compiled ({compiled:.1f} s in the compiler), "
            f"{seconds:.1f} s in all"
        )
    if arguments.update and bad:
        print(f"{_figures.FIGURES_FILE.name} is left as it was", file=sys.stderr)
    elif arguments.update:
        update(figures)
    for line in bad:
        print(line, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    raise SystemExit(main())
