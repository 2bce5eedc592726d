"""Tests that nothing outside the cache is deleted, replaced, moved or marked, links or not."""

from __future__ import annotations

import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest

from jitattn.cache import files, leftovers
from jitattn.cache.archive import export, import_archive
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry
from jitattn.cache.store import Bad
from tests.cpu.cache.faults import tree
from tests.cpu.commands import result, run
from tests.cpu.specs import fake_entry

POSIX = pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
AS_ROOT = pytest.mark.skipif(
    not files.HAS_OWNERS or os.geteuid() != 0, reason="needs root, to act as other users"
)
STRANGER = 54321
#: Directories that something is deleted in, or moved to.
FOLDERS = ("", "v1", "v1/tmp", "v1/bad", "v1/{shard}", "imported", "imported/{digest}")


@pytest.fixture
def cache(cache_dir: Path, tmp_path: Path) -> DiskCache:
    """A cache with an entry, a stale draft, a file set aside, and two imports, one of them dead."""
    disk = DiskCache(cache_dir)
    disk.write(fake_entry(1))
    archive = tmp_path / "kernels.zip"
    export(archive, [fake_entry(2)])
    import_archive(archive, disk)
    for name in (
        f"v1/tmp/1-{'a' * 16}",
        f"v1/bad/{'b' * 64}-{'c' * 8}.cubin",
        f"imported/.{'d' * 16}-1-{'e' * 8}/v1/ab/{'f' * 62}.json",
    ):
        path = cache_dir / name
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.write_text("left")
        os.utime(path, (1, 1))
    for folder in cache_dir.rglob("*"):
        if folder.is_dir():
            folder.chmod(0o700)
    return disk


def place(disk: DiskCache, name: str) -> Path:
    """Path of one of `FOLDERS`."""
    (digest,) = leftovers.imports(DiskCache(disk.root), [])
    shard = fake_entry(1).metadata.key[:2]
    return disk.root / name.format(shard=shard, digest=digest)


def delete_everything(disk: DiskCache, archive: Path) -> None:
    """Do whatever deletes, evicts, sweeps, moves or replaces, by command and by itself."""
    for arguments in (
        ("prune", "--max-bytes", "0", "-y"),
        ("prune", "-y"),
        ("clear", "--imported", "-y"),
        ("verify", "--repair"),
        ("import", str(archive)),
    ):
        done = run(*arguments)
        assert done.exit_code in (0, 1), done.output
        assert done.exception is None or isinstance(done.exception, SystemExit)
    again = DiskCache(disk.root)
    again.read(fake_entry(1).metadata.key, "sm_90")  # bad for this architecture: it is set aside
    again.set_aside(Bad(fake_entry(1).metadata.key, "for a test", (None, None)))
    again.evict(0)
    again.remove(fake_entry(1).metadata.key)
    again.clear()
    again.sweep(0)
    again.write(fake_entry(3))


@POSIX
@pytest.mark.parametrize("name", FOLDERS[1:])
def test_link_in_place_of_a_directory(cache: DiskCache, tmp_path: Path, name: str) -> None:
    """What it leads to looks exactly like the directory that was there, and is somebody's work."""
    path = place(cache, name)
    outside = tmp_path / "documents"
    path.rename(outside)
    (outside / "letter.txt").write_text("dear")
    path.symlink_to(outside)
    before = tree(outside)
    delete_everything(cache, tmp_path / "kernels.zip")
    assert tree(outside) == before


@AS_ROOT
@pytest.mark.parametrize("name", FOLDERS)
def test_directory_of_another_user(cache: DiskCache, tmp_path: Path, name: str) -> None:
    """Not even root deletes in it."""
    path = place(cache, name)
    os.chown(path, STRANGER, STRANGER)
    before = tree(path)
    delete_everything(cache, tmp_path / "kernels.zip")
    if name == "imported/{digest}":  # it made way, as it is
        moved = [one for one in path.parent.iterdir() if one.stat().st_uid == STRANGER]
        path = moved[0] if moved else path
    assert tree(path) == before


@POSIX
@pytest.mark.parametrize("name", FOLDERS[:-1])
def test_directory_that_others_can_write(cache: DiskCache, tmp_path: Path, name: str) -> None:
    path = place(cache, name)
    before = tree(path)
    path.chmod(0o777)
    delete_everything(cache, tmp_path / "kernels.zip")
    path.chmod(0o700)
    assert tree(path) == before


@AS_ROOT
def test_root_that_is_a_link_of_another_user(cache: DiskCache, tmp_path: Path) -> None:
    real = tmp_path / "real"
    cache.root.rename(real)
    cache.root.symlink_to(real)
    os.chown(cache.root, STRANGER, STRANGER, follow_symlinks=False)
    before = tree(real)
    delete_everything(cache, tmp_path / "kernels.zip")
    assert tree(real) == before


@POSIX
def test_root_that_is_a_link_of_this_user_is_the_cache(cache: DiskCache, tmp_path: Path) -> None:
    cache.root.rename(tmp_path / "real")
    cache.root.symlink_to(tmp_path / "real")
    assert result("clear", "--imported", "-y")["deleted"] == 1
    assert DiskCache(cache.root).keys() == []


