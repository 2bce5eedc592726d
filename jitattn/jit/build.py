"""Builds the cubin of a `KernelSpec`: from memory, from disk, or compiled. Needs no GPU.

The order is: this process, the user's cache, the read-only directories, the compiler. A kernel is
compiled once, however many threads and processes need it at the same time: threads wait on a lock
of the spec, processes on a lock file. A process that compiled uses the bytes in its memory, and
never reads back the entry that it published.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from jitattn.cache import settings
from jitattn.cache.disk import user_cache
from jitattn.cache.entry import MAX_LOG, Entry, Metadata, cache_key, is_cubin_for, sha256
from jitattn.cache.store import Bad
from jitattn.errors import CacheMissError, CompileError, InternalError
from jitattn.jit import compilers, layers, nvrtc, record, sources
from jitattn.jit.codegen import render

if TYPE_CHECKING:
    from jitattn.cache.disk import DiskCache
    from jitattn.spec.kernel_spec import KernelSpec

Origin: TypeAlias = Literal["disk", "read-only", "compiled"]
_LOG: Final = logging.getLogger("jitattn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """Cubin, metadata and origin."""

    spec: KernelSpec
    key: str
    cubin: bytes
    metadata: Metadata
    origin: Origin  #: of this process: the user's cache, another directory, or NVRTC


@dataclass(frozen=True, slots=True)
class Stats:
    """Counters of this process."""

    compiled: int
    disk_hits: int  #: includes read-only directories
    memory_hits: int


class _Process:
    """State of the process: built kernels, a lock per kernel being built, counters."""

    def __init__(self) -> None:
        self.built: dict[KernelSpec, Built] = {}
        self.locks: dict[KernelSpec, threading.Lock] = {}
        self.lock = threading.Lock()
        self.compiled = self.disk_hits = self.memory_hits = 0

    def lock_of(self, spec: KernelSpec) -> threading.Lock:
        with self.lock:
            return self.locks.setdefault(spec, threading.Lock())

    def keep(self, built: Built) -> Built:
        with self.lock:
            self.built[built.spec] = built
            if built.origin == "compiled":
                self.compiled += 1
            else:
                self.disk_hits += 1
        record.note(built.spec)
        return built

    def keys_in_use(self) -> set[str]:
        with self.lock:
            return {built.key for built in self.built.values()}


_process = _Process()


def build(spec: KernelSpec) -> Built:
    """Return the cubin of `spec`; compile it if it is not cached.

    Raises
    ------
    CacheMissError
        It is not cached, and ``JITATTN_NO_COMPILE`` forbids compiling.
    CompileError
        NVRTC is missing or rejected the source.
    UnsupportedError
        NVRTC does not know the architecture.
    """
    built = _process.built.get(spec)
    if built is not None:
        _process.memory_hits += 1
        return built
    with _process.lock_of(spec):
        built = _process.built.get(spec)
        if built is None:
            built = _process.keep(_find(spec) or _make(spec))
    return built


def find(spec: KernelSpec) -> Built | None:
    """Return the cubin of `spec` if it is in memory or on disk; never compile."""
    built = _process.built.get(spec)
    if built is not None:
        return built
    with _process.lock_of(spec):
        found = _find(spec)
        return None if found is None else _process.keep(found)


def adopt(built: Built) -> Built:
    """Store a kernel that a worker process built for this one."""
    with _process.lock_of(built.spec):
        return _process.built.get(built.spec) or _process.keep(built)


def rebuild(spec: KernelSpec) -> Built:
    """Compile `spec` again and replace the cache entry; for a cubin that the driver refused."""
    with _process.lock_of(spec):
        disk = user_cache() if settings.cache_mode() == "rw" else None
        return _process.keep(_compile(spec, disk))


def stats() -> Stats:
    """Return how many kernels this process compiled, read from disk and found in memory."""
    return Stats(_process.compiled, _process.disk_hits, _process.memory_hits)


def clear_memory() -> None:
    """Discard all kernels of this process and reset the counters; the disk is unchanged."""
    global _process
    _process = _Process()


def key_of(spec: KernelSpec) -> str:
    """Return the cache key of `spec` with the installed NVRTC (its first 40 digits without one)."""
    return _identify(spec, _compiler()).key


@dataclass(frozen=True, slots=True)
class _Identity:
    """Inputs that determine the machine code of a spec, and the key made from them."""

    source_digest: str
    header_digest: str
    options: tuple[str, ...]
    key: str


def _identify(
    spec: KernelSpec, compiler: compilers.Toolchain | None, source_digest: str | None = None
) -> _Identity:
    source_digest = source_digest or sources.digest(spec.family)
    header_digest = sha256(render(spec).encode())
    options = nvrtc.options(spec)
    name = "" if compiler is None else str(compiler)
    key = cache_key(spec.to_dict(), source_digest, header_digest, options, name)
    return _Identity(source_digest, header_digest, options, key)


def _compiler() -> compilers.Toolchain | None:
    try:
        return compilers.chosen()
    except CompileError:  # no usable compiler: a cubin on disk may still be used
        return None


def _find(spec: KernelSpec) -> Built | None:
    mode = settings.cache_mode()
    if mode == "off":
        return None
    compiler = _compiler()
    key = _identify(spec, compiler).key
    user = user_cache()
    entry: Entry | None = None
    if user is not None and compiler is not None:
        entry = user.read(key, spec.arch, is_writable=mode == "rw")
    elif user is not None:
        entry = _made_by_any(key, spec.arch, user)
    if entry is not None:
        return _built(spec, entry, "disk")
    entry = layers.find(key, spec.arch, user)
    return None if entry is None else _built(spec, entry, "read-only")


def _made_by_any(key: str, arch: str, user: DiskCache) -> Entry | None:
    """Search the user's cache for a cubin of any compiler, if no compiler is installed."""
    for looked in user.look_for_kernel(key, arch, compilers.is_loadable):
        if not isinstance(looked, Bad):
            return looked
    return None


