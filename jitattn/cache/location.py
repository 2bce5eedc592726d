"""Locates the cache of this user and creates its root.

``JITATTN_CACHE_DIR``, else the platform's cache directory, else (if that cannot be made, or lies in
another user's home) a private directory for temporary files. Never the working directory.
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

#: Environment variables that determine the location.
VARIABLES: Final = (
    "JITATTN_CACHE_DIR",
    "HOME",
    "USERPROFILE",
    "LOCALAPPDATA",
    "XDG_CACHE_HOME",
    "TMPDIR",
)
#: File that tells backup programs to skip a cache (Cache Directory Tagging Specification).
TAG: Final = "CACHEDIR.TAG"
_TAG_TEXT: Final = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# This directory holds compiled kernels of jitattn. It may be deleted at any time.\n"
)


def find(*, make: bool = True) -> Path | None:
    """Return the root of this user's cache; None if no directory can be used.

    Parameters
    ----------
    make : bool
        Make the default directory, which shows that it can be used. Without, it is judged by the
        modes of the directories above it, and nothing is made.
    """
    environment = tuple(map(os.environ.get, VARIABLES))
    return _found(environment, *files.our_owners(), is_made=make)


@functools.cache
def _found(_environment: object, *_owners: int, is_made: bool = True) -> Path | None:
    return settings.cache_dir() or _in_home(is_made) or _among_temporary_files(is_made)


def is_makeable(path: Path) -> bool:
    """Return whether a directory can be written, or could be created; create nothing."""
    try:
        path = path.expanduser().absolute()
        while not os.path.lexists(path) and path != path.parent:
            path = path.parent
    except (OSError, RuntimeError):  # RuntimeError: no home directory is known
        return False
    return path.is_dir() and os.access(path, os.W_OK | os.X_OK)


def _in_home(is_made: bool) -> Path | None:
    try:
        root = Path(platformdirs.user_cache_dir("jitattn", appauthor=False))
        if not root.is_absolute() or not files.is_among_ours(root):
            return None
        if not is_made:
            return root if is_makeable(root) else None
        if not os.path.isdir(root):
            make(root, files.our_owners()).close()
    except (RuntimeError, KeyError, OSError):  # no home directory is known, or it cannot be used
        return None
    return root


def _among_temporary_files(is_made: bool) -> Path | None:
    if not files.HAS_OWNERS:
        return None
    try:
        folder = Path(tempfile.gettempdir())
        if folder == Path.cwd():  # the last resort of tempfile, which is not acceptable here
            return None
        # A directory shared by all users, or our own; not another user's, as after ``sudo``.
        if not os.stat(folder).st_mode & stat.S_ISVTX and not files.is_among_ours(folder):
            return None
        root = folder / f"jitattn-{os.geteuid()}"
        if is_made:
            make(root, files.our_owners(), may_be_link=False).close()
    except OSError:
        return None
    return root


def make(root: Path, owners: Collection[int], *, may_be_link: bool = True) -> Directory:
    """Open the root of a cache; create it and its parents with access for this user only.

    A root that is created here is tagged as a cache, for backup programs. An existing directory may
    hold other files, and is not tagged.

    Raises
    ------
    OSError
        It cannot be made, or other users could write to it.
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
    """Tag a directory as a cache, unless `unless` is tagged; errors are ignored."""
    with contextlib.suppress(OSError):
        if unless is None or TAG not in unless.names():
            folder.write_new(TAG, _TAG_TEXT)
