"""Tests the commands that verify, move and delete kernels."""

from __future__ import annotations

import json
import os
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from jitattn.cache import files
from jitattn.cache.directory import Directory
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry, sha256
from jitattn.cli import main
from jitattn.jit import build, compilers
from tests.cpu.commands import result, run
from tests.cpu.specs import CACHED, combine_spec, fake_entry


def test_verify_finds_and_repairs(filled: DiskCache) -> None:
    assert result("verify") == {
        "checked": 3,
        "recompiled": 0,
        "not_comparable": 0,
        "bad": [],
        "orphans": [],
        "not_used": {},
    }
    compared = result("verify", "--recompile")
    assert (compared["recompiled"], compared["bad"]) == (3, [])
    key = build.build(CACHED[0]).key
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
    built = build.build(CACHED[0])
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
    key = build.build(CACHED[0]).key
    filled.paths(key)[1].write_text("{}")
    (bad,) = result("verify", "--repair", status=1)["bad"]
    assert not bad["repaired"]  # nobody knows any more what it was
    assert key not in {entry.key for entry in filled.entries()}


def age(disk: DiskCache, key: str, days: float) -> None:
    moment = time.time() - days * 86400
    os.utime(disk.paths(key)[1], (moment, moment))


def test_prune(filled: DiskCache) -> None:
    old, middle, new = (build.build(spec).key for spec in CACHED)
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
    filled.paths(build.build(CACHED[0]).key)[0].write_bytes(b"bad")
    filled.read(build.build(CACHED[0]).key, "sm_80")  # sets it aside
    assert result("prune", "--dry-run")["swept"] == 3
    assert run("prune").exit_code == 2  # nothing goes without -y
    assert draft.exists()
    assert result("prune", "-y")["swept"] == 3
    assert files.scan(filled.store / "bad") == files.scan(filled.store / "tmp") == []
    assert result("prune")["swept"] == 0  # nothing to delete, nothing to ask


def test_clear(filled: DiskCache) -> None:
    refused = run("clear")
    assert refused.exit_code == 2
    assert "--yes" in refused.stderr
    assert result("clear", "--dry-run")["deleted"] == 3
    assert len(filled.keys()) == 3
    assert result("clear", "--arch", "86", "-y")["deleted"] == 1
    assert run("clear", "--yes").stdout.strip() == "2 kernels deleted"
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
    assert "1 imported archive kept; --imported deletes it" in kept.stdout
    gone = run("clear", "-y", "--imported", JITATTN_CACHE_DIR=other)
    assert "1 imported archive deleted" in gone.stdout
    assert json.loads(run("list", "--json", JITATTN_CACHE_DIR=other).stdout) == []
    refused = run("import", str(archive), "--sha256", "0" * 64, JITATTN_CACHE_DIR=other)
    assert refused.exit_code == 1
    assert "refused" in refused.stderr


def test_export_of_choices_leaves_bad_ones_out(filled: DiskCache, tmp_path: Path) -> None:
    spec_file = tmp_path / "kernels.json"
    spec_file.write_text(json.dumps([CACHED[0].to_choice(), CACHED[2].to_choice()]))
    archive = str(tmp_path / "kernels.zip")
    assert result("export", archive, "--spec", str(spec_file))["kernels"] == 2
    filled.paths(build.build(CACHED[0]).key)[0].write_bytes(b"bad")
    done = result("export", archive, "--spec", str(spec_file), "-y", status=1)
    assert (done["kernels"], done["left_out"]) == (1, 1)


def test_read_only_cache_is_not_changed(filled: DiskCache) -> None:
    for arguments in (["clear", "-y"], ["prune", "-y"], ["verify", "--repair"]):
        done = run(*arguments, JITATTN_CACHE="ro")
        assert done.exit_code == 2
        assert "JITATTN_CACHE=ro" in done.stderr
    assert len(filled.keys()) == 3


