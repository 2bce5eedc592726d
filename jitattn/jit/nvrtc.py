"""Compiles with NVRTC through ctypes, from the installed wheel; needs neither GPU nor driver.

The library is opened by its full path, independently of the one that CuPy or torch load. NVRTC 13.0
has no RUNPATH, so its builtins are loaded first. From 12.9 on, NVRTC uses the driver's own cache
unless an option disables it. Headers are passed in memory, and the working directory is never
searched. After a fork during a compile in another thread, the child's next compile would hang, so a
fork waits for running compiles.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from jitattn.cache import settings
from jitattn.cache.files import make_parents
from jitattn.errors import CompileError, UnsupportedError
from jitattn.jit import compilers
from jitattn.jit.codegen import HEADER_NAME, render
from jitattn.spec.kernel_spec import arch_number

if TYPE_CHECKING:
    from collections.abc import Callable

    from jitattn.jit.compilers import Toolchain
    from jitattn.jit.sources import Sources
    from jitattn.spec.kernel_spec import KernelSpec

#: Fixed name of the program, because some NVRTC versions write it into the cubin.
_PROGRAM_NAME: Final = b"jitattn.cu"
#: Directory of the templates in line numbers, whatever the working directory.
_SOURCE_ROOT: Final = "/cuda_src"
_LINE_INFO: Final = "-lineinfo"
_FUNCTIONS: Final = (
    "nvrtcCompileProgram",
    "nvrtcCreateProgram",
    "nvrtcDestroyProgram",
    "nvrtcGetCUBIN",
    "nvrtcGetCUBINSize",
    "nvrtcGetErrorString",
    "nvrtcGetNumSupportedArchs",
    "nvrtcGetProgramLog",
    "nvrtcGetProgramLogSize",
    "nvrtcGetSupportedArchs",
)
_LOG: Final = logging.getLogger("jitattn")


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiled:
    """Result of a compile; stack and spills in bytes per thread."""

    cubin: bytes
    log: str
    options: tuple[str, ...]
    registers: int
    stack_bytes: int
    spill_bytes: int  #: spill stores
    compile_ms: float


def options(spec: KernelSpec) -> tuple[str, ...]:
    """Return the options that decide the machine code of `spec`; they are part of the cache key."""
    fixed = (
        "--std=c++17",
        "-default-device",
        "--no-source-include",
        f"--gpu-architecture={spec.arch}",
        "--ftz=true",
        "--fmad=true",
    )
    # The root is part of the options, and so of the key, since it is compiled into the cubin.
    line_info = (_LINE_INFO, f"-DJITATTN_SOURCE_ROOT={_SOURCE_ROOT}") if settings.lineinfo() else ()
    asserts = ("-DJITATTN_DEBUG_ASSERT",) if settings.debug_assert() else ()
    return fixed + line_info + asserts


def _other_options(compiler: Toolchain) -> tuple[str, ...]:
    """Return options that do not affect the code: reports, and no use of the driver's cache."""
    no_cache = ("--no-cache",) if compiler.version >= (12, 9) else ()
    return ("--ptxas-options=-v", *no_cache)


