"""`jitattn-cache prebuild`: compile ahead, for any architecture."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from jitattn.cli.common import (
    Archs,
    Words,
    describe,
    emit,
    fail,
    json_option,
    own_cache,
    progress,
)
from jitattn.jit import build, choices, pool
from jitattn.jit.cache import DiskCache
from jitattn.jit.spec import KernelSpec


def _show_presets(ctx: click.Context, _: click.Parameter, value: bool) -> None:
    if value:
        for name, (about, _choices) in choices.presets().items():
            click.echo(f"{name:10s} {about}")
        ctx.exit()


@click.command()
@click.option("--arch", type=Archs(), default=None, help="80,86,89,90 …")
@click.option("--dtype", type=Words(choices.problem_fields()["dtype"]), help="fp16,bf16,fp32")
@click.option("--head-dim", type=Words(), help="64,128, or 192:128 for D:Dv")
@click.option("--mask", type=Words(choices.problem_fields()["mask"]), help="full,causal")
@click.option("--gear", type=int, help="precision against speed, as in jitattn.attention")
@click.option("--set", "others", multiple=True, metavar="FIELD=VALUE", help="any other field")
@click.option("--preset", type=Words(), help="model families, or all; see --presets")
@click.option("--spec", "spec_file", type=click.Path(path_type=Path), help="TOML, JSON, or record")
@click.option("-j", "--jobs", type=click.IntRange(min=1), help="processes (default: all cores)")
@click.option("--dry-run", is_flag=True, help="say what would be made, compile nothing")
@click.option(
    "--presets", is_flag=True, is_eager=True, expose_value=False, callback=_show_presets,
    help="list the presets",
)  # fmt: skip
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
    as_json: bool,
) -> None:
    """Compile kernels into the cache, for any architecture; no GPU is needed.

    What to make is named by the options, by presets, by a file, or by all of these together. With
    nothing but --arch: fp16 and bf16, head dims 64 and 128, full and causal.
    """
    cache = own_cache(to_write=not dry_run)
    flags = _choice(dtype, head_dim, mask, gear, others)
    specs: dict[KernelSpec, None] = {}
    for chosen, where in (
        (choices.preset(preset) if preset else [], "preset"),
        (choices.read_file(spec_file) if spec_file else [], str(spec_file)),
        ([flags] if flags or not (preset or spec_file) else [], "the options"),
    ):
        specs.update(dict.fromkeys(choices.specs_of(chosen, arch or (), where)))
    if dry_run:
        _report_plan(list(specs), as_json)
    else:
        _make(list(specs), cache, jobs, as_json)


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
        choice[name.strip()] = [word.strip() for word in value.split(",")]
    return choice


def _report_plan(specs: list[KernelSpec], as_json: bool) -> None:
    there = {spec: build.find(spec) is not None for spec in specs}
    rows = [{**choices.to_choice(spec), "cached": there[spec]} for spec in specs]
    lines = [
        f"{'cached  ' if there[spec] else 'to make '} {describe(spec.to_dict())}" for spec in specs
    ]
    lines.append(f"{len(specs) - sum(there.values())} to make, {sum(there.values())} cached")
    emit(rows, as_json, "\n".join(lines))


def _make(specs: list[KernelSpec], cache: DiskCache, jobs: int | None, as_json: bool) -> None:
    start = time.perf_counter()
    counts = {"compiled": 0, "cached": 0, "failed": 0}
    total_bytes = spilling = 0
    with progress("compiling", len(specs)) as step:
        for built in pool.build_all(specs, jobs):
            outcome = _checked(built, cache)
            name = "cached" if outcome.origin in ("disk", "read-only") else outcome.origin
            counts[name] += 1
            if outcome.built is not None:
                total_bytes += outcome.built.metadata.bytes
                spilling += outcome.built.metadata.spill_bytes > 0
            detail = f": {outcome.error}" if outcome.error else f" in {outcome.seconds:.2f} s"
            step(f"{name} {describe(outcome.spec.to_dict())}{detail}")
            if outcome.error and sys.stderr.isatty():
                click.echo(f"failed {describe(outcome.spec.to_dict())}{detail}", err=True)
    seconds = round(time.perf_counter() - start, 2)
    result = {**counts, "seconds": seconds, "bytes": total_bytes, "spilling": spilling}
    emit(
        result,
        as_json,
        f"{counts['compiled']} compiled, {counts['cached']} cached, {counts['failed']} failed "
        f"in {seconds} s, {total_bytes} bytes, {spilling} kernels spill",
    )
    sys.exit(1 if counts["failed"] else 0)


def _checked(outcome: pool.Outcome, cache: DiskCache) -> pool.Outcome:
    """Turn a kernel that was compiled but is not on disk into a failure."""
    if outcome.origin != "compiled" or outcome.built is None:
        return outcome
    if cache.read(outcome.built.key, outcome.spec.arch) is not None:
        return outcome
    error = f"compiled, but {cache.root} does not keep it; see JITATTN_CACHE_DIR"
    return replace(outcome, origin="failed", built=None, error=error)
