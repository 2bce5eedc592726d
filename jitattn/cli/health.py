"""Collects the findings of `jitattn-cache doctor`: installation, faults and remedies.

Every area reports its own failure as a finding, so that the command itself never fails.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypeAlias

import jitattn
from jitattn.cache import files, leftovers, location, settings
from jitattn.cache.disk import user_cache
from jitattn.cache.store import Store
from jitattn.cli.words import counted
from jitattn.errors import JitAttnError
from jitattn.jit import compilers, launch, nvrtc, sources
from jitattn.jit.layers import layers
from jitattn.kernels.combine import CombineSpec
from jitattn.spec import install
from jitattn.spec.enums import Dtype

Status: TypeAlias = Literal["ok", "warn", "bad"]

_NETWORK: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "lustre", "gpfs", "beegfs",
                             "ceph", "fuse.sshfs", "afs", "9p"})  # fmt: skip
_FEW_BYTES: Final = 64 * 1024 * 1024
_TORCH_SECONDS: Final = 120
_ASK_TORCH: Final = (
    "import json, torch;"
    "print(json.dumps([torch.__version__, torch.version.cuda, torch.cuda.is_available()]))"
)
_NO_DRIVER: Final = (
    "with an NVIDIA GPU, install its driver (580 or newer, or 525 for CUDA 12), or start the "
    "container with it (docker run --gpus all); without one, CPU tensors and prebuild work as it is"
)
_ELSEWHERE: Final = "make it writable, or set JITATTN_CACHE_DIR to a directory that is"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check."""

    area: str
    status: Status
    found: str
    advice: str = ""


def examine(*, full: bool = False) -> Iterator[Finding]:
    """Check everything that jitattn depends on.

    Parameters
    ----------
    full : bool
        Also import torch, which takes seconds.
    """
    for area, look in (_AREAS | ({"torch (full)": _asked_torch} if full else {})).items():
        try:
            for status, found, advice in look():
                yield Finding(area, status, found, advice)
        except JitAttnError as error:
            yield Finding(area, "bad", str(error))
        except Exception as error:  # noqa: BLE001 - a doctor has to finish
            yield Finding(area, "warn", f"could not be examined: {type(error).__name__}: {error}")


_Findings: TypeAlias = Iterator[tuple[Status, str, str]]


def _python() -> _Findings:
    yield "ok", f"Python {platform.python_version()} on {platform.platform()}", ""
    if sys.maxsize < 2**32:
        yield "bad", "a 32-bit Python", "install a 64-bit Python"
    yield "ok", f"jitattn {jitattn.__version__} in {Path(jitattn.__file__).parent}", ""
    yield "ok", f"templates in {sources.locate()}", ""


def _torch() -> _Findings:
    version = _version("torch")
    if version is None:
        yield "bad", "torch is not installed", 'pip install "torch>=2.4"'
        return
    cuda = re.search(r"\+cu([0-9]+)", version)
    yield "ok", f"torch {version}", ""
    if cuda is None and compilers.driver_major() is not None and "+cpu" in version:
        yield "bad", "a driver is there, but torch is built without CUDA", "install a CUDA build"