def _make(spec: KernelSpec) -> Built:
    """Compile `spec`, or wait for another process that compiles it."""
    if settings.no_compile():
        raise CacheMissError(_missing(spec))
    user = user_cache() if settings.cache_mode() == "rw" else None
    if user is None:
        return _compile(spec, None)
    claim = user.claim(_identify(spec, compilers.chosen()).key, spec.arch)
    if isinstance(claim, Entry):
        return _built(spec, claim, "disk")
    with claim:
        return _compile(spec, user)


def _missing(spec: KernelSpec) -> str:
    return (
        f"the {spec.family} kernel of this call is not in the cache, and JITATTN_NO_COMPILE=1 "
        f"forbids compiling it\n  spec: {spec.to_key()}\n  make it ahead with: {spec.command()}"
    )


def _compile(spec: KernelSpec, disk: DiskCache | None) -> Built:
    compiler, source = compilers.chosen(), sources.closure(spec.family)
    # The key is made from the text that is compiled, not from a memoized digest.
    identity = _identify(spec, compiler, source.digest)
    compiled = nvrtc.compile_spec(spec, source, compiler, identity.options)
    if not is_cubin_for(compiled.cubin, spec.arch):
        raise InternalError(f"{compiler} gave no cubin for {spec.arch}: {spec.to_key()}")
    metadata = Metadata(
        key=identity.key,
        spec=spec.to_dict(),
        arch=spec.arch,
        toolchain=str(compiler),
        options=compiled.options,
        source_digest=identity.source_digest,
        header_digest=identity.header_digest,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        spill_bytes=compiled.spill_bytes,
        smem_bytes=spec.smem_bytes,
        compile_ms=float(round(compiled.compile_ms, 1)),
        log=compiled.log[-MAX_LOG:],
        bytes=len(compiled.cubin),
        sha256=sha256(compiled.cubin),
    )
    _LOG.info(
        "compiled %s for %s in %.2f s: %d registers, %d bytes spilled (%s)",
        spec.family,
        spec.arch,
        compiled.compile_ms / 1e3,
        compiled.registers,
        compiled.spill_bytes,
        identity.key[:16],
    )
    entry = Entry(compiled.cubin, metadata)
    if disk is not None:
        disk.write(entry, _process.keys_in_use())
    return _built(spec, entry, "compiled")


def _built(spec: KernelSpec, entry: Entry, origin: Origin) -> Built:
    metadata = entry.metadata
    return Built(spec=spec, key=metadata.key, cubin=entry.cubin, metadata=metadata, origin=origin)


def _after_fork_in_child() -> None:
    """Replace the locks: one that another thread of the parent held is never released here."""
    _process.lock = threading.Lock()
    _process.locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
