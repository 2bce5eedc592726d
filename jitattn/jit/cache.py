"""The kernel cache on disk: `<key>.cubin` beside `<key>.json`.

::

    <root>/CACHEDIR.TAG
    <root>/v1/<k[:2]>/<k[2:]>.cubin   the plain cubin: cuobjdump and nvdisasm open it
    <root>/v1/<k[:2]>/<k[2:]>.json    metadata with size and sha256 of the cubin; published last
    <root>/v1/tmp/                    half-written files, renamed into place
    <root>/v1/lock/                   one file a kernel in the making; an optimisation, no more

A damaged cubin crashes the process inside the driver, so an entry is believed only if everything
about it is right, and the bytes that were checked are the bytes that are loaded. Nothing read from
the JSON reaches a launch. Trouble with the directory is never an error: the kernel is then kept in
memory only, and one warning is logged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import stat
import struct
import tempfile
import threading
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import platformdirs

from jitattn.jit import settings
from jitattn.jit.codegen import render
from jitattn.jit.spec import arch_number, entry_symbol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from jitattn.jit.spec import KernelSpec

#: Version of the key recipe and of the layout.
SCHEMA: Final = 1
_MAX_CUBIN_BYTES: Final = 64 * 1024 * 1024
_MAX_JSON_BYTES: Final = 1024 * 1024
_KEY: Final = re.compile(r"[0-9a-f]{64}")
_SHARD: Final = re.compile(r"[0-9a-f]{2}")
_ENTRY: Final = re.compile(r"([0-9a-f]{62})\.(json|cubin)")
_TEMPORARY: Final = re.compile(r"\d+-[0-9a-f]{16}")
_STALE_SECONDS: Final = 3600  # a temporary file this old belongs to a writer that died
_TAG: Final = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# This directory holds compiled kernels of jitattn. It may be deleted at any time.\n"
)
_LOG: Final = logging.getLogger("jitattn")
_HAS_OWNERS: Final = hasattr(os, "geteuid")  # Windows has no modes and owners of this kind
_OPEN_FLAGS: Final = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known of a cubin. For people and reports; nothing of it reaches a launch."""

    key: str
    spec: dict[str, str | int]
    arch: str
    toolchain: str
    options: tuple[str, ...]
    source_digest: str
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int  #: dynamic shared memory of a CTA
    compile_ms: float
    bytes: int  #: of the cubin
    sha256: str  #: of the cubin


@dataclass(frozen=True, slots=True)
class Entry:
    """A checked entry."""

    cubin: bytes
    metadata: Metadata


def cache_key(
    spec: KernelSpec, source_digest: str, options: tuple[str, ...], toolchain: str
) -> str:
    """Return the key of a kernel: sha256 over everything that its bytes depend on."""
    texts: list[bytes] = []
    for label, value in (
        ("schema", str(SCHEMA)),
        ("templates", source_digest),
        ("spec", spec.to_key()),
        ("header", render(spec)),
        ("options", json.dumps(options)),
        ("arch", spec.arch),
        ("toolchain", toolchain),
        ("entry", entry_symbol(spec)),
    ):
        for text in (label, value):
            encoded = text.encode()
            texts += (len(encoded).to_bytes(8, "little"), encoded)
    return sha256(b"".join(texts))


def is_cubin_for(cubin: bytes, arch: str) -> bool:
    """Whether bytes are an ELF file of machine code for `arch`."""
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or cubin[4] != 2:
        return False
    (machine,) = struct.unpack_from("<H", cubin, 18)
    (flags,) = struct.unpack_from("<I", cubin, 48)
    number = flags & 0xFF if cubin[7] == 51 else (flags >> 8) & 0xFF  # ABI 7; from CUDA 13 on, 8
    return bool(machine == 190 and number == arch_number(arch))


