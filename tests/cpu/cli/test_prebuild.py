"""Tests `jitattn-cache prebuild`: kernels built, sources of choices, and errors."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from jitattn.cache.disk import DiskCache
from jitattn.jit import build, compilers, pool
from jitattn.spec.kernel_spec import KernelSpec
from tests.cpu.commands import run

SMALL = ["--arch", "86", "--dtype", "bf16", "--head-dim", "16", "--mask", "full"]


def test_makes_what_is_missing(cache_dir: Path) -> None:
    first = run("prebuild", *SMALL, "-j", "1", "--json")
    assert first.exit_code == 0, first.output
    counts = json.loads(first.stdout)
    assert (counts["compiled"], counts["cached"], counts["failed"]) == (3, 0, 0)
    assert counts["bytes"] > 4000
    assert first.stderr.count("compiled fwd sm_86 bf16") == 3  # progress, on stderr only
    assert "[3/3]" in first.stderr
    assert len(list(cache_dir.glob("v1/*/*.cubin"))) == 3
    build.clear_memory()
    again = json.loads(run("prebuild", *SMALL, "-j", "1", "--json").stdout)
    assert (again["compiled"], again["cached"], again["bytes"]) == (0, 3, counts["bytes"])


def test_in_processes() -> None:
    done = run("prebuild", *SMALL, "-j", "2")
    assert done.exit_code == 0, done.output
    assert "3 compiled, 0 cached, 0 failed" in done.stdout
    assert "0 kernels spill" in done.stdout


def test_sources_combine(tmp_path: Path) -> None:
    path = tmp_path / "kernels.toml"
    path.write_text('[[kernels]]\nhead_dim = 24\ndtype = "fp16"\nmask = "full"\narch = 80\n')
    done = run(
        "prebuild", "--spec", str(path), "--preset", "deepseek", "--arch", "90",
        "--head-dim", "32", "--dtype", "bf16", "--mask", "causal", "--dry-run", "--json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = [row for row in json.loads(done.stdout) if row["family"] == "fwd"]
    kinds = {(row["arch"], row["dtype"], row["head_dim"], row["head_dim_v"]) for row in rows}
    assert kinds == {
        ("sm_80", "fp16", 24, 24),
        ("sm_90", "bf16", 192, 128),
        ("sm_90", "bf16", 32, 32),
    }


def test_defaults_are_used_alone() -> None:
    rows = json.loads(run("prebuild", "--arch", "90", "--dry-run", "--json").stdout)
    forward = [row for row in rows if row["family"] == "fwd"]
    assert {row["head_dim"] for row in forward} == {64, 128}
    assert {row["dtype"] for row in forward} == {"fp16", "bf16"}
    assert {row["mask"] for row in forward} == {"full", "causal"}


def test_other_fields(cache_dir: Path) -> None:
    done = run("prebuild", *SMALL, "--set", "out_dtype=fp32", "--set", "rows=rows16", "-j", "1")
    assert done.exit_code == 0, done.output
    (row,) = json.loads(run("list", "--json").stdout)
    assert (row["out_dtype"], row["block_q"]) == ("fp32", 16)


def test_dry_run_compiles_nothing(cache_dir: Path) -> None:
    done = run("prebuild", *SMALL, "--dry-run")
    assert "3 to make, 0 cached" in done.stdout
    assert not list(cache_dir.glob("v1/*/*.cubin"))
    assert build.stats().compiled == 0
    run("prebuild", *SMALL, "-j", "1")
    build.clear_memory()
    assert "0 to make, 3 cached" in run("prebuild", *SMALL, "--dry-run").stdout


def test_presets_are_listed() -> None:
    done = run("prebuild", "--presets")
    assert done.exit_code == 0
    names = {line.split()[0] for line in done.stdout.splitlines()}
    assert names >= {"llama", "mistral", "gpt2", "sd"}
    abouts = json.loads(run("prebuild", "--presets", "--json").stdout)
    assert abouts.keys() == names
    assert "Llama" in abouts["llama"]


@pytest.mark.parametrize(
    ("arguments", "status", "text"),
    [
        (["--arch", "75"], 2, "75"),
        (["--arch", "x"], 2, "x"),
        (["--arch", "80", "--dtype", "int8"], 2, "int8"),
        (["--arch", "80", "--head-dim", "257"], 2, "257"),
        (["--arch", "80", "--mask", "diagonal"], 2, "diagonal"),
        (["--arch", "80", "--preset", "lama"], 2, "llama"),
        (["--arch", "80", "--gear", "5"], 2, "gear=5"),
        (["--arch", "80", "--set", "colour=red"], 2, "colour"),
        (["--arch", "80", "--set", "colour"], 2, "FIELD=VALUE"),
        (["--arch", "80", "--dtype", "bf16", "--set", "dtype=fp16"], 2, "twice"),
        (["--arch", "80", "--spec", "/nonexistent.toml"], 1, "nonexistent"),
        ([], 2, "no architecture"),
    ],
)
def test_wrong_choices_are_named(arguments: list[str], status: int, text: str) -> None:
    done = run("prebuild", *arguments)
    assert done.exit_code == status, done.output
    assert text in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr


def test_unknown_architecture_fails_by_name() -> None:
    done = run(
        "prebuild", "--arch", "199", "--head-dim", "16", "--dtype", "bf16", "-j", "1", "--json"
    )
    assert done.exit_code == 1
    assert json.loads(done.stdout)["compiled"] == 0
    assert "sm_199 is not known to nvrtc" in done.stderr


def test_prebuild_that_stores_nothing_fails(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    done = run("prebuild", *SMALL, "-j", "1", "--json", JITATTN_CACHE_DIR=str(tmp_path / "file"))
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    assert (counts["compiled"], counts["failed"], counts["bytes"]) == (0, 3, 0)
    assert "does not keep it" in done.stderr


@pytest.mark.parametrize("mode", ["ro", "off"])
def test_prebuild_needs_a_cache_to_write(mode: str) -> None:
    done = run("prebuild", *SMALL, JITATTN_CACHE=mode)
    assert done.exit_code == 2
    assert f"JITATTN_CACHE={mode}" in done.stderr


def test_what_was_evicted_meanwhile_fails(cache_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prebuild larger than the cache would leave some of its kernels out, unnoticed."""

    def build_and_evict(specs: Sequence[KernelSpec], jobs: int | None) -> Iterator[pool.Outcome]:
        disk = DiskCache(cache_dir)
        for outcome in build_all(specs, jobs):
            yield outcome
            # As another worker does, which needs the room for a kernel of its own.
            disk.evict(40 << 10, {outcome.built.key})

    build_all = pool.build_all
    monkeypatch.setattr(pool, "build_all", build_and_evict)
    done = run("prebuild", *SMALL, "-j", "1", "--json", JITATTN_CACHE_MAX_BYTES="40K")
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    left = len(DiskCache(cache_dir).keys())
    assert 0 < left < 3
    assert (counts["compiled"], counts["failed"], counts["evicted"]) == (3, 0, 3 - left)
    assert "limited to 40960 bytes; raise JITATTN_CACHE_MAX_BYTES" in done.stderr


def test_dry_run_leaves_no_trace(tmp_path: Path, cache_dir: Path) -> None:
    run("prebuild", *SMALL, "-j", "1")
    build.clear_memory()
    damaged = next(cache_dir.glob("v1/*/*.cubin"))
    damaged.write_bytes(b"bad")
    record = tmp_path / "record.jsonl"
    done = run("prebuild", *SMALL, "--dry-run", JITATTN_RECORD=str(record))
    assert "1 to make, 2 cached" in done.stdout
    assert damaged.read_bytes() == b"bad"
    assert not record.exists()
    assert "3 to make" in run("prebuild", *SMALL, "--dry-run", JITATTN_CACHE="off").stdout


def test_dry_run_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    run("prebuild", *SMALL, "-j", "1")
    build.clear_memory()
    monkeypatch.setattr(compilers, "_remembered", dict)
    compilers._choose.cache_clear()
    done = run("prebuild", *SMALL, "--dry-run")
    compilers._choose.cache_clear()
    assert "0 to make, 3 cached" in done.stdout
