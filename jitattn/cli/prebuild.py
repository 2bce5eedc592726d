"""Command `jitattn-cache prebuild`: compile ahead of time, for any architecture."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from jitattn.cache import settings
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry
from jitattn.cli import streams
from jitattn.cli.common import (
    Archs,
    Number,
    Words,
    command_line,
    emit,
    fail,
    json_option,
    own_cache,
    status_of,
    warn,
)
from jitattn.cli.estimate import Estimate, estimate
from jitattn.cli.narrow import narrowed
from jitattn.cli.progress import progress
from jitattn.cli.words import counted, describe, duration, size, tile
from jitattn.errors import CompileError
from jitattn.jit import build, compilers, layers, pool
from jitattn.plan import choices, spec_files
from jitattn.spec.kernel_spec import KernelSpec
from jitattn.spec.text import printable


@click.command()
@click.option("--arch", type=Archs(), default=None, help="80,86,90 …; native: this machine's")
@click.option("--dtype", type=Words(choices.problem_fields()["dtype"]), help="fp16,bf16,fp32")
@click.option("--head-dim", type=Words(), help="64,128, or 192:128 for D:Dv")
@click.option(
    "--mask", type=Words(choices.problem_fields()["mask"]), help="full,causal,window,local_stride"
)
@click.option("--gear", type=Number(), help="precision against speed, as in jitattn.attention")
@click.option("--set", "others", multiple=True, metavar="FIELD=VALUE", help="any other field")
@click.option("--preset", type=Words(), help="model families, or all; see --presets")
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="TOML, JSON, or record")
@click.option("-j", "--jobs", type=Number(1), help="processes (default: all cores)")
@click.option("--dry-run", is_flag=True, help="say what would be made, compile nothing")
@click.option("--presets", "show_presets", is_flag=True, help="only list the presets")
@json_option
def prebuild(
    arch: list[str] | None,
    dtype: list[str] | None,
    head_dim: list[str] | None,
    mask: list[str] | None,
    gear: int | None,
    others: tuple[str, ...],
    preset: list[str] | None,
    spec_file: Path | None,
    jobs: int | None,
    dry_run: bool,
    show_presets: bool,
    as_json: bool,
) -> None:
    """Compile kernels into the cache, for any architecture; no GPU is needed.

    Presets and a file select kernels, together; options narrow what these select, by any field, or
    select by themselves. With only --arch: fp16 and bf16, head dims 64 and 128, full and causal
    masks. Invalid entries of a file are reported, the others are compiled, and the status is 1.

    Ctrl-C and SIGTERM keep what is compiled; the same command goes on from there.
    """
    if show_presets:
        abouts = {name: about for name, (about, _) in choices.presets().items()}
        emit(abouts, as_json, "\n".join(f"{name:10s} {about}" for name, about in abouts.items()))
        return
    cache = own_cache(to_write=not dry_run)
    flags = _choice(dtype, head_dim, mask, gear, others)
    specs, refused = _selected(flags, arch or [], preset or [], spec_file)
    for reason in refused:
        warn(f"refused: {reason}")
    if dry_run:
        _report_plan(specs, cache, jobs, as_json)
        sys.exit(1 if refused else 0)
    _check_that_it_keeps(cache)
    _check_that_it_compiles(specs, cache)
    _make(specs, cache, jobs, as_json, len(refused))


def _selected(
    flags: dict[str, Any], arch: list[str], preset: list[str], spec_file: Path | None
) -> tuple[list[KernelSpec], list[str]]:
    """Return the kernels that a command line selects, and the reasons of invalid entries."""
    read = None if spec_file is None else spec_files.read(spec_file)
    with command_line():
        of_presets = [("preset", choice) for choice in choices.preset(preset)]
        of_file = [] if read is None else read.entries
        if not preset and spec_file is None:
            return choices.specs_of([flags], arch, "the options"), []
        if flags:
            if "arch" in flags:  # it narrows what a choice names; it is for the others, too
                arch = arch or [choices.arch_name(one) for one in flags["arch"]]
            entries = narrowed([*of_presets, *of_file], flags)
            of_presets = [one for one in entries if one[0] == "preset"]
            of_file = [one for one in entries if one[0] != "preset"]
        specs = dict.fromkeys(
            choices.specs_of([choice for _, choice in of_presets], arch, "preset")
        )
    found, errors = choices.expand(of_file, arch)
    specs.update(dict.fromkeys(found))
    return list(specs), [*(() if read is None else read.faults), *map(str, errors)]


def _check_that_it_keeps(cache: DiskCache) -> None:
    """Exit before the first compile if the cache would keep nothing, or nothing may be compiled."""
    if settings.no_compile():
        fail("JITATTN_NO_COMPILE=1 forbids what prebuild does; unset it for this command", 2)
    try:
        cache.check_writable()
    except OSError as error:
        reason = str(error.strerror or error)
        if error.filename not in (None, str(cache.root)):
            reason = f"{error.filename}: {reason}"
        fail(
            f"{cache.root} keeps no kernels ({reason}), so none is compiled: set JITATTN_CACHE_DIR "
            "to a directory that only you can write; jitattn-cache doctor says more"
        )


def _check_that_it_compiles(specs: list[KernelSpec], cache: DiskCache) -> None:
    """Raise before the first kernel if there is no compiler, but for kernels that are all there."""
    try:
        compilers.chosen()
    except CompileError:
        if not all(_is_there(spec, cache) for spec in specs):
            raise


def _choice(
    dtype: list[str] | None,
    head_dim: list[str] | None,
    mask: list[str] | None,
    gear: int | None,
    others: tuple[str, ...],
) -> dict[str, Any]:
    named = {"dtype": dtype, "head_dim": head_dim, "mask": mask, "gear": gear}
    choice: dict[str, Any] = {name: value for name, value in named.items() if value is not None}
    for other in others:
        name, equals, value = other.partition("=")
        if not equals:
            fail(f"--set {other}: it must be FIELD=VALUE, as in out_dtype=fp32", 2)
        if name.strip() in choice:
            fail(f"--set {other}: {name.strip()} is given twice; separate values by commas", 2)
        choice[name.strip()] = [word.strip() for word in value.split(",")]
    return choice


def _report_plan(
    specs: list[KernelSpec], cache: DiskCache, jobs: int | None, as_json: bool
) -> None:
    there = {spec: _is_there(spec, cache) for spec in specs}
    missing = [spec for spec in specs if not there[spec]]
    needed = dict(zip(missing, estimate(missing, cache.entries()), strict=True))
    rows = [
        {
            **spec.to_choice(),
            "tile": tile(spec.to_dict()),
            "cached": there[spec],
            **_of(needed.get(spec)),
        }
        for spec in specs
    ]
    lines = [
        f"{'cached  ' if there[spec] else 'to make '} {describe(spec.to_dict())}" for spec in specs
    ]
    total = f"{len(missing)} to make, {sum(there.values())} cached"
    if missing:
        processes = min(jobs or pool.num_processors(), len(missing))
        seconds = sum(one.seconds for one in needed.values()) / processes
        room = size(sum(one.bytes for one in needed.values()))
        total += f": about {duration(max(1, seconds))} on {processes} "
        total += f"{'process' if processes == 1 else 'processes'}, and {room}"
    emit(rows, as_json, "\n".join([*lines, total]))


def _of(estimated: Estimate | None) -> dict[str, float | int]:
    if estimated is None:
        return {}
    return {
        "estimated_seconds": round(estimated.seconds, 3),
        "estimated_bytes": estimated.bytes,
    }


def _is_there(spec: KernelSpec, cache: DiskCache) -> bool:
    """Return whether `build.find` would find a kernel; unlike it, change nothing."""
    key = build.key_of(spec)
    if settings.cache_mode() == "off":
        return False
    try:
        compilers.chosen()
    except CompileError:  # without a compiler, a cubin of any one is used
        found = cache.look_for_kernel(key, spec.arch, compilers.is_loadable)
        if any(isinstance(one, Entry) for one in found):
            return True
    else:
        if isinstance(cache.look(key, spec.arch), Entry):
            return True
    return layers.find(key, spec.arch, cache) is not None


def _make(
    specs: list[KernelSpec], cache: DiskCache, jobs: int | None, as_json: bool, refused: int
) -> None:
    start = time.perf_counter()
    counts = {"compiled": 0, "cached": 0, "failed": 0}
    total_bytes = spilling = 0
    kept: set[str] = set()  # keys that must be in the user's cache at the end
    try:
        with (
            progress("compiling", len(specs)) as step,
            contextlib.closing(pool.build_all(specs, jobs)) as outcomes,  # ends its processes
        ):
            for built in outcomes:
                outcome = _checked(built, cache)
                name = "cached" if outcome.origin in ("disk", "read-only") else outcome.origin
                counts[name] += 1
                if outcome.built is not None:
                    total_bytes += outcome.built.metadata.bytes
                    spilling += outcome.built.metadata.spill_bytes > 0
                    if outcome.origin != "read-only":
                        kept.add(outcome.built.key)
                detail = f": {outcome.error}" if outcome.error else f" in {outcome.seconds:.2f} s"
                words = describe(outcome.spec.to_dict())
                step(f"{name} {words}{detail}", words)
                if outcome.error and streams.is_watched():
                    streams.write_message(f"{printable(f'{name} {words}{detail}')}\n")
    except KeyboardInterrupt as error:
        left = len(specs) - sum(counts.values())
        there = counts["compiled"] + counts["cached"]
        warn(
            f"stopped: {counted(there, 'kernel')} {'is' if there == 1 else 'are'} in {cache.root}, "
            f"{counts['compiled']} of them new; {left} not made; the same command goes on from here"
        )
        sys.exit(status_of(error))
    seconds = round(time.perf_counter() - start, 2)
    evicted = len(kept.difference(cache.keys()))
    if evicted:
        warn(
            f"{evicted} of these kernels went again, to make room for the others: the cache is "
            f"limited to {size(settings.cache_max_bytes())}; raise JITATTN_CACHE_MAX_BYTES"
        )
    result = {
        **counts,
        "refused": refused,
        "evicted": evicted,
        "seconds": seconds,
        "bytes": total_bytes,
        "spilling": spilling,
    }
    emit(
        result,
        as_json,
        f"{counts['compiled']} compiled, {counts['cached']} cached, {counts['failed']} failed "
        + (f"({refused} more refused) " if refused else "")
        + f"in {duration(seconds) if seconds >= 60 else f'{seconds} s'}, {size(total_bytes)}, "
        + f"{counted(spilling, 'kernel')} {'spills' if spilling == 1 else 'spill'}",
    )
    sys.exit(1 if counts["failed"] or evicted or refused else 0)


def _checked(outcome: pool.Outcome, cache: DiskCache) -> pool.Outcome:
    """Turn the outcome of a kernel that was compiled but is not on disk into a failure."""
    if outcome.origin != "compiled" or outcome.built is None:
        return outcome
    if isinstance(cache.look(outcome.built.key, outcome.spec.arch), Entry):
        return outcome
    error = (
        f"compiled, but {cache.root} does not keep it; see JITATTN_CACHE_DIR and "
        "JITATTN_CACHE_MAX_BYTES"
    )
    return replace(outcome, origin="failed", built=None, error=error)
