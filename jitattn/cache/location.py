"""Locates the cache of this user, and makes its root.

``JITATTN_CACHE_DIR``, else the platform's cache directory, else (if that cannot be made, or lies in
another user's home) a private one among the temporary files. Never the working directory.
"""

from __future__ import annotations

import contextlib
import functools
import os
import stat
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import platformdirs

from jitattn.cache import files, settings
from jitattn.cache.directory import Directory

if TYPE_CHECKING:
    from collections.abc import Collection

#: Environment variables that decide where the cache is.
VARIABLES: Final = (
    "JITATTN_CACHE_DIR",
    "HOME",
    "USERPROFILE",
    "LOCALAPPDATA",
    "XDG_CACHE_HOME",
    "TMPDIR",
)
#: File by which programs that back up know a cache (Cache Directory Tagging Specification).
TAG: Final = "CACHEDIR.TAG"
_TAG_TEXT: Final = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This directory holds compiled kernels of jitattn. It may be deleted at any time.\n"
)


def find() -> Path | None:
    """Return the root of this user's cache; None if no directory can be had."""
    return _found(tuple(map(os.environ.get, VARIABLES)), *files.our_owners())


@functools.cache
def _found(_environment: object, *_owners: int) -> Path | None:
    return settings.cache_dir() or _in_home() or _among_temporary_files()


def _in_home() -> Path | None:
    try:
        root = Path(platformdirs.user_cache_dir("jitattn", appauthor=False))
        if not root.is_absolute() or not files.is_among_ours(root):
            return None
        if not os.path.isdir(root):
            make(root, files.our_owners()).close()
    except (RuntimeError, KeyError, OSError):  # no home directory is known, or it cannot be used
        return None
    return root


def _among_temporary_files() -> Path | None:
    if not files.HAS_OWNERS:
        return None
    try:
        folder = Path(tempfile.gettempdir())
        if folder == Path.cwd():  # the last resort of tempfile, not of ours
            return None
        # The temporary files of all users, or our own; not those of another, as after ``sudo``.
        if not os.stat(folder).st_mode & stat.S_ISVTX and not files.is_among_ours(folder):
            return None
        root = folder / f"jitattn-{os.geteuid()}"
        make(root, files.our_owners(), may_be_link=False).close()
    except OSError:
        return None
    return root


def make(root: Path, owners: Collection[int], *, may_be_link: bool = True) -> Directory:
    """Open the root of a cache, making it and everything above it for this user alone.

    A root that is made here is marked as a cache, for programs that back up. One that was there may
    hold other things, and is not.

    Raises
    ------
    OSError
        It cannot be made, or somebody else could write to what is there.
    """
    is_new = False
    if not os.path.lexists(root):
        files.make_parents(root.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(root, 0o700)
            is_new = True
    opened = Directory.open(root, owners, may_be_link=may_be_link)
    if is_new:
        mark(opened)
    return opened


def mark(folder: Directory, *, unless: Directory | None = None) -> None:
    """Say that a directory is a cache, unless one above says so; failing to is no trouble."""
    with contextlib.suppress(OSError):
        if unless is None or TAG not in unless.names():
            folder.write_new(TAG, _TAG_TEXT)