def supported_archs(compiler: Toolchain) -> tuple[int, ...]:
    """Return the architectures that an NVRTC supports, as numbers."""
    library = _open(compiler)
    count = ctypes.c_int()
    _check(library, library.nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    archs = (ctypes.c_int * count.value)()
    _check(library, library.nvrtcGetSupportedArchs(archs))
    return tuple(archs)


def compile_spec(
    spec: KernelSpec,
    sources: Sources,
    compiler: Toolchain | None = None,
    arguments: tuple[str, ...] | None = None,
) -> Compiled:
    """Compile the kernel of `spec` to a cubin.

    Parameters
    ----------
    arguments : tuple of str, default `options(spec)`
        The options that the cache key was made from, so that key and compile agree.

    Raises
    ------
    CompileError
        NVRTC cannot be used, or rejected the source; the error has the log and the directory that
        keeps the source.
    UnsupportedError
        NVRTC does not know the architecture.
    """
    compiler = compilers.chosen() if compiler is None else compiler
    if arch_number(spec.arch) not in supported_archs(compiler):
        raise UnsupportedError(
            f"{spec.arch} is not known to {compiler} (it knows sm_"
            f"{', sm_'.join(map(str, supported_archs(compiler)))}); install a newer NVRTC "
            "(sm_100 and sm_120 need 12.8)"
        )
    headers = {**sources.headers, HEADER_NAME: render(spec)}
    arguments = options(spec) if arguments is None else arguments
    given = arguments + _other_options(compiler)
    entry, texts = sources.entry, headers
    if _LINE_INFO in arguments:
        entry = _named(f"entry/{spec.family}.cu", entry)
        texts = {name: _named(name, text) for name, text in headers.items()}
    with _running:
        start = time.perf_counter()
        succeeded, cubin, log = _run(_open(compiler), entry, texts, given)
        compile_ms = (time.perf_counter() - start) * 1e3
    keep = settings.keep_source()
    if not succeeded:
        raise _compile_error(spec, sources.entry, headers, given, log, keep)
    if keep is not None:
        try:
            _keep_sources(keep, spec, sources.entry, headers)
        except OSError as error:
            _LOG.warning("JITATTN_KEEP_SOURCE: the source could not be kept: %s", error)
    return Compiled(
        cubin=cubin,
        # Without the line that differs from run to run, so that equal compiles have equal logs.
        log="\n".join(line for line in log.splitlines() if "Compile time" not in line),
        options=arguments,
        registers=_figure(r"Used ([0-9]+) registers", log),
        stack_bytes=_figure(r"([0-9]+) bytes stack frame", log),
        spill_bytes=_figure(r"([0-9]+) bytes spill stores", log),
        compile_ms=compile_ms,
    )


def _named(name: str, text: str) -> str:
    """Name a source for line numbers; NVRTC joins other names to the working directory."""
    return f'#line 1 "{_SOURCE_ROOT}/{name}"\n{text}'


def _run(
    library: ctypes.CDLL, source: str, headers: dict[str, str], arguments: tuple[str, ...]
) -> tuple[bool, bytes, str]:
    """Compile one program; return (succeeded, cubin, log)."""
    program = ctypes.c_void_p()
    names = ctypes.c_char_p * len(headers)
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program),
            source.encode(),
            _PROGRAM_NAME,
            len(headers),
            names(*(text.encode() for text in headers.values())),
            names(*(name.encode() for name in headers)),
        ),
    )
    try:
        encoded = (ctypes.c_char_p * len(arguments))(*(option.encode() for option in arguments))
        failed = library.nvrtcCompileProgram(program, len(arguments), encoded)
        log = _fetch(library, program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
        text = log.rstrip(b"\0").decode(errors="replace")
        if failed:
            return False, b"", text or _error_text(library, failed)
        cubin = _fetch(library, program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
        return True, cubin, text
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _fetch(
    library: ctypes.CDLL,
    program: ctypes.c_void_p,
    get_size: Callable[..., int],
    get: Callable[..., int],
) -> bytes:
    size = ctypes.c_size_t()
    _check(library, get_size(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(library, get(program, buffer))
    return buffer.raw


def _check(library: ctypes.CDLL, failed: int) -> None:
    if failed:
        raise CompileError(f"NVRTC failed: {_error_text(library, failed)}")


def _error_text(library: ctypes.CDLL, code: int) -> str:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    return f"{library.nvrtcGetErrorString(code).decode()} ({code})"


@functools.cache
def _open(compiler: Toolchain) -> ctypes.CDLL:
    try:
        if sys.platform == "win32":
            os.add_dll_directory(str(compiler.library.parent))
            mode = 0
        else:
            mode = ctypes.RTLD_GLOBAL
        for builtins in compiler.builtins:
            ctypes.CDLL(str(builtins), mode=mode)
        library = ctypes.CDLL(str(compiler.library))
        for name in _FUNCTIONS:
            getattr(library, name)
    except (OSError, AttributeError) as error:
        raise CompileError(
            f"{compiler} could not be opened from {compiler.library}: {error}; install it again"
        ) from error
    return library


def _figure(pattern: str, log: str) -> int:
    match = re.search(pattern, log)
    return int(match[1]) if match else 0


def _compile_error(
    spec: KernelSpec,
    source: str,
    headers: dict[str, str],
    arguments: tuple[str, ...],
    log: str,
    keep: Path | None,
) -> CompileError:
    lines = log.splitlines()
    first = next((line for line in lines if "error" in line), lines[0] if lines else "no log")
    message = f"NVRTC rejected the {spec.family} kernel: {first.strip()}\n  spec: {spec.to_key()}"
    directory = None
    try:
        directory = _keep_sources(keep, spec, source, headers)
        message += (
            f"\n  source: {directory}\n  reproduce: nvcc -cubin -arch={spec.arch} -std=c++17 "
            f"-ftz=true -I {directory} {directory / 'entry' / (spec.family + '.cu')}"
        )
    except OSError as error:
        message += f"\n  (the source could not be kept: {error})"
    return CompileError(message, spec=spec, options=arguments, log=log, source_dir=directory)


def _keep_sources(
    parent: Path | None, spec: KernelSpec, source: str, headers: dict[str, str]
) -> Path:
    """Write all sources of a compile into a new private directory, and return it."""
    if parent is not None:
        make_parents(parent)
    prefix = f"jitattn-{spec.family}-{spec.arch}-"
    directory = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    for name, text in ((f"entry/{spec.family}.cu", source), *headers.items()):
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return directory


class _Compiling:
    """Tracks the threads that compile, so that a fork can wait for them.

    A fork while NVRTC runs in another thread leaves the child with locks that no thread releases.
    The forking thread itself is not waited for: when a signal handler forks, NVRTC has already
    returned to the code that the handler interrupted.
    """

    def __init__(self) -> None:
        self.idle = threading.Condition()
        self.threads: set[int] = set()

    def __enter__(self) -> None:
        with self.idle:
            self.threads.add(threading.get_ident())

    def __exit__(self, *_: object) -> None:
        with self.idle:
            self.threads.discard(threading.get_ident())
            self.idle.notify_all()

    def before_fork(self) -> None:
        self.idle.acquire()
        while self.threads - {threading.get_ident()}:
            self.idle.wait()

    def after_fork_in_parent(self) -> None:
        self.idle.release()

    def after_fork_in_child(self) -> None:
        self.idle = threading.Condition()  # a thread of the parent may hold the old one
        self.threads &= {threading.get_ident()}


_running: Final = _Compiling()

if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_running.before_fork,
        after_in_parent=_running.after_fork_in_parent,
        after_in_child=_running.after_fork_in_child,
    )
