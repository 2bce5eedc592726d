"""Looking at, checking, moving and deleting kernels from the command line."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from jitattn import doctor
from jitattn.cli import main
from jitattn.jit import build, choices, compilers, files
from jitattn.jit.cache import DiskCache
from jitattn.jit.entry import Entry, sha256

from .specs import fake_entry, forward_spec, merge_spec

SPECS = [merge_spec(), merge_spec("sm_86"), forward_spec()]


def run(*arguments: str, **environment: str) -> Result:
    return CliRunner().invoke(main, list(arguments), env=environment)


def result(*arguments: str, status: int = 0) -> object:
    done = run(*arguments, "--json")
    assert done.exit_code == status, done.output
    return json.loads(done.stdout)


@pytest.fixture
def filled(cache_dir: Path) -> DiskCache:
    """A cache with three kernels."""
    for spec in SPECS:
        build.build(spec)
    return DiskCache(cache_dir)


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
    refused = run("list", "--sort", "beauty")
    assert refused.exit_code == 2
    assert "compile_ms" in refused.stderr


def test_empty_list_says_so(cache_dir: Path) -> None:
    done = run("list")
    assert (done.exit_code, done.stdout, done.stderr) == (0, "", "no kernels\n")
    assert result("list") == []


def test_show(filled: DiskCache) -> None:
    built = build.build(SPECS[2])
    shown = result("show", built.key[:12])
    assert shown["key"] == built.key
    assert shown["spec"] == SPECS[2].to_dict()
    assert shown["command"] == choices.command(SPECS[2])
    assert "jitattn_fwd" in shown["log"]
    assert "kHeadDim = 16" in shown["header"]
    assert shown["templates_are_current"]
    assert Path(shown["cubin"]).read_bytes() == built.cubin
    text = run("show", built.key, "--source").stdout
    assert "kHeadDim = 16" in text
    assert "__global__" in text


def test_show_of_another_version(filled: DiskCache) -> None:
    metadata = build.build(SPECS[0]).metadata
    other = replace(metadata, key="ab" * 32, source_digest="0" * 64, header_digest="0" * 64)
    filled.write(Entry(build.build(SPECS[0]).cubin, other))
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
    built = build.build(SPECS[0])
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


def test_path_and_stats(filled: DiskCache) -> None:
    assert run("path").stdout.strip() == result("path") == str(filled.root)
    summary = result("stats")
    (row,) = summary["directories"]
    assert (row["kernels"], row["sm_80"], row["sm_86"]) == (3, 2, 1)
    assert summary["limit_bytes"] == 512 << 20
    assert summary["disk_bytes"] >= row["bytes"] > 0
    assert str(filled.root) in run("stats").stdout


def test_verify_finds_and_repairs(filled: DiskCache) -> None:
    assert result("verify") == {"checked": 3, "recompiled": 0, "not_comparable": 0, "bad": []}
    compared = result("verify", "--recompile")
    assert (compared["recompiled"], compared["bad"]) == (3, [])
    key = build.build(SPECS[0]).key
    cubin = filled.paths(key)[0]
    good = cubin.read_bytes()
    cubin.write_bytes(good[:-1])
    (bad,) = result("verify", status=1)["bad"]
    assert (bad["key"], bad["repaired"]) == (key, False)
    assert cubin.exists()
    assert "bad" in run("verify").stdout
    (repaired,) = result("verify", "--repair")["bad"]
    assert repaired["repaired"]
    assert cubin.read_bytes() == good
    assert result("verify")["bad"] == []


def test_verify_sees_what_a_checksum_cannot(filled: DiskCache) -> None:
    built = build.build(SPECS[0])
    # Everything agrees, but the key is not that of these facts.
    forged = replace(built.metadata, source_digest="0" * 64)
    filled.write(Entry(built.cubin, forged))
    (bad,) = result("verify", status=1)["bad"]
    assert "key" in bad["reason"]
    # The key is right, but the code is not what the compiler makes of it.
    cubin = bytearray(built.cubin)
    cubin[len(cubin) // 2] ^= 1
    filled.write(Entry(bytes(cubin), replace(built.metadata, sha256=sha256(bytes(cubin)))))
    assert result("verify")["bad"] == []
    (bad,) = result("verify", "--recompile", status=1)["bad"]
    assert "other bytes" in bad["reason"]


def test_verify_passes_over_other_compilers(filled: DiskCache) -> None:
    filled.write(fake_entry(1, toolchain="nvrtc 12.1.105"))
    compared = result("verify", "--recompile")
    assert (compared["recompiled"], compared["not_comparable"]) == (3, 1)


def test_verify_of_damaged_metadata(filled: DiskCache) -> None:
    key = build.build(SPECS[0]).key
    filled.paths(key)[1].write_text("{}")
    (bad,) = result("verify", "--repair", status=1)["bad"]
    assert not bad["repaired"]  # nobody knows any more what it was
    assert key not in {entry.key for entry in filled.entries()}


def age(disk: DiskCache, key: str, days: float) -> None:
    moment = time.time() - days * 86400
    os.utime(disk.paths(key)[1], (moment, moment))


def test_prune(filled: DiskCache) -> None:
    old, middle, new = (build.build(spec).key for spec in SPECS)
    other = fake_entry(1, toolchain="nvrtc 12.1.105").metadata.key
    filled.write(fake_entry(1, toolchain="nvrtc 12.1.105"))
    age(filled, old, 40)
    age(filled, middle, 10)
    assert result("prune", "--older-than", "30d", "--dry-run")["kernels"] == [old]
    assert result("prune", "--other-toolchains", "--dry-run")["kernels"] == [other]
    assert result("prune", "--stale", "--dry-run")["kernels"] == [other]
    largest_first = result("prune", "--max-bytes", "1", "--dry-run")["kernels"]
    assert {*largest_first} == {old, middle, new, other}
    assert len(filled.keys()) == 4
    refused = run("prune", "--older-than", "30d")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert result("prune", "--older-than", "30d", "--stale", "-y")["kernels"] == sorted(
        [old, other]
    )
    assert filled.keys() == sorted([middle, new])
    assert run("prune", "--older-than", "soon").exit_code == 2
    assert run("prune", "--max-bytes", "much").exit_code == 2


def test_prune_sweeps_leftovers(filled: DiskCache) -> None:
    draft = filled.store / "tmp" / f"1-{'a' * 16}"
    draft.touch()
    os.utime(draft, (1, 1))
    filled.paths(build.build(SPECS[0]).key)[0].write_bytes(b"bad")
    filled.read(build.build(SPECS[0]).key, "sm_80")  # sets it aside
    assert result("prune")["swept"] == 3
    assert files.scan(filled.store / "bad") == files.scan(filled.store / "tmp") == []


def test_clear(filled: DiskCache) -> None:
    refused = run("clear")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert result("clear", "--dry-run")["deleted"] == 3
    assert len(filled.keys()) == 3
    assert result("clear", "--arch", "86", "-y")["deleted"] == 1
    assert run("clear", "--yes").stdout.strip() == "2 deleted"
    assert filled.keys() == []


def test_export_import_clear(filled: DiskCache, tmp_path: Path) -> None:
    archive = tmp_path / "kernels.zip"
    exported = result("export", str(archive), "--arch", "80")
    assert exported["kernels"] == 2
    other = str(tmp_path / "other")
    done = run("import", str(archive), "--sha256", exported["sha256"], JITATTN_CACHE_DIR=other)
    assert done.exit_code == 0, done.output
    assert "2 kernels imported" in done.stdout
    again = run("import", str(archive), JITATTN_CACHE_DIR=other)
    assert "were there already" in again.stdout
    rows = json.loads(run("list", "--json", JITATTN_CACHE_DIR=other).stdout)
    assert [row["where"] for row in rows] == ["imported"] * 2
    kept = run("clear", "-y", JITATTN_CACHE_DIR=other)
    assert "1 imported archives kept" in kept.stdout
    gone = run("clear", "-y", "--imported", JITATTN_CACHE_DIR=other)
    assert "1 imported archives deleted" in gone.stdout
    assert json.loads(run("list", "--json", JITATTN_CACHE_DIR=other).stdout) == []
    refused = run("import", str(archive), "--sha256", "0" * 64, JITATTN_CACHE_DIR=other)
    assert refused.exit_code == 1
    assert "refused" in refused.stderr


def test_export_of_choices_leaves_bad_ones_out(filled: DiskCache, tmp_path: Path) -> None:
    spec_file = tmp_path / "kernels.json"
    spec_file.write_text(json.dumps([choices.to_choice(SPECS[0]), choices.to_choice(SPECS[2])]))
    archive = str(tmp_path / "kernels.zip")
    assert result("export", archive, "--spec", str(spec_file))["kernels"] == 2
    filled.paths(build.build(SPECS[0]).key)[0].write_bytes(b"bad")
    done = result("export", archive, "--spec", str(spec_file), status=1)
    assert (done["kernels"], done["left_out"]) == (1, 1)


def test_read_only_cache_is_not_changed(filled: DiskCache) -> None:
    for arguments in (["clear", "-y"], ["prune", "-y"], ["verify", "--repair"]):
        done = run(*arguments, JITATTN_CACHE="ro")
        assert done.exit_code == 2
        assert "JITATTN_CACHE=ro" in done.stderr
    assert len(filled.keys()) == 3


def test_wrong_environment_is_one_line(cache_dir: Path) -> None:
    done = run("stats", JITATTN_CACHE_MAX_BYTES="much")
    assert done.exit_code == 1
    assert "JITATTN_CACHE_MAX_BYTES='much'" in done.stderr
    assert "Traceback" not in done.output


def test_doctor(filled: DiskCache) -> None:
    done = run("doctor", "--json")
    found = json.loads(done.stdout)
    assert {one["area"] for one in found} >= {"python", "torch", "nvrtc", "driver", "cache"}
    assert any(str(compilers.chosen()) in one["found"] for one in found)
    assert any(str(filled.root) in one["found"] for one in found)
    assert done.exit_code == any(one["status"] == "bad" for one in found)
    assert str(filled.root) in run("doctor").stdout


def findings(area: str) -> list[tuple[str, str, str]]:
    return [(one.status, one.found, one.advice) for one in doctor.examine() if one.area == area]


def test_doctor_knows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_CASHE", "ro")
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "soon")
    found = findings("environment")
    assert any(status == "warn" and "JITATTN_CACHE" in advice for status, _, advice in found)
    assert any(status == "bad" and "LOCK_TIMEOUT='soon'" in text for status, text, _ in found)
    assert run("doctor").exit_code == 1


@pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
def test_doctor_knows_who_can_write(filled: DiskCache) -> None:
    filled.store.chmod(0o777)
    bad = [text for status, text, _ in findings("cache") if status == "bad"]
    assert bad
    assert "others may write to it" in bad[0]
    filled.store.chmod(0o700)


def test_doctor_knows_mixed_installations(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"cupy-cuda12x": "14.0", "cupy-cuda13x": "14.2", "torch": "2.11.0+cu130"}
    monkeypatch.setattr(doctor, "_version", versions.get)
    monkeypatch.setattr(compilers, "driver_major", lambda: 12)
    found = findings("cupy")
    assert any(status == "bad" and "several CuPy" in text for status, text, _ in found)
    del versions["cupy-cuda12x"]
    found = findings("cupy")
    assert any(status == "bad" and "the driver knows 12" in text for status, text, _ in found)
    versions.clear()
    (first, *_) = findings("cupy")
    assert first[0] == "bad"
    assert "cu12" in first[2]


def test_doctor_finishes_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> dict:
        raise OSError("broken")

    monkeypatch.setattr(compilers, "installed", broken)
    assert any("broken" in text for _, text, _ in findings("nvrtc"))
    assert findings("cache")
