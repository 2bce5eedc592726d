"""Tests archives that are damaged, hostile, rewritten during reading, or imported before."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import struct
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from jitattn.cache import archive, files, zipped
from jitattn.cache.archive import export, import_archive
from jitattn.cache.disk import DiskCache
from jitattn.cache.entry import Entry
from jitattn.cache.index import Index
from jitattn.errors import CacheError
from jitattn.jit.layers import imported
from tests.cpu.specs import fake_entry

POSIX = pytest.mark.skipif(not files.HAS_OWNERS, reason="needs POSIX owners and modes")
ENTRIES = [fake_entry(number) for number in range(3)]


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.zip"
    export(path, ENTRIES)
    return path


def pack(path: Path, members: dict[str, bytes]) -> Path:
    path.write_bytes(b"".join(zipped.chunks(members.items())))
    return path


def test_written_as_any_zip_program_writes(good: Path) -> None:
    with zipfile.ZipFile(good) as found:
        assert found.testzip() is None
        names = found.namelist()
        assert names == ["index.json", *sorted(f"{one.metadata.key}.cubin" for one in ENTRIES)]
        again = io.BytesIO()
        with zipfile.ZipFile(again, "w", zipfile.ZIP_STORED) as other:
            for name in names:
                member = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
                member.create_system = 3
                member.external_attr = (0o100600) << 16
                other.writestr(member, found.read(name))
    assert again.getvalue() == good.read_bytes()


def refused(path: Path, text: str | None = None) -> None:
    """Import into a fresh cache: one error that says why, and nothing written."""
    root = path.parent / "fresh"
    with pytest.raises(CacheError, match=text) as caught:
        import_archive(path, DiskCache(root))
    assert not root.exists()
    assert "is refused: " in str(caught.value)
    assert not str(caught.value).endswith(": ")


def refused_bytes(data: bytes, tmp_path: Path, text: str | None = None) -> None:
    """As `refused`, of an archive with these bytes."""
    path = tmp_path / "bad.zip"
    path.write_bytes(data)
    refused(path, text)


def test_rewritten_while_it_is_imported(
    good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digest is of the bytes that are stored: those of one moment, or none."""
    other = tmp_path / "other.zip"
    export(other, [fake_entry(7)])
    pinned = hashlib.sha256(good.read_bytes()).hexdigest()
    disk = DiskCache(tmp_path / "cache")
    real = archive._Archive

    def rewriting(file: io.BytesIO) -> object:
        with open(good, "r+b") as target:  # in place, as soon as the checksum was found right
            target.write(other.read_bytes())
            target.truncate()
        return real(file)

    monkeypatch.setattr(archive, "_Archive", rewriting)
    done = import_archive(good, disk, sha256=pinned)
    (store,) = imported(disk)
    assert store.keys() == sorted(one.metadata.key for one in ENTRIES)
    assert done.folder.name == pinned == store.root.name


@POSIX
def test_no_regular_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    refused(tmp_path / "fifo", "no regular file")
    refused(Path("/dev/null"), "no regular file") if Path("/dev/null").exists() else None
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "folder", "no regular file|Is a directory")


def test_standard_input(good: Path, tmp_path: Path) -> None:
    root = tmp_path / "other"
    done = subprocess.run(
        [sys.executable, "-m", "jitattn.cli", "import", "-", "--json"],
        input=good.read_bytes(),
        capture_output=True,
        check=True,
        env={**os.environ, "JITATTN_CACHE_DIR": str(root)},
        cwd=Path(__file__).parents[3],
    )
    assert json.loads(done.stdout)["kernels"] == 3


def central(data: bytes, number: int) -> int:
    """Where the directory entry of a member begins."""
    at = -1
    for _ in range(number + 1):
        at = data.index(b"PK\x01\x02", at + 1)
    return at


def test_members_that_overlap(good: Path, tmp_path: Path) -> None:
    """Many names for the same bytes: a megabyte that would be written a hundred times."""
    data = bytearray(good.read_bytes())
    first, second = central(data, 1), central(data, 2)
    data[second + 42 : second + 46] = data[first + 42 : first + 46]
    refused_bytes(data, tmp_path, "not where it should be")


