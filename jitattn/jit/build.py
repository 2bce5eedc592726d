"""`KernelSpec` → cubin: from memory, from disk, or compiled. Needs no GPU.

A kernel is compiled once, however many threads and processes ask for it together: threads wait on
a lock of their spec, processes on a lock file. A process that compiled uses the bytes it has in
memory, and never reads back what it published.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal, TypeAlias

from jitattn.errors import InternalError
from jitattn.jit import nvrtc, settings, sources
from jitattn.jit.cache import Metadata, cache_key, is_cubin_for, sha256, user_cache

if TYPE_CHECKING:
    from jitattn.jit.cache import DiskCache
    from jitattn.jit.spec import KernelSpec

Origin: TypeAlias = Literal["disk", "compiled"]
_LOG: Final = logging.getLogger("jitattn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Built:
    """A cubin and what is known of it."""

    spec: KernelSpec
    key: str
    cubin: bytes
    metadata: Metadata
    origin: Origin  #: where this process got it from


@dataclass(frozen=True, slots=True)
class Stats:
    """What this process has done so far."""

    compiled: int
    disk_hits: int
    memory_hits: int


class _Process:
    """State of the process: built kernels, a lock for each that is in the making, counters."""

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
        return built


_process = _Process()


def build(spec: KernelSpec) -> Built:
    """Return the cubin of `spec`, compiling it if it is nowhere to be found.

    Raises
    ------
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
            built = _process.keep(_from_disk_or_compiled(spec))
    return built


def rebuild(spec: KernelSpec) -> Built:
    """Compile `spec` afresh and replace what the cache holds; for a cubin the driver refused."""
    with _process.lock_of(spec):
        disk = user_cache() if settings.cache_mode() == "rw" else None
        return _process.keep(_compile(spec, _identify(spec), disk))


def stats() -> Stats:
    """Count what this process compiled, read from disk and found in memory."""
    return Stats(_process.compiled, _process.disk_hits, _process.memory_hits)


def clear_memory() -> None:
    """Forget every kernel of this process and set the counters to 0. The disk stays as it is."""
    global _process
    _process = _Process()


def key_of(spec: KernelSpec) -> str:
    """Return the cache key of `spec` with the installed NVRTC."""
    return _identify(spec).key


@dataclass(frozen=True, slots=True)
class _Identity:
    """What NVRTC is given for a spec, and the key made from exactly that."""

    source: sources.Sources
    compiler: nvrtc.Toolchain
    options: tuple[str, ...]
    key: str


def _identify(spec: KernelSpec) -> _Identity:
    source = sources.closure(spec.family)
    compiler = nvrtc.toolchain()
    options = nvrtc.options(spec, compiler)
    key = cache_key(spec, source.digest, options, str(compiler))
    return _Identity(source, compiler, options, key)


def _from_disk_or_compiled(spec: KernelSpec) -> Built:
    identity = _identify(spec)
    mode = settings.cache_mode()
    disk = user_cache() if mode != "off" else None
    if disk is None:
        return _compile(spec, identity, None)
    found = _from_disk(spec, identity.key, disk)
    if found is None and mode == "ro":
        return _compile(spec, identity, None)
    if found is None:
        with disk.lock(identity.key):
            # Another process may have made it meanwhile.
            found = _from_disk(spec, identity.key, disk)
            if found is None:
                return _compile(spec, identity, disk)
    return found


def _from_disk(spec: KernelSpec, key: str, disk: DiskCache) -> Built | None:
    entry = disk.read(key, spec.arch)
    if entry is None:
        return None
    return Built(spec=spec, key=key, cubin=entry.cubin, metadata=entry.metadata, origin="disk")


def _compile(spec: KernelSpec, identity: _Identity, disk: DiskCache | None) -> Built:
    compiler, key = identity.compiler, identity.key
    compiled = nvrtc.compile_spec(spec, identity.source, compiler, identity.options)
    if not is_cubin_for(compiled.cubin, spec.arch):
        raise InternalError(f"{compiler} gave no cubin for {spec.arch}: {spec.to_key()}")
    metadata = Metadata(
        key=key,
        spec=spec.to_dict(),
        arch=spec.arch,
        toolchain=str(compiler),
        options=compiled.options,
        source_digest=identity.source.digest,
        registers=compiled.registers,
        stack_bytes=compiled.stack_bytes,
        spill_bytes=compiled.spill_bytes,
        smem_bytes=spec.smem_bytes,
        compile_ms=float(round(compiled.compile_ms, 1)),
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
        key[:16],
    )
    if disk is not None:
        disk.write(compiled.cubin, metadata)
    return Built(spec=spec, key=key, cubin=compiled.cubin, metadata=metadata, origin="compiled")


def _after_fork_in_child() -> None:
    """Forget the locks: one that another thread of the parent held is never released here."""
    _process.lock = threading.Lock()
    _process.locks.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