def test_verify_sees_a_missing_cubin(filled: DiskCache, tmp_path: Path) -> None:
    """Readers take it for no entry at all; verify and export say so, and repair makes it anew."""
    key = build.build(CACHED[0]).key
    filled.paths(key)[0].unlink()
    (bad,) = result("verify", status=1)["bad"]
    assert bad["key"] == key
    assert "No such file" in bad["reason"]
    assert result("export", str(tmp_path / "a.zip"), status=1)["left_out"] == 1
    (repaired,) = result("verify", "--repair")["bad"]
    assert repaired["repaired"]
    assert result("verify")["bad"] == []


@pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
def test_verify_sees_what_others_may_write(filled: DiskCache) -> None:
    key = build.build(CACHED[0]).key
    shard = filled.paths(key)[0].parent
    shard.chmod(0o777)
    (bad,) = result("verify", status=1)["bad"]
    assert "others may write to it" in bad["reason"]
    (bad,) = result("verify", "--repair", status=1)["bad"]
    assert not bad["repaired"]  # what is made anew cannot be kept there either
    shard.chmod(0o700)
    filled.store.chmod(0o777)
    unused = result("verify", status=1)["not_used"]
    assert list(unused) == [str(filled.root)]
    assert "not used" in run("verify").stdout
    filled.store.chmod(0o700)


