"""Tests archives: reproducible bytes, and rejection of hostile contents."""

from __future__ import annotations

import json
import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from jitattn.cache.archive import export, import_archive
from jitattn.cache.directory import Directory
from jitattn.cache.disk import DiskCache, user_cache
from jitattn.cache.entry import Entry
from jitattn.errors import CacheError
from jitattn.jit import build, pool
from jitattn.plan import choices
from tests.cpu.specs import combine_spec, fake_entry


def pack(path: Path, members: dict[str, bytes], **more: object) -> Path:
    """Write a zip file with any members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
        for act in more.values():
            act(archive)
    return path


@pytest.fixture
def good(tmp_path: Path) -> tuple[Path, dict[str, bytes], Entry]:
    """An archive with one kernel, its members, the kernel."""
    entry = fake_entry(1)
    path = tmp_path / "good.zip"
    export(path, [entry])
    with zipfile.ZipFile(path) as archive:
        return path, {name: archive.read(name) for name in archive.namelist()}, entry


def test_roundtrip(tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry]) -> None:
    path, members, entry = good
    key = entry.metadata.key
    assert set(members) == {"index.json", f"{key}.cubin"}
    disk = DiskCache(tmp_path / "cache")
    imported = import_archive(path, disk)
    assert (imported.count, imported.was_there) == (1, False)
    assert import_archive(path, disk, sha256=imported.sha256).was_there
    from jitattn.jit.layers import imported as layers

    (layer,) = layers(disk)
    found = layer.look(key, "sm_80")
    assert isinstance(found, Entry)
    assert found.cubin == entry.cubin
    assert found.metadata.compile_ms == 0.0
    assert [path.name for path in (disk.root / "imported").iterdir()] == [imported.sha256]


def test_same_bytes_whatever_the_order(tmp_path: Path) -> None:
    entries = [fake_entry(number) for number in range(5)]
    first = export(tmp_path / "a.zip", entries)
    second = export(tmp_path / "b.zip", reversed([*entries, entries[0]]))
    assert first == second
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "b.zip"]


@pytest.mark.slow
def test_same_bytes_whatever_the_number_of_jobs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = choices.specs_of([{"dtype": "bf16", "head_dim": 16, "mask": "full"}], ["80", "86"])
    archives = []
    for jobs in (1, 8):
        folder = tmp_path / f"jobs{jobs}"
        folder.mkdir()
        monkeypatch.chdir(folder)
        monkeypatch.setenv("TMPDIR", str(folder))
        monkeypatch.setenv("JITATTN_CACHE_DIR", str(folder / "cache"))
        build.clear_memory()
        outcomes = list(pool.build_all(specs, jobs))
        assert [outcome.origin for outcome in outcomes] == ["compiled"] * len(specs)
        cache = user_cache()
        assert cache is not None
        entries = [cache.look(key, meta.arch) for key, meta in _metadata(cache).items()]
        export(folder / "out.zip", entries)
        archives.append((folder / "out.zip").read_bytes())
    assert archives[0] == archives[1]
    assert len(archives[0]) > 8 * 4000


def _metadata(cache: DiskCache) -> dict:
    return {entry.key: entry for entry in cache.entries()}


def _edit(members: dict[str, bytes], change: Callable[[dict], None]) -> dict[str, bytes]:
    index = json.loads(members["index.json"])
    change(index)
    return {**members, "index.json": json.dumps(index).encode()}


def _link(archive: zipfile.ZipFile) -> None:
    link = zipfile.ZipInfo("f" * 64 + ".cubin")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    archive.writestr(link, "/etc/passwd")


def _twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("index.json", b"{}")


@pytest.mark.parametrize(
    "name",
    [
        "../evil",
        "/etc/evil",
        "v1/ab/evil.cubin",
        "a/" + "f" * 64 + ".cubin",
        "F" * 64 + ".cubin",
        "index.json/",
        "f" * 64 + ".cubin\0.txt",
        "..\\evil",
    ],
)
def test_strange_names_are_refused(
    tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry], name: str
) -> None:
    path = pack(tmp_path / "bad.zip", {**good[1], name: b"evil"})
    refused(path, tmp_path, "does not belong|do not match|no plain")


@pytest.mark.parametrize("act", [_link, _twice])
def test_strange_members_are_refused(
    tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry], act: Callable
) -> None:
    refused(pack(tmp_path / "bad.zip", good[1], act=act), tmp_path, "no plain file|twice")


def test_compressed_members_are_refused(
    tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry]
) -> None:
    """A small file may declare ten gigabytes of zeros; one that is stored as it is cannot."""
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in good[1].items():
            archive.writestr(name, content)
    refused(path, tmp_path, "compressed")


@pytest.mark.parametrize("declared", [10 << 30, 65 << 20])
def test_declared_size_is_not_believed(
    tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry], declared: int
) -> None:
    path, _, entry = good
    size = len(entry.cubin).to_bytes(4, "little") * 2  # compressed and plain, in the directory
    data = bytearray(path.read_bytes())
    at = data.rindex(size)
    data[at : at + 8] = min(declared, 0xFFFFFFF0).to_bytes(4, "little") * 2
    (tmp_path / "bad.zip").write_bytes(data)
    refused(tmp_path / "bad.zip", tmp_path, "declares|refused")


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("sha256", "0" * 64, "checksum"),
        ("bytes", 17, "17|bytes"),
        ("arch", "sm_90", "sm_80"),
        ("source_digest", "0" * 64, "not that of what it says"),
        ("toolchain", "nvrtc 9.9.9", "not that of what it says"),
        ("key", "../../evil", "damaged"),
        ("registers", "many", "damaged"),
    ],
)
def test_false_metadata_is_refused(
    tmp_path: Path,
    good: tuple[Path, dict[str, bytes], Entry],
    field: str,
    value: object,
    text: str,
) -> None:
    members = _edit(good[1], lambda index: index["kernels"][0].update({field: value}))
    refused(pack(tmp_path / "bad.zip", members), tmp_path, text)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda index: index.update(schema=99), "schema"),
        (lambda index: index.update(format="x"), "something else"),
        (lambda index: index.update(kernels={}), "damaged"),
        (lambda index: index.update(kernels=[]), "do not match"),
        (lambda index: index["kernels"].append(index["kernels"][0]), "do not match"),
    ],
)
def test_false_index_is_refused(
    tmp_path: Path,
    good: tuple[Path, dict[str, bytes], Entry],
    change: Callable[[dict], None],
    text: str,
) -> None:
    refused(pack(tmp_path / "bad.zip", _edit(good[1], change)), tmp_path, text)


@pytest.mark.parametrize("content", [b"", b"no zip file", b"PK\x05\x06" + bytes(18)])
def test_other_files_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.zip").write_bytes(content)
    refused(tmp_path / "bad.zip", tmp_path, "refused")


def test_damaged_cubin_is_refused(
    tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry]
) -> None:
    _, members, entry = good
    name = f"{entry.metadata.key}.cubin"
    flipped = bytearray(members[name])
    flipped[1000] ^= 4
    refused(pack(tmp_path / "bad.zip", {**members, name: bytes(flipped)}), tmp_path, "checksum")


def test_pinned_checksum(tmp_path: Path, good: tuple[Path, dict[str, bytes], Entry]) -> None:
    path, _, _ = good
    refused(path, tmp_path, "not " + "0" * 64, sha256="0" * 64)
    refused(path, tmp_path, "64 hexadecimal", sha256="abc")


def test_missing_file_and_unwritable_target(tmp_path: Path) -> None:
    refused(tmp_path / "missing.zip", tmp_path, "No such file")
    with pytest.raises(CacheError, match="cannot be written"):
        export(tmp_path / "no" / "such" / "folder.zip", [fake_entry(1)])


def test_import_that_fails_halfway_leaves_nothing(
    tmp_path: Path,
    good: tuple[Path, dict[str, bytes], Entry],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    disk = DiskCache(tmp_path / "cache")
    real, calls = Directory.publish, []

    def full(self: Directory, name: str, content: bytes, drafts: Directory) -> None:
        calls.append(name)
        if name.endswith(".json"):
            raise OSError(28, "No space left on device")
        real(self, name, content, drafts)

    monkeypatch.setattr(Directory, "publish", full)
    with pytest.raises(CacheError, match="No space left"):
        import_archive(good[0], disk)
    assert calls
    assert list((disk.root / "imported").iterdir()) == []


def test_compile_again_gives_the_exported_bytes(tmp_path: Path) -> None:
    built = build.build(combine_spec())
    export(tmp_path / "a.zip", [Entry(built.cubin, built.metadata)])
    again = build.rebuild(combine_spec())
    export(tmp_path / "b.zip", [Entry(again.cubin, again.metadata)])
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def refused(path: Path, tmp_path: Path, text: str, sha256: str | None = None) -> None:
    """Import into a fresh cache: an error that says why, and nothing written anywhere."""
    disk = DiskCache(tmp_path / "cache")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(CacheError, match=text):
        import_archive(path, disk, sha256=sha256)
    assert sorted(tmp_path.rglob("*")) == before
