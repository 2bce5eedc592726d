"""Tests `jitattn-cache prebuild`: kernels built, sources of choices, and errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from jitattn.cache import files
from jitattn.cache.disk import DiskCache
from jitattn.cli import progress
from jitattn.cli.words import describe
from jitattn.jit import build, compilers, gpus, pool
from jitattn.plan import choices
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


def forward_rows(*arguments: str) -> list[dict[str, Any]]:
    """Rows of a dry run, those of the family fwd."""
    done = run("prebuild", *arguments, "--dry-run", "--json")
    assert done.exit_code == 0, done.output
    return [row for row in json.loads(done.stdout) if row["family"] == "fwd"]


def values(rows: list[dict[str, Any]], name: str) -> set[Any]:
    return {row.get(name) for row in rows}


def test_presets_and_files_combine(tmp_path: Path) -> None:
    path = tmp_path / "kernels.toml"
    path.write_text('[[kernels]]\nhead_dim = 24\ndtype = "fp16"\nmask = "full"\narch = 80\n')
    rows = forward_rows("--spec", str(path), "--preset", "deepseek", "--arch", "90")
    kinds = {(row["arch"], row["dtype"], row["head_dim"], row["head_dim_v"]) for row in rows}
    assert {("sm_80", "fp16", 24, 24), ("sm_90", "bf16", 192, 128)} <= kinds


@pytest.mark.parametrize(
    ("options", "field", "left"),
    [
        (["--dtype", "bf16"], "dtype", {"bf16"}),
        (["--head-dim", "64"], "head_dim", {64}),
        (["--head-dim", "64:64,96"], "head_dim", {64}),
        (["--mask", "causal,full"], "mask", {"causal"}),
        (["--set", "out_dtype=fp32"], "out_dtype", {"fp32"}),  # the preset leaves it open
        (["--set", "rows=rows16"], "rows", {"rows16"}),
        (["--gear", "1"], "numerics", {"split_p"}),
        (["--set", "kv_layout=paged"], "kv_layout", {"paged"}),
    ],
)
def test_a_preset_is_narrowed_by_any_field(options: list[str], field: str, left: set[Any]) -> None:
    whole = forward_rows("--preset", "llama", "--arch", "90")
    rows = forward_rows("--preset", "llama", "--arch", "90", *options)
    assert values(rows, field) == left
    assert 0 < len(rows) <= len(whole)
    assert values(rows, "head_dim") <= values(whole, "head_dim")
    assert values(rows, "mask") == {"causal"}


def test_narrowing_of_several_presets_and_a_file(tmp_path: Path) -> None:
    path = tmp_path / "record.jsonl"
    choice = {"head_dim": [24, 32], "head_dim_v": 16, "dtype": "fp16", "mask": "full", "arch": 80}
    path.write_text(f"{json.dumps(choice)}\n")
    names = ["--preset", "llama,deepseek", "--spec", str(path), "--arch", "90"]
    rows = forward_rows(*names, "--head-dim", "32:16,192:128")
    kinds = {(row["arch"], row["head_dim"], row["head_dim_v"]) for row in rows}
    assert kinds == {("sm_80", 32, 16), ("sm_90", 192, 128)}  # nothing of llama
    assert values(forward_rows(*names, "--set", "arch=80"), "arch") == {"sm_80"}


def test_training_kernels_of_a_preset() -> None:
    done = run("prebuild", "--preset", "llama", "--arch", "90", "--set", "family=bwd", "--dry-run",
               "--json")  # fmt: skip
    found = values(json.loads(done.stdout), "family")
    assert "bwd" in found
    assert not any(name.startswith("fwd") for name in found)


def test_narrowing_to_nothing_names_what_there_is() -> None:
    done = run("prebuild", "--preset", "llama,sd", "--dtype", "fp32", "--arch", "90")
    assert done.exit_code == 2
    assert "nothing is left" in done.stderr
    assert "dtype=fp32; they have dtype: fp16, bf16" in done.stderr


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
    assert "3 to make, 0 cached: about " in done.stdout
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


@pytest.mark.parametrize("kind", ["file", "proc", "open to all"])
def test_what_keeps_nothing_is_refused_before_the_first_compile(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "place"
    if kind == "file":
        place.write_text("in the way")
    elif kind == "proc":
        place = Path("/proc/x")
        if not place.parent.is_dir():
            pytest.skip("needs /proc")
    elif files.HAS_OWNERS:
        place.mkdir()
        place.chmod(0o777)
    else:
        pytest.skip("needs POSIX owners and modes")
    monkeypatch.setattr(pool, "build_all", None)  # nothing gets there
    done = run("prebuild", *SMALL, "-j", "2", "--json", JITATTN_CACHE_DIR=str(place))
    assert (done.exit_code, done.stdout) == (1, "")
    (line,) = done.stderr.splitlines()
    assert f"{place} keeps no kernels" in line
    assert "set JITATTN_CACHE_DIR" in line


def test_a_disk_that_fills_up_meanwhile_is_a_failure_of_each_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> bool:
        return False

    monkeypatch.setattr(DiskCache, "write", fail)
    done = run("prebuild", *SMALL, "-j", "1", "--json")
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    assert (counts["compiled"], counts["failed"], counts["bytes"]) == (0, 3, 0)
    assert "does not keep it" in done.stderr


def test_forbidden_compiles_are_refused_before_the_first() -> None:
    done = run("prebuild", *SMALL, JITATTN_NO_COMPILE="1")
    assert (done.exit_code, done.stdout) == (2, "")
    assert done.stderr == (
        "jitattn-cache: JITATTN_NO_COMPILE=1 forbids what prebuild does; unset it for this "
        "command\n"
    )


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
    assert "limited to 40.0 KiB; raise JITATTN_CACHE_MAX_BYTES" in done.stderr


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
    again = run("prebuild", *SMALL, "-j", "1")
    other = run("prebuild", *SMALL[:-1], "causal", "-j", "2")
    compilers._choose.cache_clear()
    assert "0 to make, 3 cached" in done.stdout
    assert "0 compiled, 3 cached, 0 failed" in again.stdout
    assert (other.exit_code, other.stdout) == (1, "")
    assert other.stderr.startswith("jitattn-cache: no NVRTC is installed: pip install ")
    assert len(other.stderr.splitlines()) == 1


def test_dry_run_estimates_time_and_size() -> None:
    rows = json.loads(run("prebuild", *SMALL, "--dry-run", "--json").stdout)
    assert {row["estimated_seconds"] for row in rows} == {2.0}  # nothing is known yet
    text = run("prebuild", *SMALL, "--dry-run", "-j", "2").stdout.splitlines()[-1]
    assert text == "3 to make, 0 cached: about 3 s on 2 processes, and 275.4 KiB"
    built = json.loads(run("prebuild", *SMALL, "-j", "1", "--json").stdout)
    other = ["--arch", "86", "--dtype", "fp16", "--head-dim", "16", "--mask", "full"]
    after = json.loads(run("prebuild", *other, "--dry-run", "--json").stdout)
    assert {row["estimated_bytes"] for row in after} == {round(built["bytes"] / 3)}
    made = json.loads(run("list", "--json").stdout)
    mean = sum(row["compile_ms"] for row in made) / 3e3
    assert after[0]["estimated_seconds"] == pytest.approx(mean, abs=1e-3)
    (cached, *_) = json.loads(run("prebuild", *SMALL, "--dry-run", "--json").stdout)
    assert "estimated_seconds" not in cached


def test_kernels_that_differ_are_told_apart() -> None:
    archs = ["80", "86", "90"]
    for chosen in (
        choices.preset(["all"]),
        [{"dtype": ["fp16", "bf16", "fp32"], "out_dtype": "fp32", "mask": "window"}],
        [{"dtype": "bf16", "family": ["fwd", "bwd", "combine"], "sinks": ["on", "off"]}],
    ):
        specs = choices.specs_of(chosen, archs)
        assert len(specs) > 20
        assert len({describe(spec.to_dict()) for spec in specs}) == len(specs)
    words = ["--arch", ",".join(archs), "--preset", "all", "--dry-run"]
    lines = run("prebuild", *words).stdout.splitlines()
    assert len(set(lines)) == len(lines)
    assert "to make  fwd sm_80 bf16 64 causal 64x64x2" in lines


def test_native_is_the_gpus_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpus, "_capabilities", lambda: [(9, 0), (8, 6), (9, 0)])
    rows = forward_rows("--arch", "native,80", "--dtype", "bf16")
    assert values(rows, "arch") == {"sm_90", "sm_86", "sm_80"}
    for found, text in (([], "no GPU is found here"), ([(7, 5)], "a GPU here is sm_75")):
        monkeypatch.setattr(gpus, "_capabilities", lambda found=found: found)
        refused = run("prebuild", "--arch", "native")
        assert refused.exit_code == 2
        assert text in refused.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(("number", "jobs"), [(signal.SIGINT, 2), (signal.SIGTERM, 2),
                                              (signal.SIGTERM, 1)])  # fmt: skip
def test_a_signal_ends_it_cleanly(number: signal.Signals, jobs: int, cache_dir: Path) -> None:
    dims = ",".join(map(str, range(1, 257)))
    words = ["--arch", "80", "--set", "family=combine", "--dtype", "bf16", "--head-dim", dims]
    command = [sys.executable, "-m", "jitattn", "prebuild", *words, "-j", str(jobs)]
    root = Path(__file__).parents[3]
    started = subprocess.Popen(
        command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert started.stderr is not None
    first = started.stderr.readline()
    assert re.match(r"\[1/256\] compiled combine sm_80 bf16 ", first)
    time.sleep(0.7)
    started.send_signal(number)
    out, errors = started.communicate(timeout=60)
    assert started.returncode == 128 + number
    assert out == ""
    last = errors.splitlines()[-1]
    found = re.search(r"stopped: ([0-9]+) kernels? (?:is|are) in .*, ([0-9]+) of them new; "
                      r"([0-9]+) not made", last)  # fmt: skip
    assert found is not None, errors
    kept, new, left = map(int, found.groups())
    assert kept == new > 0
    assert kept + left == 256
    assert kept <= len(DiskCache(cache_dir).keys()) <= kept + jobs + 1
    assert json.loads(run("verify", "--json").stdout)["bad"] == []


def test_workers_warnings_are_given_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "file"))
    specs = pool_specs()
    outcomes = list(pool.build_all(specs, 2))
    assert [outcome.origin for outcome in outcomes] == ["compiled"] * len(specs)
    warnings = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert len(warnings) == 1
    assert str(tmp_path / "file") in warnings[0]
    assert capfd.readouterr().err == ""


def pool_specs() -> list[KernelSpec]:
    from tests.cpu.specs import combine_spec

    return [combine_spec(head_dim_v=dim) for dim in (16, 32, 48, 64)]


def test_progress_says_what_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    pace = progress.Pace(10)
    assert (pace.left(), pace.text()) == ("", "0.0/s")
    for _ in range(4):
        now += 2.0
        pace.step()
    assert (pace.left(), pace.text()) == ("12 s left", "0.5/s, 12 s left")
    for _ in range(6):
        pace.step()
    assert pace.left() == ""