class DiskCache:
    """One cache directory."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.store = root / f"v{SCHEMA}"

    def read(self, key: str, arch: str) -> Entry | None:
        """Return the entry of `key` if there is one and it is right in every respect."""
        cubin_path, json_path = self._paths(key)
        text = _read_file(json_path, _MAX_JSON_BYTES)
        if text is None:
            return None
        metadata = _parse_metadata(text)
        cubin = _read_file(cubin_path, _MAX_CUBIN_BYTES)
        if (
            metadata is not None
            and cubin is not None
            and metadata.key == key
            and metadata.arch == arch
            and metadata.bytes == len(cubin)
            and metadata.sha256 == sha256(cubin)
            and is_cubin_for(cubin, arch)
        ):
            return Entry(cubin, metadata)
        _warn_once(f"a damaged entry in {self.root} is ignored and will be compiled anew")
        return None

    def write(self, cubin: bytes, metadata: Metadata) -> bool:
        """Publish an entry; False if the directory does not let us."""
        cubin_path, json_path = self._paths(metadata.key)
        text = json.dumps(asdict(metadata), indent=1, sort_keys=True).encode()
        try:
            self._make_directories(cubin_path.parent)
            # The JSON comes last: without it, or with another's, the cubin counts for nothing.
            self._publish(cubin_path, cubin)
            self._publish(json_path, text)
        except OSError as error:
            _warn_once(f"the kernel cache {self.root} cannot be written ({error}): kept in memory")
            return False
        return True

    def remove(self, key: str) -> bool:
        """Delete an entry; False if it could not be deleted or is not there."""
        cubin_path, json_path = self._paths(key)
        removed = False
        for path in (json_path, cubin_path):
            with contextlib.suppress(OSError):
                path.unlink()
                removed = True
        return removed

    def entries(self) -> Iterator[Metadata]:
        """Metadata of all entries, sorted by key. Cubins are not read."""
        for key in sorted(key for key, kind in self._files() if kind == "json"):
            text = _read_file(self._paths(key)[1], _MAX_JSON_BYTES)
            metadata = None if text is None else _parse_metadata(text)
            if metadata is not None and metadata.key == key:
                yield metadata

    def clear(self) -> int:
        """Delete entries and what dead writers left, nothing else; returns the number of entries.

        Lock files stay: a process that waits on one would not see the next holder.
        """
        files = list(self._files())
        count = sum(self.remove(key) for key in sorted({key for key, _ in files}))
        oldest = time.time() - _STALE_SECONDS
        for file in _scan(self.store / "tmp"):
            with contextlib.suppress(OSError):
                if _TEMPORARY.fullmatch(file.name) and os.lstat(file).st_mtime < oldest:
                    os.unlink(file)
        for shard in {key[:2] for key, _ in files}:
            with contextlib.suppress(OSError):  # not empty: something of somebody else's is in it
                (self.store / shard).rmdir()
        return count

    def _files(self) -> Iterator[tuple[str, str]]:
        """Key and kind of every file whose name is one of the layout's. Follows no links."""
        for shard in _scan(self.store):
            if _SHARD.fullmatch(shard.name) and shard.is_dir(follow_symlinks=False):
                for file in _scan(shard.path):
                    match = _ENTRY.fullmatch(file.name)
                    if match is not None:
                        yield shard.name + match[1], match[2]

    @contextlib.contextmanager
    def lock(self, key: str) -> Iterator[None]:
        """Keep other processes from compiling the same kernel, as far as that is possible.

        Waits at most ``JITATTN_LOCK_TIMEOUT`` seconds, and goes on without the lock if it cannot be
        had: two processes that publish one key publish the same bytes.
        """
        import filelock  # 40 ms, and needed only to compile

        try:
            self._make_directories(self.store / "lock")
            lock = filelock.FileLock(
                self.store / "lock" / key[:4], timeout=settings.lock_timeout(), mode=0o600
            )
            lock.acquire()
        except (OSError, NotImplementedError, filelock.Timeout) as error:
            _LOG.info("compiling without the lock of %s: %s", key[:16], error)
            lock = None
        try:
            yield
        finally:
            if lock is not None:
                with contextlib.suppress(OSError):
                    lock.release()

    def _paths(self, key: str) -> tuple[Path, Path]:
        folder = self.store / key[:2]
        return folder / f"{key[2:]}.cubin", folder / f"{key[2:]}.json"

    def _make_directories(self, folder: Path) -> None:
        self.root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for path in (self.store, self.store / "tmp", folder):
            path.mkdir(mode=0o700, exist_ok=True)
            if not _is_ours(path.lstat(), stat.S_ISDIR):
                raise PermissionError(f"{path} belongs to someone else, or others may write to it")
        tag = self.root / "CACHEDIR.TAG"
        if not tag.exists():
            self._publish(tag, _TAG.encode())

    def _publish(self, path: Path, content: bytes) -> None:
        """Write a file whole or not at all."""
        temporary = self.store / "tmp" / f"{os.getpid()}-{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS
        descriptor = os.open(temporary, flags, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def sha256(content: bytes) -> str:
    """Return the checksum of an entry's bytes."""
    return hashlib.sha256(content, usedforsecurity=False).hexdigest()


def user_cache() -> DiskCache | None:
    """Return the cache of this user, or None where no directory can be had.

    ``JITATTN_CACHE_DIR``, else the platform's cache directory, else (if that cannot be made) a
    private one among the temporary files. Never the working directory.
    """
    asked = settings.cache_dir()
    if asked is not None:
        return DiskCache(asked)
    root = _home_root() or _temporary_root()
    if root is None:
        _warn_once("no cache directory is to be had: kernels are kept in memory only")
        return None
    return DiskCache(root)


def _home_root() -> Path | None:
    try:
        root = Path(platformdirs.user_cache_dir("jitattn", appauthor=False))
        if not root.is_absolute():
            return None
        if not root.is_dir():
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (RuntimeError, KeyError, OSError):  # no home directory is known, or it is not ours
        return None
    return root


def _temporary_root() -> Path | None:
    if not _HAS_OWNERS:
        return None
    try:
        folder = Path(tempfile.gettempdir())
        if folder == Path.cwd():  # the last resort of tempfile, not of ours
            return None
        root = folder / f"jitattn-{os.geteuid()}"
        root.mkdir(mode=0o700, exist_ok=True)
        return root if _is_ours(root.lstat(), stat.S_ISDIR) else None
    except OSError:
        return None


def _scan(folder: Path | str) -> list[os.DirEntry[str]]:
    """Content of a directory; nothing if it cannot be read."""
    try:
        with os.scandir(folder) as found:
            return list(found)
    except OSError:
        return []


def _read_file(path: Path, limit: int) -> bytes | None:
    """Content of a regular file that only its owner, us or root, can write; else None."""
    try:
        descriptor = os.open(path, os.O_RDONLY | _OPEN_FLAGS | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return None
    try:
        status = os.fstat(descriptor)
        if not _is_ours(status, stat.S_ISREG) or status.st_size > limit:
            _warn_once(f"{path} is not a file of ours that nobody else can write: ignored")
            return None
        content = os.read(descriptor, status.st_size)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return content if len(content) == status.st_size else None


def _is_ours(status: os.stat_result, is_kind: Callable[[int], bool]) -> bool:
    if not is_kind(status.st_mode):
        return False
    if not _HAS_OWNERS:
        return True
    return status.st_uid in (0, os.geteuid()) and not status.st_mode & 0o022


def _parse_metadata(text: bytes) -> Metadata | None:
    try:
        raw = json.loads(text)
        kinds: dict[str, type] = {"spec": dict, "options": list, "compile_ms": float}
        values: dict[str, Any] = {}
        for field in fields(Metadata):
            value: Any = raw[field.name]
            kind = kinds.get(field.name, int if field.type == "int" else str)
            if not isinstance(value, kind):
                return None
            values[field.name] = tuple(raw["options"]) if field.name == "options" else value
        metadata = Metadata(**values)
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return metadata if _KEY.fullmatch(metadata.key) else None


_warned: set[str] = set()
_warned_lock = threading.Lock()


def _warn_once(message: str) -> None:
    with _warned_lock:
        if message in _warned:
            return
        _warned.add(message)
    _LOG.warning(message)
