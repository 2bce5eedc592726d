"""Directories of kernels that are only read: given ones, an installed package, imported archives.

They may come from another machine with another compiler, so a kernel is looked up by what it is,
not by what made it; only a cubin of a newer CUDA than the driver's is left alone. They may belong
to an administrator: whoever owns the root of such a directory may own what is in it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jitattn.cache import files, leftovers, settings
from jitattn.cache.store import Bad, Store
from jitattn.jit import compilers

if TYPE_CHECKING:
    from collections.abc import Iterator

    from jitattn.cache.disk import DiskCache
    from jitattn.cache.entry import Entry

#: Name of an installed package that carries kernels beside the code.
PREBUILT_PACKAGE: Final = "jitattn_prebuilt"


def layers(user: DiskCache | None) -> Iterator[Store]:
    """Yield the read-only directories, in the order in which they are asked."""
    for root in settings.cache_path():
        yield _store_of(root)
    for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        root = Path(folder) / PREBUILT_PACKAGE
        if os.path.isdir(root):  # unlike Path, it takes a closed folder for none
            yield _store_of(root)
    if user is not None:
        yield from imported(user)


def imported(user: DiskCache) -> Iterator[Store]:
    """Yield what was imported into a user's cache, sorted by the digest of the archive."""
    trouble: list[OSError] = []
    for digest in leftovers.imports(user, trouble):
        yield _imported_store(user.root / leftovers.IMPORTED / digest, *files.our_owners())
    for error in trouble:  # of the root itself the user's cache has warned already
        where = user.root / leftovers.IMPORTED
        files.warn_once(
            where if error.filename == str(where) else user.root,
            f"imported archives in {user.root} are not used: {error.filename}: {error.strerror}",
        )


def find(key: str, arch: str, user: DiskCache | None) -> Entry | None:
    """Return a kernel from the first read-only directory that has it, whatever made it."""
    for layer in layers(user):
        for looked in layer.look_for_kernel(key, arch, compilers.is_loadable):
            if isinstance(looked, Bad):
                files.warn_once(
                    (layer.root, "bad"),
                    f"a kernel in {layer.root} failed its checks and is not used "
                    f"({looked.key[:16]}: {looked.reason})",
                )
            else:
                return looked
    return None


def _store_of(root: Path) -> Store:
    owners = set(files.our_owners())
    if files.HAS_OWNERS:
        with contextlib.suppress(OSError):
            owners.add(os.stat(root).st_uid)
    return _cached_store(root, frozenset(owners))


@functools.cache
def _cached_store(root: Path, owners: frozenset[int]) -> Store:
    return Store(root, owners)


@functools.cache
def _imported_store(root: Path, *owners: int) -> Store:
    return Store(root, frozenset(owners), may_be_link=False)
