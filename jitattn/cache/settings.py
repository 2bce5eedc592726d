"""Reads environment variables: one table, read when a value is needed, never at import.

None of them changes numerics, apart from the last bits of another kernel family. Those that change
machine code (line info, device asserts) do so through the compiler's options, and so enter the
cache key.
"""

from __future__ import annotations

import functools
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, TypeAlias, cast, get_args

from jitattn.errors import InvalidInputError

CacheMode: TypeAlias = Literal["rw", "ro", "off"]
Family: TypeAlias = Literal["sm80", "sm90"]

_SIZE: Final = re.compile(r"([0-9]{1,15})([KMGkmg]?)")
_SECONDS: Final = re.compile(r"[0-9]{1,5}(\.[0-9]{0,9})?|\.[0-9]{1,9}")

#: Name → (default, meaning). tools/guide/cache.md repeats this table; a test compares the two.
VARIABLES: Final[dict[str, tuple[str, str]]] = {
    "JITATTN_CACHE_DIR": (
        "user cache directory",
        "where kernels are kept: a directory of its own",
    ),
    "JITATTN_CACHE": ("rw", "rw, ro (read only) or off (memory only)"),
    "JITATTN_CACHE_PATH": (
        "unset",
        "more directories of kernels, only read; separated as in PATH",
    ),
    "JITATTN_CACHE_MAX_BYTES": (
        "512M",
        "size of the cache: bytes, or a number with K, M or G",
    ),
    "JITATTN_NO_COMPILE": ("0", "1 forbids compiling: a missing kernel is an error that names it"),
    "JITATTN_LOCK_TIMEOUT": ("60", "seconds to wait for another process that compiles the kernel"),
    "JITATTN_NVRTC": ("chosen by driver", "12 or 13: which installed NVRTC compiles"),
    "JITATTN_FAMILY": ("sm90", "sm80 keeps calls from the wgmma kernels of sm_90"),
    "JITATTN_RECORD": ("unset", "file to note the kernels in that a program uses, for prebuild"),
    "JITATTN_KEEP_SOURCE": ("unset", "directory to keep the source of every compile in"),
    "JITATTN_LINEINFO": ("0", "1 compiles line numbers in, for profilers"),
    "JITATTN_DEBUG_ASSERT": ("0", "1 compiles device-side checks in"),
    "JITATTN_DEBUG": ("0", "1 compares every context-parallel call between ranks"),
}


def cache_dir() -> Path | None:
    """Return ``JITATTN_CACHE_DIR``, if set."""
    value = os.environ.get("JITATTN_CACHE_DIR")
    return _absolute("JITATTN_CACHE_DIR", value) if value else None


def cache_path() -> tuple[Path, ...]:
    """Return the read-only directories of ``JITATTN_CACHE_PATH``."""
    value = os.environ.get("JITATTN_CACHE_PATH", "")
    return tuple(_absolute("JITATTN_CACHE_PATH", part) for part in value.split(os.pathsep) if part)


def record() -> Path | None:
    """Return the file in which used kernels are recorded, if any."""
    return _path("JITATTN_RECORD")


def keep_source() -> Path | None:
    """Return the directory that keeps the source of every compile, if any."""
    return _path("JITATTN_KEEP_SOURCE")


def cache_mode() -> CacheMode:
    """Return the mode of the disk cache: read and written, only read, or off."""
    value = os.environ.get("JITATTN_CACHE", "rw")
    for mode in get_args(CacheMode):
        if value == mode:
            return cast("CacheMode", mode)
    raise InvalidInputError(f"JITATTN_CACHE={value!r}: it must be rw, ro or off")


def cache_max_bytes() -> int:
    """Return the size in bytes above which least recently used kernels are evicted."""
    value = os.environ.get("JITATTN_CACHE_MAX_BYTES") or "512M"
    match = _SIZE.fullmatch(value.strip())
    if match is None:
        raise InvalidInputError(
            f"JITATTN_CACHE_MAX_BYTES={value!r}: it must be a number of bytes, as in 536870912 or "
            "512M (K, M or G: 1024, 1024**2 or 1024**3)"
        )
    return int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2].upper()]


def debug() -> bool:
    """Return whether every context-parallel call is compared between ranks."""
    return _flag("JITATTN_DEBUG")


def no_compile() -> bool:
    """Return whether compiling is forbidden."""
    return _flag("JITATTN_NO_COMPILE")


def lock_timeout() -> float:
    """Return the seconds to wait for another process that compiles the same kernel."""
    value = os.environ.get("JITATTN_LOCK_TIMEOUT", "60")
    seconds = float(value) if _SECONDS.fullmatch(value.strip()) else math.inf
    if seconds > 86400:
        raise InvalidInputError(
            f"JITATTN_LOCK_TIMEOUT={value!r}: it must be a number of seconds from 0 to 86400"
        )
    return seconds


def nvrtc_major() -> int | None:
    """Return the CUDA major version of the requested NVRTC, if any."""
    value = os.environ.get("JITATTN_NVRTC", "")
    if value in ("", "12", "13"):
        return int(value) if value else None
    raise InvalidInputError(f"JITATTN_NVRTC={value!r}: it must be 12 or 13, or unset")


def family() -> Family:
    """Return the newest kernel family that calls may take."""
    value = os.environ.get("JITATTN_FAMILY") or "sm90"
    for one in get_args(Family):
        if value == one:
            return cast("Family", one)
    raise InvalidInputError(f"JITATTN_FAMILY={value!r}: it must be sm80 or sm90")


def lineinfo() -> bool:
    """Return whether line numbers are compiled in."""
    return _flag("JITATTN_LINEINFO")


def debug_assert() -> bool:
    """Return whether device-side checks are compiled in."""
    return _flag("JITATTN_DEBUG_ASSERT")


def _path(name: str) -> Path | None:
    value = os.environ.get(name)
    return _from_first_use(_expanded(name, value)) if value else None


@functools.cache
def _from_first_use(path: Path) -> Path:
    """Make a path absolute at its first use; later changes of directory do not affect it."""
    try:
        return path.absolute()
    except FileNotFoundError:  # the working directory was deleted; writing reports it
        return path


def _absolute(name: str, value: str) -> Path:
    """Return an absolute path; refuse a relative one, which depends on the working directory."""
    path = _expanded(name, value)
    if not path.is_absolute():
        raise InvalidInputError(
            f"{name}={value!r}: it must be an absolute path, or begin with ~, so that no kernels "
            "come from whatever the working directory is"
        )
    return path


def _expanded(name: str, value: str) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError as error:
        raise InvalidInputError(f"{name}={value!r}: {error}; give the whole path") from error


def _flag(name: str) -> bool:
    value = os.environ.get(name, "0")
    if value not in ("", "0", "1"):
        raise InvalidInputError(f"{name}={value!r}: it must be 0 or 1")
    return value == "1"


#: All readers; each raises an error that names the variable if its value is invalid.
READERS: Final[tuple[Callable[[], object], ...]] = (
    cache_dir,
    cache_path,
    cache_mode,
    cache_max_bytes,
    no_compile,
    lock_timeout,
    nvrtc_major,
    family,
    record,
    keep_source,
    lineinfo,
    debug_assert,
)