def _asked_torch() -> _Findings:
    # In another process: a torch that crashes must not end this one.
    done = subprocess.run(
        [sys.executable, "-P", "-c", _ASK_TORCH],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_TORCH_SECONDS,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
        yield "bad", f"torch cannot be imported: {last}", "install torch again"
        return
    version, cuda, is_available = json.loads(done.stdout.splitlines()[-1])
    yield "ok", f"torch {version} can be imported, built for CUDA {cuda}", ""
    driver = compilers.driver_major()
    if driver is None or cuda is None:
        return
    if int(cuda.partition(".")[0]) > driver:
        advice = f"install torch for CUDA {driver}, or update the driver"
        yield "bad", f"torch needs CUDA {cuda}, the driver knows {driver}", advice
    elif not is_available:
        yield "bad", "torch finds no usable GPU", "see whether nvidia-smi does"


def _cupy() -> _Findings:
    names = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
    found = {name: version for name in names if (version := _version(name)) is not None}
    driver = compilers.driver_major()
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    if not found:
        status: Status = "warn" if driver is None else "bad"
        yield status, "CuPy is not installed: kernels cannot be launched", install.cuda(driver)
    elif len(found) > 1:
        yield (
            "bad",
            f"several CuPy distributions, which overwrite each other: {text}",
            f"pip uninstall {' '.join(found)}, then {install.cuda(driver)}",
        )
    else:
        yield "ok", text, ""
    major = re.search(r"cuda([0-9]{1,3})x", " ".join(found))
    if driver is not None and major is not None and int(major[1]) > driver:
        found_text = f"{text} needs CUDA {major[1]}, the driver knows {driver}"
        yield "bad", found_text, install.cuda(driver)
    built = re.search(r"\+cu([0-9]{2})", _version("torch") or "")
    if built is not None and major is not None and built[1] != major[1]:
        yield (
            "warn",
            f"torch is built for CUDA {built[1]}, CuPy for {major[1]}",
            f"works, with two CUDA runtimes in memory; with one: pip uninstall {' '.join(found)}, "
            f"then {install.cuda(int(built[1]))}",
        )
    if "cupy" not in sys.modules:
        home = Path(os.environ.get("CUPY_CACHE_DIR") or "~/.cupy/kernel_cache")
        if not _is_makeable(home):
            yield (
                "warn",
                f"CuPy's own cache directory {home} cannot be made",
                ("jitattn gives CuPy a temporary one; CUPY_CACHE_DIR names a lasting one"),
            )


def _nvrtc() -> _Findings:
    found = compilers.installed()
    if not found:
        yield (
            "warn",
            "no NVRTC is installed: only kernels on disk can be used",
            install.cuda(compilers.driver_major()),
        )
        return
    chosen = compilers.chosen()
    driver = compilers.driver_major()
    if settings.nvrtc_major() is not None:
        why = f"JITATTN_NVRTC={settings.nvrtc_major()}"
    else:
        why = "the newest" if driver is None else f"the newest for a driver of CUDA {driver}"
    for toolchain in found.values():
        mark = f" (compiles: {why})" if toolchain == chosen else ""
        yield "ok", f"{toolchain} in {toolchain.library}{mark}", ""
        if (12, 0) <= toolchain.version < (12, 6):
            yield (
                "warn",
                f"{toolchain} is older than 12.6: its cubins are not reproducible",
                'pip install --upgrade "nvidia-cuda-nvrtc-cu12>=12.6"',
            )
    spec = CombineSpec(dtype=Dtype.BF16, out_dtype=Dtype.BF16, head_dim_v=16, arch="sm_80")
    compiled = nvrtc.compile_spec(spec, sources.closure(spec.family), chosen)
    yield "ok", f"a small kernel compiles in {compiled.compile_ms:.0f} ms", ""


def _driver() -> _Findings:
    major = compilers.driver_major()
    if major is None:
        if install.IS_MACOS:
            yield "warn", "macOS has no CUDA", install.NO_MACOS
            return
        yield "warn", "no CUDA driver: compiling works, launching does not", _NO_DRIVER
        return
    yield "ok", f"the driver supports CUDA {major}", ""
    if major < 12:
        yield "bad", "CUDA 12 is the oldest that jitattn supports", "update the driver to 525"


def _gpus() -> _Findings:
    if compilers.driver_major() is None:
        return
    runtime = launch.import_cupy().cuda.runtime
    for index in range(runtime.getDeviceCount()):
        properties = runtime.getDeviceProperties(index)
        name = properties["name"].decode()
        number = 10 * properties["major"] + properties["minor"]
        if number < 80:
            yield "warn", f"{index}: {name}, sm_{number}: jitattn needs sm_80 or newer", ""
        else:
            yield "ok", f"{index}: {name}, sm_{number}", ""


def _cache() -> _Findings:
    mode = settings.cache_mode()
    cache = user_cache(make=False)
    if cache is None:
        yield (
            "warn",
            "no directory is to be had: every process compiles anew",
            ("set JITATTN_CACHE_DIR to a directory that you can write"),
        )
        return
    yield _why_there(cache.root, mode)
    if cache.root.is_symlink():
        yield "ok", f"it is a link to {cache.root.resolve()}", ""
    if not os.path.lexists(cache.root):
        if _is_makeable(cache.root):
            yield "ok", "it does not exist yet, and can be made", ""
        else:
            advice = _out_of_the_way(cache.root) or _ELSEWHERE
            yield "bad", "it does not exist and cannot be made: kernels stay in memory", advice
        return
    yield from _trust(cache)
    if others := _other_things(cache.root):
        found = f"other things lie in it: {', '.join(others[:3])}{' …' if others[3:] else ''}"
        yield "warn", found, "a cache is a directory of its own: set JITATTN_CACHE_DIR to one"
    if mode == "rw" and cache.root.is_dir():
        try:
            cache.check_writable()
            yield "ok", "it can be written", ""
        except OSError as error:
            yield "warn", f"it cannot be written ({error}): kernels stay in memory", _ELSEWHERE
    free = shutil.disk_usage(cache.root).free
    status: Status = "ok" if free > _FEW_BYTES else "warn"
    yield status, f"{free >> 20} MiB are free", "" if status == "ok" else "make room"
    kind = _filesystem(cache.root)
    if kind in _NETWORK:
        yield "ok", f"it is on a network filesystem ({kind}): slower, but safe", ""


def _layers() -> _Findings:
    for layer in layers(user_cache(make=False)):
        trust = list(_trust(layer))
        yield from trust
        if any(status == "bad" for status, *_ in trust):
            continue
        if not layer.store.is_dir():
            yield "warn", f"{layer.root} holds no kernels", "see JITATTN_CACHE_PATH"
            continue
        kernels = list(layer.entries())
        newer = {one.toolchain for one in kernels if not compilers.is_loadable(one.toolchain)}
        yield "ok", f"{layer.root}: {counted(len(kernels), 'kernel')}", ""
        for toolchain in sorted(newer):
            yield (
                "warn",
                f"{layer.root}: the driver cannot load what {toolchain} made",
                ("update the driver"),
            )


def _environment() -> _Findings:
    for name, value in sorted(os.environ.items()):
        if name.startswith("JITATTN_"):
            if name in settings.VARIABLES:
                yield "ok", f"{name}={value}", ""
            else:
                near = difflib.get_close_matches(name, settings.VARIABLES, 1)
                advice = f"is {near[0]} meant?" if near else "see the guide: cache and environment"
                yield "warn", f"{name}={value} is no variable of jitattn", advice
    for read in settings.READERS:
        try:
            read()
        except JitAttnError as error:
            yield "bad", str(error), ""


_AREAS: Final[dict[str, Callable[[], _Findings]]] = {
    "python": _python,
    "torch": _torch,
    "cupy": _cupy,
    "nvrtc": _nvrtc,
    "driver": _driver,
    "gpus": _gpus,
    "cache": _cache,
    "read-only": _layers,
    "environment": _environment,
}


def _why_there(root: Path, mode: str) -> tuple[Status, str, str]:
    if settings.cache_dir():
        return "ok", f"{root} (JITATTN_CACHE_DIR, JITATTN_CACHE={mode})", ""
    if root.parent == Path(tempfile.gettempdir()):
        found = f"{root}, among temporary files: the home directory cannot be used"
        return "warn", found, "set JITATTN_CACHE_DIR to a directory that lasts"
    return "ok", f"{root} (the default, JITATTN_CACHE={mode})", ""


def _trust(store: Store) -> _Findings:
    """Check who can write to the root of a store and to its directories."""
    for folder in (store.root, store.store):
        try:
            # The target of a link is checked and reported.
            status = os.stat(folder) if folder == store.root else os.lstat(folder)
            owner = f"user {status.st_uid}, " if files.HAS_OWNERS else ""
            what = f"{folder}: {owner}mode {stat.S_IMODE(status.st_mode):o}"
            files.check_directory(folder, store.owners, may_be_link=folder == store.root)
            with os.scandir(folder):
                yield "ok", what, ""
        except files.UntrustedError as error:
            advice = _out_of_the_way(folder) or (
                f"chmod go-w {folder}, or chown it; or name another directory"
            )
            yield "bad", f"{what}: not used: {error.strerror}", advice
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            yield "bad", f"{folder}: it cannot be read: {error.strerror}", "let this user read it"


def _other_things(root: Path) -> list[str]:
    """List the names in the root of a cache that the cache did not make."""
    return [
        name
        for name in sorted(entry.name for entry in files.scan(root))
        if name not in (location.TAG, leftovers.IMPORTED) and not re.fullmatch("v[0-9]+", name)
    ]


def _out_of_the_way(path: Path) -> str:
    """Return what to do about a file where a directory, or one above it, has to be; or ""."""
    for one in (path, *path.parents):
        if os.path.lexists(one):
            if one.is_dir():
                return ""
            what = "a broken link" if one.is_symlink() else "a file"
            return f"{one} is {what}: move it away, or set JITATTN_CACHE_DIR to a directory"
    return ""


def _is_makeable(path: Path) -> bool:
    """Return whether a directory can be written, or could be created; create nothing."""
    # Nothing can be created in /proc, whatever its mode.
    return location.is_makeable(path) and _filesystem(path) != "proc"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _filesystem(path: Path) -> str:
    """Return the filesystem type of a path; empty if unknown."""
    try:
        mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    resolved = path.resolve()
    # Spaces and other special characters are octal escapes, as in \040.
    points = [re.sub(r"\\([0-7]{3})", lambda code: chr(int(code[1], 8)), one[1]) for one in mounts]
    kinds = {
        point: mount[2]
        for point, mount in zip(points, mounts, strict=True)
        if resolved.is_relative_to(point)
    }
    return kinds[max(kinds, key=len)] if kinds else ""