def test_names_of_other_patterns_stay(cache: DiskCache) -> None:
    (digest,) = leftovers.imports(cache, [])
    foreign = [
        cache.root / name
        for name in (
            "notes.txt",
            f"v1/{'a' * 62}.json",
            "v1/notes.txt",
            "v1/tmp/notes.txt",
            "v1/tmp/1-notes",
            f"v1/tmp/{chr(0x661)}-{'a' * 16}",  # a digit, but none of ours
            "v1/bad/letter.txt",
            f"v1/bad/{'a' * 64}.cubin",
            "v1/lock/notes.txt",
            f"v1/{fake_entry(1).metadata.key[:2]}/notes.json",
            "imported/notes.txt",
            f"imported/.{'a' * 16}",
            f"imported/{digest}/notes.txt",
            f"imported/{digest}/v1/notes.txt",
        )
    ]
    for path in foreign:
        path.parent.mkdir(exist_ok=True)
        path.write_text("not of the cache")
        os.utime(path, (1, 1))
    done = run("clear", "--imported", "-y")
    assert done.exit_code == 1  # the import could not go as a whole, and that is said
    assert "not everything could be deleted" in done.stderr
    assert run("prune", "--max-bytes", "0", "-y").exit_code == 0
    assert [path for path in foreign if not path.exists()] == []
    assert DiskCache(cache.root).keys() == []
    assert list((cache.root / "imported").rglob("*.cubin")) == []


def test_everything_of_ours_goes(cache: DiskCache) -> None:
    assert result("prune", "-y")["swept"] == 3
    assert result("clear", "--imported", "-y") == {
        "deleted": 1,
        "imported_deleted": 1,
        "imported_kept": 0,
        "dry_run": False,
    }
    assert [path for path in cache.root.rglob("*") if path.is_file()] == [
        cache.root / "CACHEDIR.TAG"
    ]
    assert list((cache.root / "imported").iterdir()) == []


@pytest.mark.usefixtures("windows")
def test_without_descriptors(cache: DiskCache, tmp_path: Path) -> None:
    """Where names cannot be resolved relative to a directory, links are refused all the same."""
    outside = tmp_path / "documents"
    (cache.store / "bad").rename(outside)
    (cache.store / "bad").symlink_to(outside)
    before = tree(outside)
    delete_everything(cache, tmp_path / "kernels.zip")
    assert tree(outside) == before
    (cache.store / "bad").unlink()
    assert run("prune", "-y").exit_code == 0
    assert result("clear", "--imported", "-y")["deleted"] == 1
    assert isinstance(DiskCache(cache.root).look(fake_entry(1).metadata.key, "sm_80"), type(None))


@POSIX
def test_commands_say_why_nothing_is_deleted(cache: DiskCache) -> None:
    cache.store.chmod(0o777)
    for arguments in (("clear", "-y"), ("prune", "-y"), ("clear", "--dry-run")):
        done = run(*arguments)
        assert done.exit_code == 1
        assert "nothing is deleted" in done.stderr
        assert "others may write to it (mode 777)" in done.stderr
    cache.store.chmod(0o700)
    (cache.store / "bad").chmod(0o777)
    done = run("prune", "-y")
    assert done.exit_code == 1
    assert "not everything could be deleted" in done.stderr
    assert "v1/bad" in done.stderr
    (cache.store / "bad").chmod(0o700)


@POSIX
def test_imported_archives_in_a_directory_of_strangers_are_not_used(
    cache: DiskCache, caplog: pytest.LogCaptureFixture
) -> None:
    from jitattn.jit.layers import imported

    assert [len(list(store.entries())) for store in imported(cache)] == [1]
    (cache.root / "imported").chmod(0o777)
    with caplog.at_level(logging.WARNING, "jitattn"):
        assert list(imported(cache)) == []
    assert "imported archives" in caplog.text
    assert "others may write to it" in caplog.text
    (cache.root / "imported").chmod(0o700)


@POSIX
def test_link_to_a_file_is_not_stamped(cache: DiskCache, tmp_path: Path) -> None:
    outside, key = tmp_path / "letter.txt", fake_entry(1).metadata.key
    outside.write_text("dear")
    os.utime(outside, (1, 1))
    path = cache.paths(key)[1]
    path.unlink()
    path.symlink_to(outside)
    cache._touch(key)
    assert outside.stat().st_mtime == 1


def tag(folder: Path) -> bool:
    return (folder / "CACHEDIR.TAG").is_file()


def test_only_what_we_make_is_marked_as_a_cache(tmp_path: Path) -> None:
    """A backup leaves marked directories out: the home directory may be none of them."""
    home, made = tmp_path / "home", tmp_path / "deep" / "cache"
    home.mkdir(mode=0o700)
    (home / "letter.txt").write_text("dear")
    export(tmp_path / "kernels.zip", [fake_entry(2)])
    for root in (home, made):
        DiskCache(root).write(fake_entry(1))
        import_archive(tmp_path / "kernels.zip", DiskCache(root))
    assert (tag(made), tag(made / "v1"), tag(made / "imported")) == (True, False, False)
    assert (tag(home), tag(home / "v1"), tag(home / "imported")) == (False, True, True)
    assert not tag(made.parent)


@POSIX
@pytest.mark.parametrize("act", ["write", "import", "home"])
def test_umask_opens_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str, cache_dir: Path
) -> None:
    from jitattn.cache import location

    root = tmp_path / "deep" / "deeper" / "cache"
    export(tmp_path / "kernels.zip", [fake_entry(2)])
    old = os.umask(0)
    try:
        steps: dict[str, Callable[[], object]] = {
            "write": lambda: DiskCache(root).write(fake_entry(1)),
            "import": lambda: import_archive(tmp_path / "kernels.zip", DiskCache(root)),
        }
        if act == "home":
            monkeypatch.delenv("JITATTN_CACHE_DIR")
            monkeypatch.setattr(location.platformdirs, "user_cache_dir", lambda *_, **__: str(root))
            assert location.find() == root
        else:
            steps[act]()
    finally:
        os.umask(old)
    assert root.is_dir()
    for path in (tmp_path / "deep", *(tmp_path / "deep").rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0, path


def test_entry_is_what_was_written(cache: DiskCache) -> None:
    assert isinstance(cache.look(fake_entry(1).metadata.key, "sm_80"), Entry)
