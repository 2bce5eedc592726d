"""Tests faulty cache directories: full, read-only, foreign, remote, missing, with a wrong clock."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import files, location, memo
from jitattn.cache.disk import DiskCache
from jitattn.cache.files import HAS_OWNERS
from jitattn.jit import build, sources
from tests.cpu.processes import Child
from tests.cpu.specs import combine_spec, fake_entry

POSIX = pytest.mark.skipif(not HAS_OWNERS, reason="needs POSIX owners and modes")
AS_ROOT = pytest.mark.skipif(
    not HAS_OWNERS or os.geteuid() != 0, reason="needs root, to act as other users"
)


def build_as(
    uid: int | None, environment: dict[str, str | None], work: Path | None = None
) -> tuple[list[str], list[str], list[str]]:
    """Build two kernels in a forked child: origins, warnings, and where the cache is.

    The child may become another user, who could read neither Python nor the checkout: what it needs
    is loaded before.
    """
    specs = [combine_spec(head_dim_v=dim) for dim in (16, 32)]
    import filelock  # noqa: F401

    build.build(specs[0])
    _as_a_new_process()
    closure = sources.closure(specs[0].family)

    def act() -> tuple[list[str], list[str], list[str]]:
        for name, value in environment.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        tempfile.tempdir = None
        warnings = _Warnings()
        logging.getLogger("jitattn").addHandler(warnings)
        if work is not None:
            os.chdir(work)
        if uid is not None:
            os.setgroups([])
            os.setgid(uid)
            os.setuid(uid)
        sources.digest = lambda _: closure.digest
        sources.closure = lambda _: closure
        origins = [build.build(spec).origin for spec in specs]
        user = cache.user_cache()
        return origins, warnings.texts, [] if user is None else [str(user.root)]

    return tuple(Child(act).result())


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.texts.append(record.getMessage())


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach."""
    folder = Path(tempfile.mkdtemp(prefix="jitattn-test-"))
    folder.chmod(0o755)
    yield folder
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            path.chmod(0o700)
    shutil.rmtree(folder)


def test_full_disk(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(small_disk / "cache"))
    disk = cache.user_cache()
    assert disk is not None
    written = [disk.write(fake_entry(number, 20_000)) for number in range(6)]
    assert written[0]
    assert not written[-1]
    assert list((disk.store / "tmp").iterdir()) == []
    for number in range(6):
        key = fake_entry(number, 20_000).metadata.key
        assert disk.look(key, "sm_80") in (None, fake_entry(number, 20_000))
    assert build.build(combine_spec()).cubin  # and a kernel is had all the same


@POSIX
def test_directory_that_may_not_be_written(public: Path) -> None:
    root = public / "cache"
    root.mkdir()
    root.chmod(0o555)
    uid = 54321 if os.geteuid() == 0 else None
    origins, warnings, _ = build_as(uid, {"JITATTN_CACHE_DIR": str(root)})
    assert origins == ["compiled", "compiled"]
    assert len(warnings) == 1
    assert "kept in memory" in warnings[0]
    assert list(root.iterdir()) == []


@AS_ROOT
def test_foreign_root_is_neither_read_nor_written(
    cache_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    build.build(combine_spec())
    before = sorted(cache_dir.rglob("*"))
    for path in (cache_dir, *before):
        os.chown(path, 54321, 54321)
    _as_a_new_process()
    caplog.clear()
    with caplog.at_level(logging.WARNING, "jitattn"):
        assert build.build(combine_spec()).origin == "compiled"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "belongs to user 54321" in caplog.text
    assert sorted(cache_dir.rglob("*")) == before


@POSIX
@pytest.mark.parametrize("which", ["root", "store", "shard"])
def test_directory_that_others_can_write(cache_dir: Path, which: str) -> None:
    key = build.build(combine_spec()).key
    folder = {"root": "", "store": "v1", "shard": f"v1/{key[:2]}"}[which]
    (cache_dir / folder).chmod(0o777)
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "compiled"
    (cache_dir / folder).chmod(0o700)
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "disk"


@POSIX
@pytest.mark.parametrize("which", ["store", "shard"])
def test_link_instead_of_a_directory(cache_dir: Path, tmp_path: Path, which: str) -> None:
    key = build.build(combine_spec()).key
    folder = cache_dir / {"store": "v1", "shard": f"v1/{key[:2]}"}[which]
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    before = sorted((tmp_path / "elsewhere").rglob("*"))
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "compiled"
    assert sorted((tmp_path / "elsewhere").rglob("*")) == before  # nothing is written through it


@AS_ROOT
def test_root_may_be_a_link_of_its_owner_only(cache_dir: Path, tmp_path: Path) -> None:
    build.build(combine_spec())
    cache_dir.rename(tmp_path / "moved")
    cache_dir.symlink_to(tmp_path / "moved")
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "disk"
    os.chown(cache_dir, 54321, 54321, follow_symlinks=False)
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "compiled"


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE, errno.EIO, errno.EACCES])
def test_entry_that_cannot_be_seen_again(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    """On a network filesystem a file may stay invisible for a minute after it was published."""
    real = os.open

    def blind(path: str | Path, flags: int, *rest: int, **more: int) -> int:
        if str(path).endswith((".json", ".cubin")) and not flags & os.O_CREAT:
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *rest, **more)

    monkeypatch.setattr(files.os, "open", blind)
    first = build.build(combine_spec())
    assert first.origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).cubin == first.cubin
    monkeypatch.undo()
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(cache_dir))
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"


