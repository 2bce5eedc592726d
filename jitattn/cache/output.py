"""Writes output files of commands atomically, without replacing anything by accident.

``-`` is standard output. An existing file is refused unless the caller asks to overwrite it. A
directory, FIFO, device or link is always refused.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jitattn.cache.directory import write_all
from jitattn.cache.files import OPEN_FLAGS
from jitattn.errors import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterable

#: Standard output, or standard input where a file is read.
STREAM: Final = Path("-")
_NEW_FILE: Final = os.O_WRONLY | os.O_CREAT | os.O_EXCL | OPEN_FLAGS


def write(path: Path, pieces: Iterable[bytes], *, overwrite: bool = False) -> None:
    """Write a file piece by piece; it appears complete, or the old file stays.

    Raises
    ------
    CacheError
        The file exists, is no regular file, or cannot be written.
    """
    if path == STREAM:
        _write_to_stdout(pieces)
        return
    try:
        _check(path, is_taken_allowed=overwrite)
        _write(path, pieces, overwrite=overwrite)
    except FileExistsError as error:
        raise CacheError(f"{path} is there already: add -y to overwrite it") from error
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        raise CacheError(f"{path} cannot be written: {error}") from error


def _check(path: Path, *, is_taken_allowed: bool) -> None:
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if stat.S_ISDIR(mode):
        raise CacheError(f"{str(path)!r} is a directory: give the name of a file in it")
    if stat.S_ISLNK(mode):
        raise CacheError(f"{path} is a symbolic link: give the name of the file itself")
    if not stat.S_ISREG(mode):
        raise CacheError(f"{path} is no regular file: give another name, or - for standard output")
    if not is_taken_allowed:
        raise FileExistsError


def _write(path: Path, pieces: Iterable[bytes], *, overwrite: bool) -> None:
    draft = path.parent / f".jitattn-{os.getpid()}-{secrets.token_hex(8)}"
    try:
        descriptor = os.open(draft, _NEW_FILE, 0o666)
        try:
            for piece in pieces:
                write_all(descriptor, piece)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        if overwrite:
            os.replace(draft, path)
        else:
            _give_new_name(draft, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(draft)


def _give_new_name(draft: Path, path: Path) -> None:
    """Rename a draft, unless a file of the new name was created meanwhile."""
    if os.name == "nt":
        os.rename(draft, path)  # on Windows it never replaces a file
        return
    try:
        os.link(draft, path)
    except OSError:
        if os.path.lexists(path):
            raise
        os.rename(draft, path)  # a filesystem without hard links, such as FAT


def _write_to_stdout(pieces: Iterable[bytes]) -> None:
    try:
        for piece in pieces:
            sys.stdout.buffer.write(piece)
        sys.stdout.buffer.flush()
    except (OSError, ValueError) as error:  # a closed pipe, or a full disk
        raise CacheError(f"standard output cannot be written: {error}") from error
