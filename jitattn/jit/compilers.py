"""Selects the NVRTC that compiles, from installed wheels and the driver's version; opens none."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jitattn.cache import memo, settings
from jitattn.errors import CompileError
from jitattn.spec import install
from jitattn.spec.text import version_numbers

#: CUDA major → (distribution, library, builtins) on Linux and on Windows. Patterns are relative to
#: site-packages.
_LINUX: Final = {
    12: ("nvidia-cuda-nvrtc-cu12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12", "libnvrtc-builtins.so*"),
    13: ("nvidia-cuda-nvrtc", "nvidia/cu13/lib/libnvrtc.so.13", "libnvrtc-builtins.so*"),
}
_WINDOWS: Final = {
    12: (
        "nvidia-cuda-nvrtc-cu12",
        "nvidia/cuda_nvrtc/bin/nvrtc64_120_0.dll",
        "nvrtc-builtins64_*.dll",
    ),
    13: ("nvidia-cuda-nvrtc", "nvidia/cu13/bin/x86_64/nvrtc64_130_0.dll", "nvrtc-builtins64_*.dll"),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Toolchain:
    """An installed NVRTC."""

    version: tuple[int, ...]  #: version of the wheel, e.g. (12, 9, 86)
    library: Path
    builtins: tuple[Path, ...]

    def __str__(self) -> str:
        """Return the compiler's name in cache keys: 'nvrtc 12.9.86'."""
        return "nvrtc " + ".".join(map(str, self.version))


def installed(platform: str = sys.platform) -> dict[int, Toolchain]:
    """Find the installed NVRTC wheels, by CUDA major version."""
    found = {}
    for major, (name, library, builtins) in (_WINDOWS if platform == "win32" else _LINUX).items():
        distribution = _wheel(name)
        if distribution is None:
            continue
        path = Path(str(distribution.locate_file(library)))
        version = _version_of(distribution)
        if version[:1] == (major,) and _is_there(path):
            beside: list[Path] = []
            with contextlib.suppress(OSError):  # opening the library will report the reason
                beside = sorted(path.parent.glob(builtins))
            found[major] = Toolchain(version=version, library=path, builtins=tuple(beside))
    return found


def _wheel(name: str) -> importlib.metadata.Distribution | None:
    """Return an installed wheel, ignoring entries of sys.path that are not paths."""
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    except (TypeError, ValueError):  # importlib.metadata, unlike imports, fails on such entries
        found = importlib.metadata.distributions(name=name, path=_folders())
        return next(iter(found), None)


def _folders() -> list[str]:
    """List the entries of sys.path that may be folders."""
    return [entry for entry in sys.path if isinstance(entry, str) and entry and "\0" not in entry]


def _version_of(distribution: importlib.metadata.Distribution) -> tuple[int, ...]:
    """Return the version of a wheel; empty if its metadata is damaged."""
    try:
        return version_numbers(distribution.version)
    except (OSError, ValueError, KeyError, TypeError):  # unreadable, or without a version
        return ()


def _is_there(path: Path) -> bool:
    """Return whether a library exists, even unreadable: opening it reports the reason."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True


def chosen() -> Toolchain:
    """Return the NVRTC that compiles, without opening it.

    The newest whose CUDA major version is not above the driver's, which could not load newer
    cubins; without a driver, the newest. ``JITATTN_NVRTC`` overrides.

    Raises
    ------
    CompileError
        No usable NVRTC is installed.
    """
    return _choose(settings.nvrtc_major())


def is_loadable(toolchain: str) -> bool:
    """Return whether the driver can load cubins of a compiler; True without a driver."""
    driver = driver_major()
    return driver is None or 0 < (version_numbers(toolchain) or (0,))[0] <= driver


@functools.cache
def driver_major() -> int | None:
    """Return the CUDA major version of the driver, without initializing CUDA; None without one."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        version = ctypes.c_int()
        failed = driver.cuDriverGetVersion(ctypes.byref(version))
    except (OSError, AttributeError):
        return None
    return None if failed else version.value // 1000


@functools.cache
def _choose(asked: int | None) -> Toolchain:
    found = _remembered()
    if asked is not None:
        if asked in found:
            return found[asked]
        raise CompileError(
            f"JITATTN_NVRTC={asked}, but that NVRTC is not installed (found: "
            f"{', '.join(map(str, found.values())) or 'none'}); {install.cuda(asked)}"
        )
    driver = driver_major()
    usable = [major for major in found if driver is None or major <= driver]
    if usable:
        return found[max(usable)]
    if found:
        raise CompileError(
            f"the driver supports CUDA {driver}, but the only NVRTC installed is "
            f"{', '.join(map(str, found.values()))}, whose kernels it cannot load; "
            f"{install.cuda(12)}, or update the driver"
        )
    raise CompileError(f"no NVRTC is installed: {install.cuda()}")


def _remembered() -> dict[int, Toolchain]:
    """Return `installed()`, from the memo unless something was installed or removed since."""
    folders = _folders()
    name = f"nvrtc in {sys.prefix}"
    fact = memo.recall(name)
    if fact is not None:
        found = _from_plain(fact[1])
        if found and fact[0] == memo.signature(_watched(folders, found)):
            return found
    found = installed()
    if found:
        memo.remember(name, memo.signature(_watched(folders, found)), _to_plain(found))
    return found


def _watched(folders: list[str], found: dict[int, Toolchain]) -> list[str]:
    """List the paths that change when a wheel is installed or removed."""
    return folders + [str(toolchain.library) for toolchain in found.values()]


def _to_plain(found: dict[int, Toolchain]) -> list[object]:
    return [
        [list(one.version), str(one.library), [str(path) for path in one.builtins]]
        for one in found.values()
    ]


def _from_plain(plain: object) -> dict[int, Toolchain]:
    """Parse the output of `_to_plain`; empty if any part of it is invalid."""
    found = {}
    for one in plain if isinstance(plain, list) else ():
        match one:
            case [[int(major), *rest] as version, str(library), list(builtins)] if (
                0 < len(version) <= 3
                and all(type(part) is int and 0 <= part < 10**6 for part in version)
                and all(isinstance(path, str) for path in builtins)
            ):
                found[major] = Toolchain(
                    version=(major, *rest),
                    library=Path(library),
                    builtins=tuple(map(Path, builtins)),
                )
            case _:
                return {}
    return found