@pytest.mark.parametrize(
    ("at", "form", "value", "text"),
    [
        (8, "<H", 1, "encrypted"),
        (8, "<H", 8, "encrypted"),  # sizes come later
        (10, "<H", 8, "compressed"),
        (20, "<L", 1, "two sizes"),
        (24, "<L", 0xFFFFFFFF, "two sizes"),
        (28, "<H", 0xFFFF, "directory is damaged"),
        (30, "<H", 4, "directory is damaged"),
        (32, "<H", 4, "directory is damaged"),
        (34, "<H", 1, "directory is damaged"),
        (38, "<L", 0o120777 << 16, "no plain file"),
        (42, "<L", 0xFFFFFFF0, "not where it should be"),
    ],
)
def test_directory_that_lies(
    good: Path, tmp_path: Path, at: int, form: str, value: int, text: str
) -> None:
    data = bytearray(good.read_bytes())
    struct.pack_into(form, data, central(data, 1) + at, value)
    refused_bytes(data, tmp_path, text)


@pytest.mark.parametrize(
    ("at", "form", "value", "text"),
    [
        (4, "<H", 1, "several parts"),
        (8, "<H", 2, "several parts"),
        (10, "<H", 0xFFFF, "several parts"),
        (12, "<L", 0xFFFFFFFF, "directory is not where"),
        (16, "<L", 0xFFFFFFFF, "directory is not where"),
        (16, "<L", 0, "directory is not where"),
        (20, "<H", 9, "comment"),
    ],
)
def test_end_that_lies(
    good: Path, tmp_path: Path, at: int, form: str, value: int, text: str
) -> None:
    data = bytearray(good.read_bytes())
    struct.pack_into(form, data, len(data) - 22 + at, value)
    refused_bytes(data, tmp_path, text)


def test_more_than_its_members(good: Path, tmp_path: Path) -> None:
    data = good.read_bytes()
    start = data.index(b"PK\x01\x02")
    for bad in (data + b"\0", b"\0" + data, data[:start] + b"\0" * 9 + data[start:]):
        refused_bytes(bad, tmp_path)


def test_mutated_archives_are_refused_with_a_reason(good: Path, tmp_path: Path) -> None:
    """Bits flipped, ranges cut out, doubled, zeroed: anything but a traceback."""
    chance, data = random.Random(3), good.read_bytes()
    start = data.index(b"PK\x01\x02")
    path = tmp_path / "bad.zip"
    for number in range(600):
        bad = bytearray(data)
        # Every second one in the directory, which is where a reader can be led astray.
        at = chance.randrange(start if number % 2 else 0, len(bad))
        size = chance.choice((1, 2, 4, 64, 3000))
        act = chance.randrange(5)
        if act == 0:
            bad[at] ^= 1 << chance.randrange(8)
        elif act == 1:
            del bad[at : at + size]
        elif act == 2:
            bad[at:at] = bad[at : at + size]
        elif act == 3:
            bad[at : at + size] = bytes(len(bad[at : at + size]))
        else:
            bad[at : at + size] = chance.randbytes(len(bad[at : at + size]))
        path.write_bytes(bad)
        try:
            import_archive(path, DiskCache(tmp_path / "taken"))
        except CacheError:
            refused(path)
    # What was changed in the others says nothing, as a date: they hold what was written.
    for store in imported(DiskCache(tmp_path / "taken")):
        for entry in ENTRIES:
            looked = store.look(entry.metadata.key, "sm_80")
            assert looked == replace(entry, metadata=replace(entry.metadata, compile_ms=0.0))


