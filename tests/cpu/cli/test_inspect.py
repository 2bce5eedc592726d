"""Tests the commands that inspect kernels."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

import jitattn
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry
from jitattn.cli.tables import ending, fitting
from jitattn.cli.words import counted, duration, size
from jitattn.jit import build
from tests.cpu.commands import result, run
from tests.cpu.specs import CACHED, fake_entry


def test_list(filled: DiskCache) -> None:
    rows = result("list")
    assert [row["key"] for row in rows] == filled.keys()
    assert {row["where"] for row in rows} == {"user"}
    for row in rows:
        assert all(isinstance(value, str | int | float) for value in row.values())
    assert [row["arch"] for row in result("list", "--arch", "86")] == ["sm_86"]
    assert [row["family"] for row in result("list", "--family", "fwd")] == ["fwd"]
    assert result("list", "--dtype", "fp16") == []
    sizes = [row["bytes"] for row in result("list", "--sort", "bytes", "--reverse")]
    assert sizes == sorted(sizes, reverse=True)
    assert len(result("list", "--sort", "block_q")) == 3  # a column that merges do not have
    table = run("list").stdout
    assert table.count("sm_80") == 2
    assert "\n" in table
    for option, word in (
        ("--dtype", "fp61"), ("--mask", "casual"), ("--family", "foward"), ("--head-dim", "x"),
        ("--head-dim", "257"), ("--where", "users"), ("--arch", "8"),
    ):  # fmt: skip
        refused = run("list", option, word)
        assert (refused.exit_code, refused.stdout) == (2, ""), option
        assert word in refused.stderr
    refused = run("list", "--sort", "beauty")
    assert refused.exit_code == 2
    assert "compile_ms" in refused.stderr


def test_empty_list_says_so(cache_dir: Path) -> None:
    done = run("list")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no kernels\n")
    assert result("list") == []


def test_show(filled: DiskCache) -> None:
    built = build.build(CACHED[2])
    shown = result("show", built.key[:12])
    assert shown["key"] == built.key
    assert shown["spec"] == CACHED[2].to_dict()
    assert shown["command"] == CACHED[2].command()
    assert "jitattn_fwd" in shown["log"]
    assert "kHeadDim = 16" in shown["header"]
    assert shown["templates_are_current"]
    assert Path(shown["cubin"]).read_bytes() == built.cubin
    text = run("show", built.key, "--source").stdout
    assert "kHeadDim = 16" in text
    assert "__global__" in text


def test_show_of_another_version(filled: DiskCache) -> None:
    metadata = build.build(CACHED[0]).metadata
    other = replace(metadata, key="ab" * 32, source_digest="0" * 64, header_digest="0" * 64)
    filled.write(Entry(build.build(CACHED[0]).cubin, other))
    shown = result("show", "abab")
    assert shown["header"] is None
    assert not shown["templates_are_current"]
    assert "another version" in run("show", "abab").stdout


@pytest.mark.parametrize("command", ["show", "extract"])
def test_keys_may_be_abbreviated(filled: DiskCache, command: str, tmp_path: Path) -> None:
    entry = fake_entry(1)
    for key in ("ab" * 32, "ab" * 31 + "cd"):
        filled.write(Entry(entry.cubin, replace(entry.metadata, key=key)))
    for key, text in (
        ("abab", "2 keys begin with abab"),
        ("ffffffffff", "no kernel's key begins"),
        ("abc", "at least 4"),
        ("../..", "hexadecimal"),
    ):
        done = run(command, key)
        assert done.exit_code == 1
        assert text in done.stderr
        assert done.stdout == ""


def test_extract(filled: DiskCache, tmp_path: Path) -> None:
    built = build.build(CACHED[0])
    target = tmp_path / "kernel.cubin"
    assert result("extract", built.key, "-o", str(target))["bytes"] == len(built.cubin)
    assert target.read_bytes() == built.cubin
    target.write_bytes(b"mine")
    refused = run("extract", built.key, "-o", str(target))
    assert refused.exit_code == 1
    assert "-y" in refused.stderr
    assert target.read_bytes() == b"mine"
    assert run("extract", built.key, "-o", str(target), "-y").exit_code == 0
    assert target.read_bytes() == built.cubin
    filled.paths(built.key)[0].write_bytes(b"damaged")
    assert run("extract", built.key, "-o", str(tmp_path / "x")).exit_code == 1
    assert not (tmp_path / "x").exists()


def test_extract_to_standard_output(filled: DiskCache) -> None:
    built = build.build(CACHED[0])
    command = [sys.executable, "-m", "jitattn", "extract", built.key, "-o", "-"]
    done = subprocess.run(command, cwd=Path(__file__).parents[3], capture_output=True, check=True)
    assert done.stdout == built.cubin
    assert done.stderr.decode() == f"{size(len(built.cubin))} to standard output\n"


def test_path_makes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JITATTN_CACHE_DIR")
    for name in ("HOME", "XDG_CACHE_HOME", "LOCALAPPDATA", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shown = Path(result("path"))
    assert shown.is_relative_to(tmp_path / "home")
    assert run("list").exit_code == run("stats").exit_code == 0
    assert list((tmp_path / "home").iterdir()) == []
    build.build(CACHED[0])
    assert list(shown.glob("v1/*/*.cubin"))


def test_version_and_module() -> None:
    line = f"jitattn {jitattn.__version__}\n"
    assert run("--version").stdout == line
    for module in ("jitattn", "jitattn.cli"):
        command = [sys.executable, "-m", module, "--version"]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[3], capture_output=True, text=True, check=True
        )
        assert done.stdout == line


def test_help_shows_whole_sentences() -> None:
    text = run("--help").stdout
    assert not any(line.endswith("...") for line in text.splitlines()[1:])
    assert "Compile kernels into the cache, for any architecture; no GPU is" in text


def test_sizes_counts_and_durations() -> None:
    sizes = {0: "0 bytes", 1: "1 byte", 1023: "1023 bytes", 1024: "1.0 KiB", 74400: "72.7 KiB",
             1048575: "1.0 MiB", 512 << 20: "512.0 MiB", 3 << 40: "3.0 TiB"}  # fmt: skip
    assert {number: size(number) for number in sizes} == sizes
    assert [counted(number, "kernel") for number in (0, 1, 2)] == [
        "0 kernels", "1 kernel", "2 kernels",
    ]  # fmt: skip
    assert [duration(seconds) for seconds in (0.4, 59.4, 59.6, 3600, 7500)] == [
        "0 s", "59 s", "1 min 0 s", "1 h 0 min", "2 h 5 min",
    ]  # fmt: skip


def test_path_and_stats(filled: DiskCache) -> None:
    assert run("path").stdout.strip() == result("path") == str(filled.root)
    summary = result("stats")
    (row,) = summary["directories"]
    assert (row["kernels"], row["sm_80"], row["sm_86"]) == (3, 2, 1)
    assert summary["limit_bytes"] == 512 << 20
    assert summary["disk_bytes"] >= row["bytes"] > 0
    assert str(filled.root) in run("stats").stdout


def test_wrong_environment_is_one_line(cache_dir: Path) -> None:
    done = run("stats", JITATTN_CACHE_MAX_BYTES="much")
    assert done.exit_code == 1
    assert "JITATTN_CACHE_MAX_BYTES='much'" in done.stderr
    assert "Traceback" not in done.output


def test_no_directory_of_others_is_listed_as_good(filled: DiskCache) -> None:
    filled.store.chmod(0o777)
    done = run("list", "--json")
    filled.store.chmod(0o700)
    assert json.loads(done.stdout) == []
    assert "others may write to it" in done.stderr


def test_read_only_directories_are_listed_by_name(
    filled: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(filled.root))
    rows = result("list")
    assert [row["where"] for row in rows] == [str(filled.root)] * 3
    assert result("list", "--where", "user") == []
    assert [row["directory"] for row in result("stats")["directories"]] == [
        str(tmp_path / "empty"),
        str(filled.root),
    ]


def test_columns_of_other_kinds_are_sorted(filled: DiskCache) -> None:
    entry = fake_entry(1)
    spec = {**entry.metadata.spec, "block_q": "wide"}
    key = "ab" * 32
    filled.write(Entry(entry.cubin, replace(entry.metadata, key=key, spec=spec)))
    values = [row.get("block_q") for row in result("list", "--sort", "block_q")]
    assert values == [None, None, 16, "wide"]


def test_extract_checks_the_key_too(filled: DiskCache, tmp_path: Path) -> None:
    built = build.build(CACHED[0])
    filled.write(Entry(built.cubin, replace(built.metadata, source_digest="0" * 64)))
    done = run("extract", built.key, "-o", str(tmp_path / "x"))
    assert done.exit_code == 1
    assert "its key is not" in done.stderr
    assert not (tmp_path / "x").exists()


def test_tables_fit() -> None:
    widths, droppable = {"key": 16, "size": 5, "where": 30}, ("where", "size")
    assert fitting(widths, 55, droppable, ("where",)) == widths
    assert fitting(widths, 54, droppable, ("where",)) == {**widths, "where": 29}
    assert fitting(widths, 35, droppable, ("where",)) == {**widths, "where": 10}
    assert fitting(widths, 34, droppable, ("where",)) == {"key": 16, "size": 5}
    assert fitting(widths, 5, droppable, ("where",)) == {"key": 16}
    assert ending("/a/long/path", 7) == "…g/path"
    assert ending("short", 5) == "short"


@pytest.mark.skipif(shutil.which("script") is None, reason="needs script, for a terminal")
@pytest.mark.parametrize("width", [60, 80])
def test_narrow_terminals_show_numbers_and_tiles(
    filled: DiskCache, tmp_path: Path, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read-only directory has a long path, and two kernels differ in their tile alone."""
    long = tmp_path / ("a-long-name-" * 8) / "kernels"
    shutil.copytree(filled.root, long)
    long.chmod(0o700)
    build.build(replace(CACHED[2], tile=replace(CACHED[2].tile, stages=2)))
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(long))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    words = f"{sys.executable} -m jitattn "
    shown = {}
    for command in ("list", "stats"):
        done = subprocess.run(
            ["script", "-qec", words + command, "/dev/null"], cwd=Path(__file__).parents[3],
            capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        plain = re.sub("\x1b\\[[0-9;]*m", "", done.stdout)
        shown[command] = [line.rstrip() for line in plain.splitlines()]
    table = shown["list"]
    assert max(map(len, table)) <= width
    tiles = {re.search(r"16x[0-9x]+", line)[0] for line in table if " 16x" in line}
    assert tiles == {"16x64x3", "16x64x2"}
    head, user, imported = shown["stats"][:3]
    assert max(map(len, (head, user, imported))) <= width
    assert re.match(r" +4  +[0-9.]+ KiB +3 +1  user", user), shown["stats"]
    assert re.match(r" +3  +[0-9.]+ KiB +2 +1  read-only  …", imported)
    assert imported.endswith("kernels")
