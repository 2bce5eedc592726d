"""Tests the location of the cache directory, and the ownership that it requires."""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import files, location, settings
from jitattn.cache.disk import DiskCache
from jitattn.errors import InvalidInputError
from jitattn.jit import build, launch, layers
from tests.cpu.commands import run
from tests.cpu.processes import FORK, Child
from tests.cpu.specs import combine_spec, fake_entry

AS_ROOT = pytest.mark.skipif(
    not files.HAS_OWNERS or os.geteuid() != 0, reason="needs root, to act as other users"
)
STRANGER, OTHER_STRANGER = 54321, 54322
CLONE_NEWUSER = 0x10000000


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of another user, as ``sudo`` may leave it to root."""
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    for path in (home, home / "work"):
        os.chown(path, STRANGER, STRANGER)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("JITATTN_CACHE_DIR")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return home


@AS_ROOT
@pytest.mark.parametrize("there", ["", ".cache", ".cache/jitattn"])
def test_nothing_is_left_in_the_home_of_another(home: Path, tmp_path: Path, there: str) -> None:
    (home / there).mkdir(parents=True, exist_ok=True)
    for path in home.rglob("*"):
        os.chown(path, STRANGER, STRANGER)
    before = sorted(home.rglob("*"))
    assert build.build(combine_spec()).origin == "compiled"
    build.clear_memory()
    assert build.build(combine_spec()).origin == "disk"
    assert not launch.can_make(Path("~/.cupy/kernel_cache"))
    assert run("path").stdout.strip() == str(tmp_path / "temporary" / "jitattn-0")
    assert sorted(home.rglob("*")) == before


@AS_ROOT
def test_nothing_is_left_among_the_temporary_files_of_another(home: Path, tmp_path: Path) -> None:
    os.chown(tmp_path / "temporary", STRANGER, STRANGER)
    assert location.find() is None
    assert list((tmp_path / "temporary").iterdir()) == []
    (tmp_path / "temporary").chmod(0o1777)  # those of all users
    location._found.cache_clear()
    assert location.find() == tmp_path / "temporary" / "jitattn-0"


@AS_ROOT
def test_own_home_is_used(home: Path) -> None:
    os.chown(home, 0, 0)
    assert location.find() == home / ".cache" / "jitattn"
    assert launch.can_make(Path("~/.cupy/kernel_cache"))
    assert (home / ".cupy" / "kernel_cache").is_dir()


@AS_ROOT
def test_directory_that_was_asked_for_is_made_wherever_it_is(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container, where root works in the mounted directory of a user."""
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(home / "work" / "cache"))
    found = cache.user_cache()
    assert found is not None
    assert found.write(fake_entry(1))
    assert found.root == home / "work" / "cache"


@pytest.mark.parametrize("name", ["JITATTN_CACHE_DIR", "JITATTN_CACHE_PATH"])
@pytest.mark.parametrize("value", ["kernels", "./kernels", "../kernels", "."])
def test_relative_directories_of_kernels_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(name, value)
    with pytest.raises(InvalidInputError, match=f"{name}='{value}': it must be an absolute path"):
        build.build(combine_spec())
    done = run("list")
    assert done.exit_code == 1
    assert "absolute path" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] in ([], ["cache"])


def test_relative_part_of_a_path_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_CACHE_PATH", os.pathsep.join((str(tmp_path), "", "kernels")))
    with pytest.raises(InvalidInputError, match="JITATTN_CACHE_PATH='kernels'"):
        settings.cache_path()


@pytest.mark.skipif(not files.HAS_OWNERS, reason="HOME is of POSIX")
def test_relative_home_is_no_way_around(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "home")
    monkeypatch.setenv("JITATTN_CACHE_DIR", "~/kernels")
    with pytest.raises(InvalidInputError, match="absolute path"):
        settings.cache_dir()


@pytest.mark.parametrize(
    ("name", "read"),
    [("JITATTN_RECORD", settings.record), ("JITATTN_KEEP_SOURCE", settings.keep_source)],
)
def test_other_paths_do_not_follow_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: object
) -> None:
    settings._from_first_use.cache_clear()
    monkeypatch.setenv(name, "relative")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    assert read() == tmp_path / "relative"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert read() == tmp_path / "relative"
    settings._from_first_use.cache_clear()


def test_working_directory_that_was_deleted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record cannot be written then; a kernel is had all the same."""
    settings._from_first_use.cache_clear()
    monkeypatch.setenv("JITATTN_RECORD", "relative")

    def gone() -> str:
        raise FileNotFoundError("the working directory was deleted")

    monkeypatch.setattr(os, "getcwd", gone)
    assert settings.record() == Path("relative")
    settings._from_first_use.cache_clear()


def in_namespace(work: object) -> object:
    """Run something in a user namespace that knows no user at all."""

    def inside() -> object:
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER) != 0:
            return "refused"
        return work()

    answer = Child(inside).result()
    if answer == "refused":
        pytest.skip("needs the right to make user namespaces")
    return answer


@FORK
@AS_ROOT
@pytest.mark.skipif(not Path("/proc/self/uid_map").exists(), reason="needs user namespaces")
def test_unknown_users_are_nobody(tmp_path: Path, cache_dir: Path) -> None:
    """In a user namespace all of them seem to be one, which may be the user of the process."""
    entry = fake_entry(1)
    layer, key = tmp_path / "layer", entry.metadata.key
    for root in (layer, cache_dir):
        DiskCache(root).write(entry)
    for path in (layer, *layer.rglob("*")):
        os.chown(path, STRANGER, STRANGER)
    for path in layer.rglob("*.cubin"):
        os.chown(path, OTHER_STRANGER, OTHER_STRANGER)
    for path in (tmp_path, *tmp_path.parents[:3]):  # whoever that is may look
        path.chmod(path.stat().st_mode | 0o755)

    def look() -> list[object]:
        overflow = os.stat(layer).st_uid
        store = layers._store_of(layer)
        own = DiskCache(cache_dir)
        return [
            os.geteuid() == overflow,
            store.look(key, "sm_80") is None,
            own.look(key, "sm_80") is None,
            own.write(fake_entry(2)),
            own.clear(),
            files.is_among_ours(layer),
        ]

    assert in_namespace(look) == [True, True, True, False, 0, False]
    assert DiskCache(cache_dir).look(key, "sm_80") == entry


@pytest.mark.parametrize(
    ("mapped", "is_nobody"),
    [("0 0 4294967295\n", False), ("0 1000 1\n1 100000 65536\n", True), ("", True), (None, True)],
)
def test_overflow_user_is_somebody_only_where_all_users_are_known(
    monkeypatch: pytest.MonkeyPatch, mapped: str | None, is_nobody: bool
) -> None:
    real = Path.read_text

    def read_text(path: Path, *arguments: object, **named: object) -> str:
        if str(path) != "/proc/self/uid_map":
            return real(path, *arguments, **named)
        if mapped is None:
            raise PermissionError
        return mapped

    monkeypatch.setattr(files.sys, "platform", "linux")
    monkeypatch.setattr(files, "_overflow_uid", lambda: 65534)
    monkeypatch.setattr(Path, "read_text", read_text)
    assert files._is_nobody(65534) is is_nobody
    assert not files._is_nobody(1000)
