"""Searches the read-only directories: given ones, an installed package, imported archives.

They may come from another machine with another compiler, so a kernel is looked up without regard to
its compiler; only cubins of a newer CUDA than the driver's are skipped. They may belong to an
administrator: the owner of the root of such a directory may own its files.
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

#: Name of an installed package that carries prebuilt kernels.
PREBUILT_PACKAGE: Final = "jitattn_prebuilt"


def layers(user: DiskCache | None) -> Iterator[Store]:
    """Yield the read-only directories, in search order."""
    for root in settings.cache_path():
        yield _store_of(root)
    for folder in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        root = Path(folder) / PREBUILT_PACKAGE
        if os.path.isdir(root):  # False for an inaccessible folder, where Path.is_dir raises
            yield _store_of(root)
    if user is not None:
        yield from imported(user)


def imported(user: DiskCache) -> Iterator[Store]:
    """Yield the archives imported into a user's cache, sorted by digest."""
    trouble: list[OSError] = []
    for digest in leftovers.imports(user, trouble):
        yield _imported_store(user.root / leftovers.IMPORTED / digest, *files.our_owners())
    for error in trouble:  # the user's cache has already warned of its root
        where = user.root / leftovers.IMPORTED
        files.warn_once(
            where if error.filename == str(where) else user.root,
            f"imported archives in {user.root} are not used: {error.filename}: {error.strerror}",
        )


def find(key: str, arch: str, user: DiskCache | None) -> Entry | None:
    """Return a kernel of any compiler from the first read-only directory that has it."""
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
