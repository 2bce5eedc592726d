"""Tests archive imports that are repeated, killed, or concurrent with deletions."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from jitattn.cache import files, leftovers
from jitattn.cache.archive import export, import_archive
from jitattn.cache.directory import Directory
from jitattn.cache.disk import DiskCache
from jitattn.errors import CacheError
from jitattn.jit.layers import imported
from tests.cpu.cache.faults import tree
from tests.cpu.commands import result, run
from tests.cpu.specs import fake_entry

POSIX = pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
ENTRIES = [fake_entry(number) for number in range(3)]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.zip"
    export(path, ENTRIES)
    return path


def first_import(good: Path, cache_dir: Path) -> tuple[DiskCache, Path]:
    disk = DiskCache(cache_dir)
    done = import_archive(good, disk)
    assert (done.was_there, done.was_repaired) == (False, False)
    return disk, done.folder


def lose_a_cubin(folder: Path) -> None:
    next(folder.glob("v1/*/*.cubin")).unlink()


def lose_metadata(folder: Path) -> None:
    next(folder.glob("v1/*/*.json")).unlink()


def lose_everything(folder: Path) -> None:
    next(folder.glob("v1")).rename(folder.parent.parent / "lost")


def damage(folder: Path) -> None:
    next(folder.glob("v1/*/*.cubin")).write_bytes(b"bad")


def add_an_entry(folder: Path) -> None:
    DiskCache(folder).write(fake_entry(9))


def open_the_folder(folder: Path) -> None:
    folder.chmod(0o777)


def open_the_store(folder: Path) -> None:
    (folder / "v1").chmod(0o777)


def open_a_file(folder: Path) -> None:
    next(folder.glob("v1/*/*.cubin")).chmod(0o666)


def link_it(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.symlink_to(folder.parent.parent / "elsewhere")


def file_it(folder: Path) -> None:
    folder.rename(folder.parent.parent / "elsewhere")
    folder.write_text("in the way")


LOSSES = [
    lose_a_cubin, lose_metadata, lose_everything, damage, add_an_entry, open_the_folder,
    open_the_store, open_a_file, link_it, file_it,
]  # fmt: skip


@POSIX
@pytest.mark.parametrize("lose", LOSSES)
def test_importing_again_repairs(good: Path, cache_dir: Path, lose: Callable[[Path], None]) -> None:
    disk, folder = first_import(good, cache_dir)
    whole = tree(folder)
    lose(folder)
    done = import_archive(good, disk)
    assert not done.was_there
    assert done.was_repaired
    assert tree(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    (store,) = imported(DiskCache(cache_dir))
    assert [one.key for one in store.entries()] == sorted(one.metadata.key for one in ENTRIES)
    assert import_archive(good, disk).was_there


def test_command_says_that_it_repaired(good: Path, cache_dir: Path) -> None:
    _, folder = first_import(good, cache_dir)
    lose_a_cubin(folder)
    assert "imported again" in run("import", str(good)).stdout
    assert result("import", str(good))["was_there"]


def killed_import(good: Path, disk: DiskCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave behind what an import leaves that is killed before it has finished."""
    real = leftovers.delete_import
    with monkeypatch.context() as killed:
        killed.setattr(leftovers, "delete_import", lambda *_, **__: False)
        killed.setattr(Directory, "rename", _no_rename)
        with pytest.raises(CacheError):
            import_archive(good, disk)
    assert leftovers.delete_import is real


def _no_rename(*_: object) -> None:
    raise OSError("killed")


def test_killed_import_is_seen_and_deleted(
    good: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = DiskCache(cache_dir)
    for command in (("prune",), ("clear",), ("clear", "--imported")):
        killed_import(good, disk, monkeypatch)
        assert result("stats")["unfinished_imports"] == 1
        assert "1 unfinished import," in run("stats").stdout
        assert run(*command, "-y").exit_code == 0
        assert result("stats")["unfinished_imports"] == 0
        assert list((cache_dir / "imported").iterdir()) == []
    killed_import(good, disk, monkeypatch)
    assert disk.sweep() == 1  # by itself, too


def test_import_at_work_is_spared(
    good: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that deletes runs in the middle of it."""
    disk = DiskCache(cache_dir)
    real = Directory.publish

    def publish(self: Directory, name: str, content: bytes, drafts: Directory) -> None:
        real(self, name, content, drafts)
        assert result("stats")["unfinished_imports"] == 1
        assert run("prune", "-y").exit_code == 0
        assert run("clear", "--imported", "-y").exit_code == 0

    monkeypatch.setattr(Directory, "publish", publish)
    assert import_archive(good, disk).count == 3
    monkeypatch.undo()
    (store,) = imported(disk)
    assert len(store.keys()) == 3


def test_import_beside_the_command_that_deletes_imports(
    good: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is imported anew while the old is deleted stays, and nothing has failed."""
    disk, folder = first_import(good, cache_dir)
    whole = tree(folder)
    real = leftovers.delete_import

    def delete_import(*arguments: object) -> bool:
        monkeypatch.setattr(leftovers, "delete_import", real)
        assert not import_archive(good, disk).was_there
        return real(*arguments)

    monkeypatch.setattr(leftovers, "delete_import", delete_import)
    assert result("clear", "--imported", "-y")["imported_deleted"] == 1
    assert tree(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.usefixtures("windows")
def test_without_descriptors(good: Path, cache_dir: Path) -> None:
    disk, folder = first_import(good, cache_dir)
    whole = tree(folder)
    lose_a_cubin(folder)
    assert import_archive(good, disk).was_repaired
    assert tree(folder) == whole
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    draft = folder.with_name(f".{'d' * 16}-1-{'e' * 8}")
    draft.mkdir()
    assert disk.sweep() == 0  # there is no lock to say whether its writer is alive
    os.utime(draft, (1, 1))
    assert disk.sweep() == 1