def test_cleaning_up_that_fails_is_no_error(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    key = build.build(combine_spec()).key

    def busy(path: object, *_: object, **__: object) -> None:
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), str(path))

    for name in ("unlink", "rename", "rmdir", "utime"):
        monkeypatch.setattr(files.os, name, busy)
    disk = DiskCache(cache_dir)
    (cache_dir / "v1" / "tmp" / f"1-{'a' * 16}").touch()
    assert disk.clear() == 0
    assert disk.sweep() == 0
    assert disk.evict(0) == []
    (cubin, _) = disk.paths(key)
    cubin.write_bytes(b"bad")
    assert disk.read(key, "sm_80") is None


def test_windows_does_not_replace_what_is_being_read(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    entry = fake_entry(1)
    disk = DiskCache(cache_dir)
    assert disk.write(entry)

    def shared(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, "the file is used by another process")

    monkeypatch.setattr(files, "HAS_OWNERS", False)
    monkeypatch.setattr(files.os, "replace", shared)
    with caplog.at_level(logging.WARNING, "jitattn"):
        assert disk.write(entry)
        assert not disk.write(fake_entry(2))  # of this one there is no file yet
    assert disk.look(entry.metadata.key, "sm_80") == entry


YEARS_30 = 30 * 365 * 86400


@pytest.mark.parametrize("skew", [-YEARS_30, 0, YEARS_30])
def test_eviction_order_with_a_wrong_clock(cache_dir: Path, skew: int) -> None:
    """The clock that stamped the entries was wrong, by as much for each: the oldest go."""
    disk = DiskCache(cache_dir)
    entries = [fake_entry(number, 8192) for number in range(6)]
    for age, entry in enumerate(entries):
        disk.write(entry)
        moment = time.time() + skew - 100_000 * (age + 1)
        os.utime(disk.paths(entry.metadata.key)[1], (moment, moment))
    total = sum(disk.usage().values())
    assert disk.evict(total // 2) == [entry.metadata.key for entry in reversed(entries[3:])]


def test_stamp_from_the_future_pins_nothing(cache_dir: Path) -> None:
    disk = DiskCache(cache_dir)
    future, used, plain = (fake_entry(number, 8192).metadata.key for number in range(3))
    for number in range(3):
        disk.write(fake_entry(number, 8192))
    for key in (future, used):
        moment = time.time() + YEARS_30
        os.utime(disk.paths(key)[1], (moment, moment))
    assert disk.read(used, "sm_80") is not None  # which stamps it anew
    assert disk.evict(sum(disk.usage().values()) - 1) == [future]
    assert set(disk.keys()) == {used, plain}


def test_what_another_process_evicted_counts(
    cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two find the cache too large at once, and one is faster: the other deletes nothing more."""
    disk = DiskCache(cache_dir)
    for number in range(6):
        disk.write(fake_entry(number, 8192))
    seen = disk.usage()
    limit = sum(seen.values()) // 2
    gone = DiskCache(cache_dir).evict(limit)
    assert len(gone) == 3
    monkeypatch.setattr(disk, "usage", lambda: seen)
    assert disk.evict(limit) == []
    assert set(disk.keys()) == seen.keys() - set(gone)


def test_use_is_noted_at_most_once_an_hour(cache_dir: Path) -> None:
    disk, key = DiskCache(cache_dir), fake_entry(1).metadata.key
    disk.write(fake_entry(1))
    path, now = disk.paths(key)[1], time.time()
    for age, is_noted in ((600, False), (7200, True)):
        os.utime(path, (now - age, now - age))
        assert disk.read(key, "sm_80") is not None
        assert (path.stat().st_mtime > now - 60) is is_noted


def test_two_versions_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each finds its own kernels and none of the other's."""
    other = tmp_path / "cuda_src"
    shutil.copytree(sources.locate(), other)
    changed = other / "jitattn" / "combine" / "combine.cuh"
    changed.write_text(changed.read_text() + "\n// another version\n")
    here = sources.locate()
    keys = {}
    for origin in ("compiled", "disk"):
        for root in (here, other):
            monkeypatch.setattr(sources, "locate", lambda root=root: root)
            _as_a_new_process()
            built = build.build(combine_spec())
            assert built.origin == origin
            assert keys.setdefault(root, built.key) == built.key
    assert len(set(keys.values())) == 2
    monkeypatch.undo()
    _as_a_new_process()


def test_two_compilers_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    from jitattn.jit import compilers

    if len(compilers.installed()) < 2:
        pytest.skip("needs NVRTC 12 and 13")
    for origin in ("compiled", "disk"):
        for major in (12, 13):
            monkeypatch.setenv("JITATTN_NVRTC", str(major))
            build.clear_memory()
            built = build.build(combine_spec())
            assert built.origin == origin
            assert built.metadata.toolchain.startswith(f"nvrtc {major}.")


def test_changed_template_with_an_older_time_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same version installed again: other text, same size, older time of change."""
    root = tmp_path / "cuda_src"
    shutil.copytree(sources.locate(), root)
    monkeypatch.setattr(sources, "locate", lambda: root)
    _as_a_new_process()
    first = build.build(combine_spec())
    _as_a_new_process()
    assert build.build(combine_spec()).origin == "disk"
    path = root / "jitattn" / "combine" / "combine.cuh"
    status, text = path.stat(), path.read_text()
    changed = text.replace("The", "teh", 1) if "The" in text else text.replace("the", "teh", 1)
    assert len(changed) == len(text)
    assert changed != text
    path.write_text(changed)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - 10**15))
    _as_a_new_process()
    again = build.build(combine_spec())
    assert again.origin == "compiled"
    assert again.key != first.key
    monkeypatch.undo()
    _as_a_new_process()


HOSTILE = "#error taken from the working directory\n"


@POSIX
@pytest.mark.parametrize("home", [None, "/", "/nonexistent", ""])
def test_no_home(public: Path, home: str | None) -> None:
    """A user that no list of users knows, in a working directory that lays traps."""
    work, temporary = public / "work", public / "temporary"
    for name in (
        "jitattn_spec.h",
        "jitattn.pch",
        "jitattn/combine/combine.cuh",
        "entry/combine.cu",
    ):
        trap = work / name
        trap.parent.mkdir(parents=True, exist_ok=True)
        trap.write_text(HOSTILE)
    temporary.mkdir()
    temporary.chmod(0o1777)
    before = sorted(work.rglob("*"))
    work.chmod(0o555)
    uid = 54321 if os.geteuid() == 0 else None
    if uid is None and home in (None, ""):
        pytest.skip("needs root, to be a user without a home")
    environment = {
        "HOME": home,
        "XDG_CACHE_HOME": None,
        "JITATTN_CACHE_DIR": None,
        "TMPDIR": str(temporary),
    }
    origins, warnings, roots = build_as(uid, environment, work)
    work.chmod(0o755)
    assert sorted(work.rglob("*")) == before
    assert origins == ["compiled", "compiled"]
    assert warnings == []
    assert roots == [str(temporary / f"jitattn-{os.geteuid() if uid is None else uid}")]
    assert stat.S_IMODE(os.stat(roots[0]).st_mode) == 0o700


def _as_a_new_process() -> None:
    build.clear_memory()
    memo._loaded.clear()
    files._warned.clear()
    sources.digest.cache_clear()
    sources.closure.cache_clear()
    cache._cache_at.cache_clear()
    location._found.cache_clear()