def change(good: Path, text: bytes) -> Path:
    """Give an archive another index."""
    with zipfile.ZipFile(good) as found:
        members = {name: found.read(name) for name in found.namelist()}
    return pack(good.with_name("bad.zip"), {**members, "index.json": text})


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"}",
        b'{"a',
        b'"' * 1001,
        b'\\"' * 1001,
        b"[" * 100_000,
        b"[" * 100_000 + b"]" * 100_000,
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [0, 0, 0]}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [[], [], []]}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": {"a": [{}, {}, {}]}}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [], "more": [{}, {}, {}]}',
        b'{"format": "jitattn kernels", "schema": 1}',
        b'{"format": "jitattn kernels", "schema": ' + b"9" * 5000 + b', "kernels": [{}, {}, {}]}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [{"\xff": 1}, {}, {}]}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [{"a": "\\ud800"}, {}, {}]}',
        b'{"format": "jitattn kernels", "schema": 1, "kernels": [{"a": NaN}, {}, {}]}',
        b'{"format": ["jitattn kernels"], "schema": 1, "kernels": [{}, {}]}',
        b"\xff\xfe{}",
        bytes(1000),
    ],
)
def test_strange_indexes_are_refused(good: Path, text: bytes) -> None:
    refused(change(good, text))


@pytest.mark.parametrize("text", [b'"' + b"a" * 9 + b'\\"' * 500_000, b"[{" * 500_000])
def test_indexes_that_take_a_reader_long(good: Path, text: bytes) -> None:
    """Nothing is looked at more than a few times: megabytes are refused in a moment."""
    before = os.times().user
    refused(change(good, text))
    assert os.times().user - before < 5


MEASURE = """
import resource, sys
from pathlib import Path
from jitattn.errors import CacheError
from jitattn.cache.archive import import_archive
from jitattn.cache.disk import DiskCache
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    import_archive(Path(sys.argv[1]), DiskCache(Path(sys.argv[2])))
except CacheError as error:
    print(error, file=sys.stderr)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts kilobytes")
@pytest.mark.parametrize("piece", [b"[],", b"0,", b'{"a":[1,2,3]},', b'"",'])
def test_index_that_would_fill_the_memory(good: Path, tmp_path: Path, piece: bytes) -> None:
    """48 MiB of JSON took 1.2 GB: its text is held two or three times, and no objects of it."""
    text = b'{"format": "jitattn kernels", "schema": 1, "kernels": ['
    path = change(good, text + piece * ((48 << 20) // len(piece)) + b"0]}")
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path), str(tmp_path / "cache")],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[3],
    )
    assert "is refused" in done.stderr
    assert int(done.stdout) < 256 << 10


def test_too_large_an_index_or_a_kernel(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = json.loads(zipfile.ZipFile(good).read("index.json"))
    whole["kernels"][0]["log"] = "x" * (1 << 20)
    refused(change(good, json.dumps(whole).encode()), "more than 1048576 bytes")
    monkeypatch.setattr(archive, "_MAX_INDEX_BYTES", 1000)
    refused(good, "declares")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_ARCHIVE_BYTES", 5000)
    refused(good, "more than 5000")
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_KERNELS", 2)
    refused(good, "more than 3 members")
    with pytest.raises(CacheError, match="3 kernels are more than an archive may hold"):
        export(good, ENTRIES, overwrite=True)


def test_index_is_taken_apart_as_json_is(good: Path) -> None:
    text = zipfile.ZipFile(good).read("index.json")
    for one in (text, json.dumps(json.loads(text)).encode()):
        index = Index(one, 3)
        assert len(index) == 3
        assert list(index.kernels()) == list(index.kernels()) == json.loads(text)["kernels"]
        assert index.facts == {"format": "jitattn kernels", "schema": 1, "kernels": [0, 0, 0]}
    strange = b'{"a": "\\\\", "b": "}]\\"[", "kernels": [{"x": "]}\\\\\\""}]}'
    assert list(Index(strange, 1).kernels()) == json.loads(strange)["kernels"]


def test_entry_that_no_reader_would_take_is_refused(tmp_path: Path) -> None:
    large = replace(ENTRIES[0], metadata=replace(ENTRIES[0].metadata, log="é" * 200_000))
    export(tmp_path / "large.zip", [Entry(large.cubin, large.metadata)])
    refused(tmp_path / "large.zip", "more than 1048576 bytes|damaged")
