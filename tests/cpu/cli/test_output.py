"""Tests command output: complete or a named failure, with printable characters only."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from jitattn.cache import files
from jitattn.cache.archive import export
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry, cache_key
from jitattn.cli import main, streams
from jitattn.jit import build
from jitattn.spec.text import number_in, one_line, printable, version_numbers
from tests.cpu.commands import run
from tests.cpu.processes import FORK, Child
from tests.cpu.specs import CACHED, combine_spec, fake_entry

FULL = Path("/dev/full")
HAS_FULL = pytest.mark.skipif(
    not FULL.is_char_device() or shutil.which("sh") is None, reason="needs /dev/full and sh"
)
EVIL = "a\n\x1b[31mb\r\u2028\u202e"


def shell(redirection: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with its streams redirected."""
    return subprocess.run(
        ["sh", "-c", f'"$0" -m jitattn.cli "$@" {redirection}', sys.executable, *arguments],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


COMMANDS = [
    ["--help"], ["list", "--help"], ["list"], ["list", "--json"], ["show", "KEY"],
    ["show", "KEY", "--source", "--json"], ["extract", "KEY", "-o", "OUT.cubin"], ["path"],
    ["stats"], ["stats", "--json"], ["verify"], ["doctor"], ["prebuild", "--presets"],
    ["prebuild", "--arch", "86", "--dry-run"], ["export", "OUT.zip"], ["import", "IN.zip"],
    ["prebuild", "--arch", "80", "--set", "family=combine", "--head-dim", "16", "-j", "1"],
    ["prune", "-y"], ["clear", "-y"],
]  # fmt: skip


def with_full_stdout(arguments: list[str], messages: Path) -> int:
    """Run a command in a forked child whose stdout is full; its status."""

    def act() -> object:
        sys.stdout.flush()
        os.dup2(os.open(FULL, os.O_WRONLY), 1)
        os.dup2(os.open(messages, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 2)
        sys.stdout, sys.stderr = open(1, "w"), open(2, "w", buffering=1)  # noqa: SIM115
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        sys.stdout.flush()  # as Python does at its end
        sys.stderr.flush()
        return ended.value.code

    return Child(act).result()


@FORK
@HAS_FULL
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_full_disk_is_a_line_and_a_status_of_every_command(cache_dir: Path, tmp_path: Path) -> None:
    built = build.build(combine_spec())
    export(tmp_path / "IN.zip", [Entry(built.cubin, built.metadata)])
    assert {words[0] for words in COMMANDS} == {"--help", *main.commands}
    for arguments in COMMANDS:
        words = [built.key if word == "KEY" else word for word in arguments]
        words = [str(tmp_path / word) if word[:2] in ("OU", "IN") else word for word in words]
        assert with_full_stdout(words, tmp_path / "messages") == 1, words
        messages = (tmp_path / "messages").read_text().splitlines()
        assert messages[-1].endswith("standard output cannot be written: No space left on device")
        assert not any("Traceback" in line for line in messages), words


@HAS_FULL
@pytest.mark.parametrize("arguments", [["--help"], ["list", "--json"], ["stats"]], ids=" ".join)
def test_full_disk_in_a_process_of_its_own(cache_dir: Path, arguments: list[str]) -> None:
    done = shell(">/dev/full", *arguments)
    assert done.returncode == 1
    assert done.stderr == (
        "jitattn-cache: standard output cannot be written: No space left on device\n"
    )


@HAS_FULL
@pytest.mark.parametrize(
    ("redirection", "arguments", "status", "text"),
    [
        (">&-", ["path"], 1, "standard output cannot be written: it is closed"),
        (">&-", ["list", "--json"], 1, "standard output cannot be written: it is closed"),
        ("2>/dev/full", ["path"], 0, ""),
        ("2>/dev/full", ["list"], 0, ""),
        ("2>&-", ["list"], 0, ""),
        ("2>/dev/full", ["nonsense"], 2, ""),
        ("2>/dev/full", ["show", "abcd"], 1, ""),
        ("2>/dev/full", ["--help"], 0, ""),
        (">/dev/full 2>/dev/full", ["path"], 1, ""),
        (">&- 2>&- <&-", ["path"], 1, ""),
        ("<&-", ["clear"], 2, "cannot ask here"),
        ("</dev/null", ["clear"], 2, "cannot ask here"),
        ("| true", ["list", "--help"], 0, ""),
    ],
)
def test_streams_that_do_not_work(
    cache_dir: Path, redirection: str, arguments: list[str], status: int, text: str
) -> None:
    done = shell(redirection, *arguments)
    assert done.returncode == status, done.stderr
    assert text in done.stderr
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@HAS_FULL
def test_work_is_done_where_nobody_can_read_of_it(cache_dir: Path) -> None:
    words = ["--arch", "80", "--set", "family=combine", "--dtype", "bf16", "--head-dim", "16,32"]
    done = shell("2>/dev/full", "prebuild", *words, "-j", "2", "--json")
    assert done.returncode == 0
    assert json.loads(done.stdout)["compiled"] == 2
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"
    for stream in ("2>&-", "<&- 2>&-"):
        assert json.loads(shell(stream, "prebuild", *words, "--json").stdout)["cached"] == 2


@HAS_FULL
def test_reader_that_has_seen_enough_gets_no_message(cache_dir: Path) -> None:
    done = shell("2>err | (exec true); cat err; rm err", "prebuild", "--presets")
    assert done.stdout == ""


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_any_encoding_will_do(cache_dir: Path, encoding: str) -> None:
    environment = {**os.environ, "PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    for arguments in (["prebuild", "--help"], ["stats"], ["path"]):
        done = subprocess.run(
            [sys.executable, "-m", "jitattn.cli", *arguments],
            cwd=Path(__file__).parents[3],
            env={**environment, "JITATTN_CACHE_DIR": f"{cache_dir}-é-…-\udcff"},
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_help_keeps_its_lines(cache_dir: Path) -> None:
    for arguments in ([], ["--help"], ["list", "--help"]):
        assert "Usage:" in run(*arguments).output.splitlines()[0]
        assert len(run(*arguments).output.splitlines()) > 10


def test_result_is_not_lost_on_a_stream_of_a_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(streams.click, "echo", fail)
        broken.setattr(streams, "_abandon", lambda _: None)
        streams.write_message("nobody reads it")
        with pytest.raises(SystemExit) as ended:
            streams.write("a result")
    assert ended.value.code == 1


def is_clean(text: str) -> bool:
    return all(one.isprintable() or one in "\n\t" for one in text)


def test_nothing_of_an_entry_reaches_a_terminal_as_it_is(filled: DiskCache) -> None:
    """The log of a compiler is free text; spec, toolchain and options are not (test_metadata)."""
    entry = fake_entry(1)
    spec = {**entry.metadata.spec, "key": 5, "where": "elsewhere", "registers": "many"}
    metadata = replace(entry.metadata, spec=spec, log=f"{EVIL}\x07\x9b31m")
    key = cache_key(
        spec, metadata.source_digest, metadata.header_digest, metadata.options, metadata.toolchain
    )
    filled.write(Entry(entry.cubin, replace(metadata, key=key)))
    rows = {row["key"]: row for row in json.loads(run("list", "--json").stdout)}
    assert (rows[key]["where"], rows[key]["registers"]) == ("user", 32)
    for command in (["list"], ["show", key], ["verify", "--recompile"], ["list", "--sort", "key"]):
        done = run(*command)
        assert done.exit_code == 0, done.output
        assert is_clean(done.stdout)
        assert is_clean(done.stderr)
    assert "\\x1b[31mb" in run("show", key).stdout


@pytest.mark.skipif(not files.HAS_OWNERS, reason="needs names of any characters")
def test_names_of_files_are_shown_on_one_line(
    filled: DiskCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    folder = tmp_path / f"layer{EVIL}"
    shutil.copytree(filled.root, folder)
    folder.chmod(0o777)
    monkeypatch.setenv("JITATTN_CACHE_PATH", str(folder))
    for command in (
        ["list"], ["stats"], ["verify"], ["verify", "--json"], ["doctor"],
        ["import", str(folder / "x.zip")], ["export", str(folder / "no" / "x.zip")],
        ["prebuild", "--spec", str(folder / "a.toml")], ["list", "--sort", EVIL],
        ["list", "--arch", EVIL], ["extract", EVIL], ["show", f"--{EVIL}"], ["list", EVIL], [EVIL],
        ["prebuild", "--set", EVIL], ["prebuild", "--arch", "80", "--dtype", EVIL],
        ["extract", CACHED_KEY, "-o", str(folder / "no" / "x")],
    ):  # fmt: skip
        key = filled.keys()[0]
        done = run(*(key if word == CACHED_KEY else word for word in command))
        assert isinstance(done.exception, SystemExit | None), done.exception
        for text in (done.stdout, done.stderr):
            assert is_clean(text), command
            assert "a\n" not in text, command  # the break in the name
    build.clear_memory()
    files._warned.clear()
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / "empty"))
    with caplog.at_level(logging.DEBUG, "jitattn"):
        build.build(CACHED[0])
    texts = [one.getMessage() for one in caplog.records]
    assert any("layera\\n\\x1b[31mb" in text for text in texts)
    assert all(text.isprintable() for text in texts)


CACHED_KEY = "the key of a kernel"


def test_text() -> None:
    assert one_line(EVIL) == "a\\n\\x1b[31mb\\r\\u2028\\u202e"
    assert one_line(Path("a\tb\udcff")) == "a\\tb\\udcff"
    assert printable("a\tb\nc\x1b[0m\x07é") == "a\tb\nc\\x1b[0m\\x07é"
    assert [number_in(text) for text in ("0", "007", "123456789012345")] == [0, 7, 123456789012345]
    assert {number_in(text) for text in ("", "-1", "1.0", "٣", "²", "1_0", " 1", "9" * 16)} == {
        None
    }
    assert version_numbers("nvrtc 13.0.88.dev1") == (13, 0, 88)
    assert version_numbers("9" * 5000)[:1] == (999999,)
    assert version_numbers("١٢.x") == ()


@pytest.mark.parametrize(
    "arguments",
    [
        ["prune", "--max-bytes", "٣٤٥"],
        ["prune", "--max-bytes", "٣K"],
        ["prune", "--older-than", "٣d"],
        ["prebuild", "--arch", "80", "-j", "٢"],
        ["prebuild", "--arch", "80", "--gear", "٢"],
        ["prebuild", "--arch", "٨٠"],
        ["list", "--arch", "८०"],
        ["prebuild", "--arch", "80", "--head-dim", "٦٤"],
        ["prebuild", "--arch", "80", "--head-dim", "64:٦٤"],
        ["prebuild", "--arch", "80", "-j", "0"],
        ["prebuild", "--arch", "80", "-j", "9" * 5000],
        ["prebuild", "--arch", "80", "--head-dim", "9" * 5000],
        ["prebuild", "--arch", "9" * 5000],
    ],
    ids=lambda words: " ".join(words)[:40].encode("ascii", "backslashreplace").decode(),
)
def test_digits_of_other_scripts_are_no_numbers(arguments: list[str]) -> None:
    done = run(*arguments)
    assert done.exit_code == 2, done.output
    assert "it must be" in done.stderr
    assert done.stdout == ""
