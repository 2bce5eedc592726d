"""Operations of the cache and of archives, each with the invariants that hold after a fault."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from jitattn.cache import disk as cache
from jitattn.cache import files, leftovers, location, memo
from jitattn.cache.archive import export, import_archive
from jitattn.cache.disk import Claim, DiskCache
from jitattn.cache.entry import Entry
from jitattn.cache.store import Bad
from jitattn.errors import CacheError
from jitattn.jit import layers, record
from tests.cpu.cache.faults import Snapshot
from tests.cpu.specs import combine_spec, fake_entry

USED = combine_spec()
USED_LINE = json.dumps(USED.to_choice()).encode() + b"\n"
OLD_LINE = b"{}\n"
ENTRIES = [fake_entry(number, 200) for number in range(2)]
OLD, NEW = ENTRIES
#: As it comes out of an archive.
ARCHIVED = replace(NEW, metadata=replace(NEW.metadata, compile_ms=0.0))
OLD_BYTES = b"what was there before"


@dataclass
class Place:
    """A folder with a cache in it, and files that are none of its business."""

    folder: Path
    disk: DiskCache

    @property
    def archive(self) -> Path:
        return self.folder / "kernels.zip"

    @property
    def target(self) -> Path:
        return self.folder / "target.zip"

    def look(self, entry: Entry) -> Entry | Bad | None:
        return DiskCache(self.disk.root).look(entry.metadata.key, "sm_80")


@dataclass(frozen=True)
class Operation:
    """What is done, on what, and what is true when it was done without a fault."""

    act: Callable[[Place], object]
    is_done: Callable[[Place], bool]
    prepare: Callable[[Place], object] = lambda _: None
    may_raise: tuple[type[Exception], ...] = ()
    #: Whether the result, or what was raised, is true after a fault.
    is_honest: Callable[[Place, object], bool] = lambda _, __: True
    #: Whether what is there is right, wherever the process was killed.
    is_sound: Callable[[Place], bool] = lambda _: True
    environment: Mapping[str, str | None] = field(default_factory=dict)
    #: An error that cannot be told from the truth.
    believed: str = ""


def age(path: Path) -> None:
    os.utime(path, (1, 1))


def damage(place: Place) -> None:
    place.disk.paths(OLD.metadata.key)[0].write_bytes(b"bad")


def age_entry(place: Place) -> None:
    age(place.disk.paths(OLD.metadata.key)[1])


def add_leftovers(place: Place) -> None:
    for folder, name in (("tmp", f"1-{'a' * 16}"), ("bad", f"{'b' * 64}-{'c' * 8}.json")):
        path = place.disk.store / folder / name
        path.parent.mkdir(mode=0o700, exist_ok=True)
        path.touch()
        age(path)
    dead = place.disk.root / "imported" / f".{'d' * 16}-1-{'e' * 8}" / "v1" / "ab"
    dead.mkdir(mode=0o700, parents=True)
    (dead / f"{'f' * 62}.cubin").touch()
    for path in (dead, *dead.parents[:3]):
        path.chmod(0o700)


def add_archive(place: Place) -> None:
    export(place.archive, [NEW])


def add_import(place: Place) -> None:
    add_archive(place)
    import_archive(place.archive, place.disk)


def add_damaged_import(place: Place) -> None:
    add_import(place)
    (imported,) = layers.imported(place.disk)
    imported.paths(NEW.metadata.key)[0].unlink()


def imported_entries(place: Place) -> list[Entry | Bad | None]:
    found = []
    for digest in leftovers.imports(place.disk, []):
        store = layers._imported_store.__wrapped__(
            place.disk.root / "imported" / digest, *files.our_owners()
        )
        found.append(store.look(NEW.metadata.key, "sm_80"))
    return found


def claim(place: Place) -> str:
    claimed = place.disk.claim(NEW.metadata.key, "sm_80")
    assert isinstance(claimed, Claim)
    with claimed:
        return "claimed"


def remember(place: Place) -> None:
    memo._loaded.clear()
    memo.remember("fact", [["file", 1]], "value")


def recalled(place: Place) -> object:
    memo._loaded.clear()
    return memo.recall("fact")


def use(_: Place) -> None:
    record._noted.clear()
    record.note(USED)


def used_lines(place: Place) -> list[bytes]:
    return (place.folder / "used.jsonl").read_bytes().splitlines(keepends=True)


def is_one_of(path: Path, *contents: bytes | None) -> bool:
    return (path.read_bytes() if path.exists() else None) in contents


def holds(place: Place, result: object, before: list[Entry | Bad | None]) -> bool:
    """Whether an import brought everything, or left what there was if it was refused."""
    allowed = ([ARCHIVED], before) if isinstance(result, CacheError) else ([ARCHIVED],)
    return imported_entries(place) in allowed


def exported(place: Place) -> bytes:
    export(place.folder / "again.zip", [NEW], overwrite=True)
    return (place.folder / "again.zip").read_bytes()


OPERATIONS = {
    "first write": Operation(
        lambda place: place.disk.write(NEW),
        lambda place: place.look(NEW) == NEW,
        lambda place: shutil.rmtree(place.disk.root),
        is_honest=lambda place, result: not result or place.look(NEW) == NEW,
    ),
    "write": Operation(
        lambda place: place.disk.write(NEW),
        lambda place: place.look(NEW) == NEW,
        is_honest=lambda place, result: not result or place.look(NEW) == NEW,
    ),
    "write again": Operation(
        lambda place: place.disk.write(OLD),
        lambda place: place.look(OLD) == OLD,
        is_honest=lambda place, result: place.look(OLD) == OLD,
    ),
    "write and evict": Operation(
        lambda place: place.disk.write(NEW),
        lambda place: place.look(NEW) == NEW and place.look(OLD) is None,
        environment={"JITATTN_CACHE_MAX_BYTES": "1"},
    ),
    "read": Operation(
        lambda place: place.disk.read(OLD.metadata.key, "sm_80"),
        lambda place: place.look(OLD) in (OLD, None),  # set aside if it seemed to be a link
        age_entry,
        is_honest=lambda place, result: result in (None, OLD),
    ),
    "read a damaged entry": Operation(
        lambda place: place.disk.read(OLD.metadata.key, "sm_80"),
        lambda place: place.look(OLD) is None,
        damage,
        is_honest=lambda place, result: result is None,
    ),
    "list": Operation(
        lambda place: (place.disk.keys(), list(place.disk.entries()), place.disk.usage()),
        lambda place: len(place.disk.keys()) == 1,
    ),
    "delete": Operation(
        lambda place: place.disk.delete({OLD.metadata.key}),
        lambda place: place.look(OLD) is None,
        is_honest=lambda place, result: not result or place.look(OLD) is None,
        believed="ENOENT",
    ),
    "clear": Operation(
        lambda place: place.disk.clear(),
        lambda place: place.disk.keys() == [] and leftovers.find(place.disk, []) != [],
        add_leftovers,
        is_honest=lambda place, result: not result or place.look(OLD) is None,
        believed="ENOENT",
    ),
    "sweep": Operation(
        lambda place: place.disk.sweep(0),
        lambda place: leftovers.find(place.disk, []) == [],
        add_leftovers,
    ),
    "claim": Operation(claim, lambda place: claim(place) == "claimed"),
    "remember": Operation(remember, lambda place: recalled(place) is not None),
    "recall": Operation(recalled, lambda place: recalled(place) is not None, remember),
    "record": Operation(
        use,
        lambda place: USED_LINE in used_lines(place),
        lambda place: (place.folder / "used.jsonl").write_bytes(OLD_LINE),
        is_honest=lambda place, _: is_one_of(
            place.folder / "used.jsonl", OLD_LINE, OLD_LINE + USED_LINE
        ),
        is_sound=lambda place: is_one_of(
            place.folder / "used.jsonl", OLD_LINE, OLD_LINE + USED_LINE
        ),
    ),
    "first record": Operation(
        use,
        lambda place: set(used_lines(place)) == {USED_LINE},
        is_honest=lambda place, _: is_one_of(place.folder / "used.jsonl", None, b"", USED_LINE),
        is_sound=lambda place: is_one_of(place.folder / "used.jsonl", None, b"", USED_LINE),
    ),
    "find the cache": Operation(
        lambda _: location._found.__wrapped__("a new process", *files.our_owners()),
        lambda place: location.find() == place.folder / "home" / ".cache" / "jitattn",
        environment={"JITATTN_CACHE_DIR": None},
    ),
    "export": Operation(
        lambda place: export(place.target, [NEW]),
        lambda place: is_one_of(place.target, exported(place)),
        may_raise=(CacheError,),
        is_honest=lambda place, result: is_one_of(
            place.target, exported(place), None if isinstance(result, CacheError) else b""
        ),
        is_sound=lambda place: is_one_of(place.target, exported(place), None),
    ),
    "export over a file": Operation(
        lambda place: export(place.target, [NEW], overwrite=True),
        lambda place: is_one_of(place.target, exported(place)),
        lambda place: place.target.write_bytes(OLD_BYTES),
        may_raise=(CacheError,),
        is_honest=lambda place, result: is_one_of(
            place.target, exported(place), OLD_BYTES if isinstance(result, CacheError) else b""
        ),
        is_sound=lambda place: is_one_of(place.target, exported(place), OLD_BYTES),
    ),
    "import": Operation(
        lambda place: import_archive(place.archive, place.disk),
        lambda place: imported_entries(place) == [ARCHIVED],
        add_archive,
        may_raise=(CacheError,),
        is_honest=lambda place, result: holds(place, result, []),
        is_sound=lambda place: imported_entries(place) in ([], [ARCHIVED]),
    ),
    "import again": Operation(
        lambda place: import_archive(place.archive, place.disk),
        lambda place: imported_entries(place) == [ARCHIVED],
        add_damaged_import,
        may_raise=(CacheError,),
        is_honest=lambda place, result: holds(place, result, [None]),
        # Between two renames there is none.
        is_sound=lambda place: imported_entries(place) in ([], [None], [ARCHIVED]),
    ),
    "read an imported kernel": Operation(
        lambda place: layers.find(NEW.metadata.key, "sm_80", place.disk),
        lambda place: layers.find(NEW.metadata.key, "sm_80", place.disk) == ARCHIVED,
        add_import,
        is_honest=lambda _, result: result in (None, ARCHIVED),
    ),
    "delete imports": Operation(
        lambda place: leftovers.delete_imports(place.disk, []),
        lambda place: imported_entries(place) == [],
        add_import,
        # What could not be deleted keeps its name, so that it can be deleted again.
        is_honest=lambda place, result: (
            imported_entries(place) == [] if result else leftovers.find(place.disk, []) == []
        ),
        believed="ENOENT",
        is_sound=lambda place: imported_entries(place) in ([], [None], [ARCHIVED]),
    ),
}


def prepared(operation: Operation, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Snapshot:
    """A cache with one entry, and what the operation needs."""
    for inner in ("home", "temporary", "outside"):
        (folder / inner).mkdir(mode=0o700, parents=True)
    (folder / "outside" / "file").write_text("none of the cache's business")
    place = Place(folder, DiskCache(folder / "cache"))
    assert place.disk.write(OLD)
    monkeypatch.setenv("JITATTN_CACHE_DIR", str(folder / "cache"))
    operation.prepare(place)
    monkeypatch.setenv("HOME", str(folder / "home"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(location.tempfile, "gettempdir", lambda: str(folder / "temporary"))
    monkeypatch.setenv("JITATTN_LOCK_TIMEOUT", "0.05")
    monkeypatch.setenv("JITATTN_RECORD", str(folder / "used.jsonl"))
    for name, value in operation.environment.items():
        if value is None:
            monkeypatch.delenv(name)
        else:
            monkeypatch.setenv(name, value)
    snapshot = Snapshot.of(folder)
    operation.act(place)  # whatever happens only once in a process
    return snapshot


def restored(snapshot: Snapshot) -> Place:
    """Put back what was there, as a new process finds it."""
    snapshot.restore()
    return found_anew(Path(snapshot.folder))


def found_anew(folder: Path) -> Place:
    """Forget what this process knows of a place."""
    location._found.cache_clear()
    cache._cache_at.cache_clear()
    layers._imported_store.cache_clear()
    return Place(folder, DiskCache(folder / "cache"))


def tried(operation: Operation, place: Place) -> object:
    """The result of an operation, or the exception that it may raise."""
    try:
        return operation.act(place)
    except operation.may_raise as error:
        return error