def test_repair_that_keeps_nothing_is_no_repair(
    filled: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = build.build(CACHED[0]).key
    filled.paths(key)[0].write_bytes(b"bad")

    def refused(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Directory, "publish", refused)
    (bad,) = result("verify", "--repair", status=1)["bad"]
    assert not bad["repaired"]


def test_export_makes_nothing_that_import_refuses(filled: DiskCache, tmp_path: Path) -> None:
    built = build.build(CACHED[0])
    filled.write(Entry(built.cubin, replace(built.metadata, source_digest="0" * 64)))
    archive, other = str(tmp_path / "kernels.zip"), str(tmp_path / "other")
    done = result("export", archive, status=1)
    assert (done["kernels"], done["left_out"]) == (2, 1)
    assert run("import", archive, JITATTN_CACHE_DIR=other).exit_code == 0


def test_export_says_what_is_missing(filled: DiskCache, tmp_path: Path) -> None:
    archive = tmp_path / "kernels.zip"
    spec_file = tmp_path / "kernels.json"
    wanted = [spec.to_choice() for spec in (CACHED[0], combine_spec(head_dim_v=32))]
    spec_file.write_text(json.dumps(wanted))
    done = run("export", str(archive), "--spec", str(spec_file), "--json")
    assert done.exit_code == 0
    assert (json.loads(done.stdout)["kernels"], json.loads(done.stdout)["missing"]) == (1, 1)
    assert "of the kernels asked for, 1 is not there" in done.stderr
    archive.unlink()
    for arguments in (["--arch", "90"], ["--preset", "llama", "--arch", "80"]):
        nothing = run("export", str(archive), *arguments)
        assert nothing.exit_code == 1
        assert "no such kernel" in nothing.stderr
    assert not archive.exists()
    assert run("export", str(archive), "--preset", "lama").exit_code == 2


def test_import_wants_a_whole_checksum(filled: DiskCache, tmp_path: Path) -> None:
    archive = str(tmp_path / "kernels.zip")
    assert run("export", archive).exit_code == 0
    assert run("import", archive, "--sha256", "abc").exit_code == 2
    assert not (filled.root / "imported").exists()
    missing = run("import", str(tmp_path / "none.zip"))
    assert missing.exit_code == 1
    assert "none.zip" in missing.stderr


def test_archives_are_deleted_as_a_whole_or_not(filled: DiskCache, tmp_path: Path) -> None:
    archive = str(tmp_path / "kernels.zip")
    run("export", archive)
    folder = Path(result("import", archive)["directory"])
    done = run("clear", "--arch", "86", "--imported", "-y")
    assert done.exit_code == 2
    assert "whole archives" in done.stderr
    assert folder.is_dir()
    assert len(filled.keys()) == 3
    assert result("clear", "--imported", "--dry-run")["imported_deleted"] == 1
    assert folder.is_dir()


def test_what_cannot_be_deleted_is_said(filled: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    def stuck(self: DiskCache, key: str) -> bool:
        return False

    monkeypatch.setattr(DiskCache, "remove", stuck)
    assert result("clear", "-y", status=1)["deleted"] == 0
    pruned = run("prune", "--max-bytes", "0", "-y", "--json")
    assert pruned.exit_code == 1
    assert json.loads(pruned.stdout)["kernels"] == []
    assert "3 kernels in" in pruned.stderr
    assert len(filled.keys()) == 3


@pytest.mark.parametrize("command", [("clear",), ("prune", "--max-bytes", "0")])
def test_what_another_process_makes_anew_was_deleted(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    """Beside a writer that needs the very same kernels: they are there again, and all is well."""
    writer = DiskCache(cache_dir)
    writer.write(fake_entry(1))
    real = Directory.unlink

    def unlink(self: Directory, name: str) -> None:
        real(self, name)
        if name.endswith(".cubin"):
            assert writer.write(fake_entry(1))

    monkeypatch.setattr(Directory, "unlink", unlink)
    done = run(*command, "-y")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.startswith("1 ")
    assert writer.look(fake_entry(1).metadata.key, "sm_80") == fake_entry(1)


@pytest.mark.parametrize("command", [("clear",), ("prune", "--max-bytes", "0")])
def test_what_another_process_deletes_first_is_gone(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    DiskCache(cache_dir).write(fake_entry(1))
    real = DiskCache.delete

    def delete(self: DiskCache, keys: set[str]) -> set[str]:
        for key in keys:
            DiskCache(cache_dir).remove(key)
        return real(self, keys)

    monkeypatch.setattr(DiskCache, "delete", delete)
    done = run(*command, "-y")
    assert done.exit_code == 0, done.stderr


def test_without_a_compiler_none_is_another(
    filled: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compilers, "installed", dict)
    done = run("prune", "--other-toolchains", "-y")
    assert done.exit_code == 1
    assert "no NVRTC is installed" in done.stderr
    assert len(filled.keys()) == 3


def test_a_terminal_is_asked(filled: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jitattn.cli.common._is_asked", lambda: True)
    for answer, status, left in (("n\n", 1, 3), ("y\n", 0, 0)):
        done = CliRunner().invoke(main, ["clear", "--json"], input=answer)
        assert done.exit_code == status
        assert "Delete 3 kernels" in done.stderr  # and stdout stays JSON
        assert len(filled.keys()) == left
    assert json.loads(done.stdout)["deleted"] == 3


def test_orphaned_cubins_are_seen_and_deleted(filled: DiskCache) -> None:
    """A writer that died between the two files leaves a cubin that nothing reads."""
    key = build.build(CACHED[0]).key
    cubin, metadata = filled.paths(key)
    metadata.unlink()
    assert result("verify")["orphans"] == []  # its writer may be at it
    assert result("prune", "-y")["swept"] == 0
    os.utime(cubin, (1, 1))
    assert result("verify")["orphans"] == [key]  # not bad: nothing uses it
    assert f"orphan {key[:16]} (user)" in run("verify").stdout
    assert "1 orphaned cubin" in run("stats").stdout
    assert "(0 bytes) and 1 leftover would be deleted" in run("prune", "--dry-run").stdout
    assert cubin.exists()
    assert run("prune", "-y").stdout == "0 kernels (0 bytes) and 1 leftover deleted\n"
    assert not cubin.exists()
    assert len(filled.keys()) == 2
    assert result("verify")["orphans"] == []


def test_orphan_that_gets_metadata_meanwhile_stays(
    filled: DiskCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = build.build(CACHED[0]).key
    cubin, metadata = filled.paths(key)
    text = metadata.read_bytes()
    metadata.unlink()
    os.utime(cubin, (1, 1))
    orphans = filled.orphans()
    metadata.write_bytes(text)
    metadata.chmod(0o600)
    monkeypatch.setattr(DiskCache, "orphans", lambda *_: orphans)
    assert filled.sweep() == 0
    assert cubin.exists()


def test_export_says_why_it_does_not_compress() -> None:
    text = " ".join(run("export", "--help").stdout.split())
    assert "not compressed: compressors give other bytes" in text
