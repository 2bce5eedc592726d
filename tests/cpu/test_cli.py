"""jitattn-cache, as a user runs it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jitattn.cli import main

SMALL = ["--arch", "86", "--dtype", "bf16", "--head-dim", "16", "--mask", "full"]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, list(arguments))


def test_prebuild_list_clear(cache_dir: Path) -> None:
    first = run("prebuild", *SMALL, "-j", "1", "--json")
    assert first.exit_code == 0, first.output
    counts = json.loads(first.stdout)
    assert (counts["compiled"], counts["cached"], counts["failed"]) == (4, 0, 0)
    assert counts["bytes"] > 4000

    listed = json.loads(run("list", "--json").stdout)
    assert len(listed) == 4
    for row in listed:
        assert row["arch"] == "sm_86"
        assert len(row["key"]) == 64
        assert {"registers", "spill_bytes", "smem_bytes", "compile_ms", "bytes"} <= row.keys()
        assert all(isinstance(value, str | int | float) for value in row.values())
    assert sorted(row.get("block_q", 0) for row in listed) == [0, 16, 64, 128]

    again = json.loads(run("prebuild", *SMALL, "-j", "1", "--json").stdout)
    assert (again["compiled"], again["failed"]) == (0, 0)

    assert run("path").stdout.strip() == str(cache_dir)
    refused = run("clear")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert len(json.loads(run("list", "--json").stdout)) == 4
    assert run("clear", "--yes").stdout.strip() == "4 deleted"
    assert json.loads(run("list", "--json").stdout) == []


@pytest.mark.slow
def test_prebuild_in_processes(cache_dir: Path) -> None:
    done = run("prebuild", *SMALL, "-j", "2")
    assert done.exit_code == 0, done.output
    assert "4 compiled, 0 cached, 0 failed" in done.stdout
    assert done.stderr.count("compiled fwd sm_86 bf16") == 3  # progress, on stderr only
    assert "[4/4]" in done.stderr
    table = run("list").stdout
    assert table.count("sm_86") == 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--arch", "75"], "75"),
        (["--arch", "80", "--dtype", "int8"], "int8"),
        (["--arch", "80", "--head-dim", "257"], "257"),
        (["--arch", "80", "--mask", "window"], "window"),
    ],
)
def test_bad_choices_end_with_2(arguments: list[str], text: str) -> None:
    done = run("prebuild", *arguments)
    assert done.exit_code == 2
    assert text in done.stderr
    assert done.stdout == ""


def test_unknown_architecture_fails_by_name() -> None:
    done = run(
        "prebuild", "--arch", "199", "--head-dim", "16", "--dtype", "bf16", "-j", "1", "--json"
    )
    assert done.exit_code == 1
    assert json.loads(done.stdout)["compiled"] == 0
    assert "sm_199 is not known to nvrtc" in done.stderr


def test_unequal_head_dims(cache_dir: Path) -> None:
    done = run(
        "prebuild", "--arch", "80", "--dtype", "bf16", "--head-dim", "16:32", "--mask", "full",
        "-j", "1", "--json",
    )  # fmt: skip
    assert json.loads(done.stdout)["failed"] == 0
    rows = json.loads(run("list", "--json").stdout)
    assert {(row.get("head_dim", 16), row["head_dim_v"]) for row in rows} == {(16, 32)}


def test_prebuild_that_stores_nothing_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "file"))
    done = run("prebuild", *SMALL, "-j", "1", "--json")
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    assert (counts["compiled"], counts["failed"], counts["bytes"]) == (0, 4, 0)
    assert "does not keep it" in done.stderr


@pytest.mark.parametrize("mode", ["ro", "off"])
def test_prebuild_needs_a_cache_to_write(monkeypatch: pytest.MonkeyPatch, mode: str) -> None:
    monkeypatch.setenv("JITATTN_CACHE", mode)
    done = run("prebuild", *SMALL)
    assert done.exit_code == 2
    assert f"JITATTN_CACHE={mode}" in done.stderr
