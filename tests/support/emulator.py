"""Emulates kernels without a GPU: compiles their sources as C++, and runs CTAs one by one.

Raw PTX is in cuda_src/jitattn/ptx alone; tests/emulator has twins of these files, CUDA's words, and
threads that wait for each other. Everything else of a kernel, and all of the host's part of a call,
is what a GPU runs. It ends the process where a GPU would stop or go astray: at addresses that are
not aligned or lead out of shared memory, and where threads wait in vain. What this cannot see:
speed, races between CTAs, what tensor cores truncate.

`pytest tests/gpu --emulate sm_86` runs the GPU tests this way. With `--watch` as well, every access
of a kernel is looked at (tests/emulator/watch.cpp): one to memory of no tensor, or to shared memory
that another thread has written or read and no barrier is between the two, is an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from filelock import FileLock
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode

from jitattn.jit import backend, sources
from jitattn.jit.backend import Backend
from jitattn.jit.codegen import HEADER_NAME, render
from jitattn.jit.tensor_maps import ADDRESS_BYTES, MAP_BYTES, BoxedTensor
from jitattn.spec.arguments import Layout
from jitattn.spec.kernel_spec import KernelSpec, entry_symbol

HERE = Path(__file__).parents[1] / "emulator"
LIBRARY_FLAGS = (
    "-std=c++20",
    "-O1",
    "-fPIC",
    "-mf16c",
    "-mfma",
    "-w",
    "-fno-strict-aliasing",
    "-fno-gnu-unique",  # kernels share nothing, though names in them are the same
)
#: Compiler options that make each memory access call watch.cpp, with line numbers for reports.
WATCH_FLAGS = ("-fsanitize=thread", "-DWATCHED", "-g1", "-gdwarf-4")
#: `__shared__ float s_sums[32];`
_SHARED_ARRAY = re.compile(r"\b__shared__\s+([^;]*?\b(\w+)(?:\[[^;]*\])*);")
_AS_STATIC = r"static \1; const emulator::SharedArray \2_is_shared(&\2, sizeof(\2));"
#: Multiprocessors of the emulated GPU: few, so that long queries are balanced too.
_NUM_SMS = 4
_BLOCKS_PER_SM = 2
#: Of a tensor map.
_MOST_DIMENSIONS = 5
#: Kernels of sources that have changed since are deleted after a day.
_KEPT_SECONDS = 24 * 3600.0


def missing() -> str:
    """Return the reason why this machine cannot emulate; empty if it can."""
    if shutil.which("g++") is None:
        return "needs g++"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "needs Linux"
    return "" if " f16c" in flags and " fma" in flags else "needs a processor with F16C and FMA"


class Memory:
    """Memory of the tensors whose addresses were asked for."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, StorageWeakRef]] = {}

    def add(self, tensor: torch.Tensor) -> None:
        """Note all memory that a tensor is a view of."""
        storage = tensor.untyped_storage()
        self._found[storage.data_ptr()] = (storage.nbytes(), StorageWeakRef(storage))

    def noting(self, data_ptr: Callable[[torch.Tensor], int]) -> Callable[[torch.Tensor], int]:
        """Return `data_ptr` as it is, but that it adds its tensor first."""

        def noted(tensor: torch.Tensor) -> int:
            self.add(tensor)
            return data_ptr(tensor)

        return noted

    def pairs(self) -> list[int]:
        """Return begins and ends of what is there still, in order."""
        self._found = {
            begin: (size, kept) for begin, (size, kept) in self._found.items() if not kept.expired()
        }
        return [
            address
            for begin, (size, _) in sorted(self._found.items())
            for address in (begin, begin + size)
        ]


class _Options(ctypes.Structure):
    _fields_ = (("late_copies", ctypes.c_int32), ("last_to_first", ctypes.c_int32))


@dataclass
class Emulator:
    """Records the kernels that were run, and the memory that watched kernels may access."""

    launched: list[KernelSpec] = field(default_factory=list)
    memory: Memory | None = None

    def kernel(self, spec: KernelSpec, device_index: int) -> EmulatedKernel:
        """Stand in for `Backend.load`."""
        return EmulatedKernel(spec, self)


@dataclass(frozen=True)
class EmulatedKernel:
    """Stands in for `launch.Kernel`."""

    spec: KernelSpec
    emulator: Emulator
    blocks_per_sm: int = _BLOCKS_PER_SM

    @property
    def built(self) -> SimpleNamespace:
        """Facts that `explain` reports."""
        facts = {"registers": 0, "spill_bytes": 0, "smem_bytes": self.spec.smem_bytes}
        metadata = SimpleNamespace(**facts)
        return SimpleNamespace(spec=self.spec, key="", origin="emulated", metadata=metadata)

    def bind(
        self,
        grid: int,
        numbers: Mapping[str, float],
        dynamic: Sequence[str],
        maps: Sequence[object] = (),
    ) -> EmulatedLaunch:
        """Stand in for the method of `launch.Kernel`."""
        layout = self.spec.arguments.layout(numbers, dynamic)
        encoded = [(dynamic.index(name), _encoded(boxed)) for name, boxed in maps]
        return EmulatedLaunch(self, grid, layout.after(encoded) if maps else layout)

    def run(self, grid: int, given: bytes) -> None:
        """Run the kernel to its end, with its parameter struct."""
        spec = self.spec
        self.emulator.launched.append(spec)
        # A kernel gives the same in any order; each kernel and grid is run in one of four.
        order = zlib.crc32(f"{spec.to_key()} {grid}".encode())
        options = _Options(order & 1, order >> 1 & 1)
        memory = self.emulator.memory
        library = _library(spec, memory is not None)
        if memory is not None:
            pairs = memory.pairs()
            library.emulate_with((ctypes.c_size_t * len(pairs))(*pairs), len(pairs) // 2)
        library.emulate(given, grid, spec.num_threads, spec.smem_bytes, ctypes.byref(options))
        found = b"" if memory is None else library.emulate_found()
        if found:
            raise AssertionError(f"{spec.to_key()}\n{found.decode()}")


@dataclass(frozen=True)
class EmulatedLaunch:
    """Stands in for `launch.BoundLaunch`."""

    kernel: EmulatedKernel
    grid: int
    layout: Layout

    @property
    def parts(self) -> tuple[int | bytes, ...]:
        """As `launch.BoundLaunch` has them."""
        return self.layout.parts

    def launch(self, stream: int, values: Iterable[int | bytes]) -> None:
        """Run the kernel to its end."""
        given = bytearray(self.layout.size)
        self.layout.pack_into(given, 0, *values)
        self.kernel.run(self.grid, bytes(given))


def _encoded(boxed: BoxedTensor) -> bytes:
    """Return a tensor map as the emulated TMA reads it, without the address, which is first."""
    ones = [1] * (_MOST_DIMENSIONS - len(boxed.shape))
    steps = [*boxed.strides, *(0 for _ in ones)]
    packed = struct.pack("=5Q4Q5H", *boxed.shape, *ones, *steps, *boxed.box, *ones)
    return packed.ljust(MAP_BYTES - ADDRESS_BYTES, b"\0")


def _made_once(name: str, checksum: str, make: Callable[[Path], None]) -> Path:
    """Return a folder of the user's that the first process to ask for it makes.

    Folders of that name which nobody has asked for since a day are deleted.
    """
    parent = Path(tempfile.gettempdir()) / f"jitattn-emulator-{os.getuid()}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.lstat().st_uid != os.getuid():  # what lies there is loaded as code
        raise RuntimeError(f"{parent} belongs to someone else")
    folder = parent / f"{name}-{checksum[:16]}"
    with FileLock(parent / "lock"):
        if folder.exists():
            os.utime(folder)
            return folder
        for old in parent.glob(f"{name}-*"):
            if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
                shutil.rmtree(old, ignore_errors=True)
        new = Path(tempfile.mkdtemp(dir=parent))
        try:
            make(new)
            new.rename(folder)
        finally:
            shutil.rmtree(new, ignore_errors=True)
    return folder


@functools.cache
def _emulator_checksum() -> str:
    """Return the checksum of the emulator's own files and of how they are compiled."""
    compiler = subprocess.run(["g++", "--version"], capture_output=True, check=True).stdout
    checksum = hashlib.sha256(f"{compiler!r} {LIBRARY_FLAGS} {WATCH_FLAGS}".encode())
    for path in sorted(path for path in HERE.rglob("*") if path.is_file()):
        checksum.update(path.read_bytes())
    return checksum.hexdigest()


@functools.cache
def prelude(watched: bool) -> Path:
    """Compile what all kernels share: cuda.h as a precompiled header, and objects to link with."""

    def make(folder: Path) -> None:
        watch = WATCH_FLAGS if watched else ()
        header = (*LIBRARY_FLAGS, *watch, "-x", "c++-header", str(HERE / "cuda.h"))
        _run("g++", *header, "-o", str(folder / "cuda.h.gch"))
        # The accesses of these themselves are not watched.
        own = (*LIBRARY_FLAGS, f"-I{HERE}", *(("-DWATCHED",) if watched else ()))
        for name in _objects(watched):
            source = str((HERE / name).with_suffix(".cpp"))
            _run("g++", *own, "-c", source, "-o", str(folder / name))

    return _made_once("watched" if watched else "plain", _emulator_checksum(), make)


def _objects(watched: bool) -> list[str]:
    return ["threads.o", "watch.o"] if watched else ["threads.o"]


@functools.cache
def _sources(family: str) -> Path:
    """Write the templates of a family as C++; return the folder, which its kernels are kept in too.

    It is of these very sources, and of the user, whose later runs and other processes find it.
    """
    found = sources.closure(family)

    def make(folder: Path) -> None:
        for name, text in ((f"entry/{family}.cu", found.entry), *found.headers.items()):
            if name.startswith("jitattn/ptx/"):
                continue
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            text = text.replace("extern __shared__", "extern")
            path.write_text(_SHARED_ARRAY.sub(_AS_STATIC, text))

    checksum = hashlib.sha256(f"{found.digest} {_emulator_checksum()}".encode())
    return _made_once(family, checksum.hexdigest(), make)


@functools.cache
def _library(spec: KernelSpec, watched: bool) -> Any:
    """Compile a kernel, which takes about a second, or find it."""
    folder = _sources(spec.family)
    header = render(spec)
    name = hashlib.sha256(header.encode()).hexdigest()[:24]
    library = folder / f"{name}{'-watched' if watched else ''}.so"
    with FileLock(library.with_suffix(".lock")):  # of the processes of a run, one compiles it
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=folder) as own:
                (Path(own) / HEADER_NAME).write_text(header)
                build(
                    f"entry/{spec.family}.cu",
                    entry_symbol(spec),
                    (Path(own), folder),
                    Path(own, "kernel.so"),
                    watched=watched,
                )
                Path(own, "kernel.so").replace(library)
    found = ctypes.CDLL(str(library))
    found.emulate.argtypes = [
        ctypes.c_char_p, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    found.emulate.restype = None
    if watched:
        found.emulate_with.restype = None
        found.emulate_found.restype = ctypes.c_char_p
    return found


def build(
    entry: str, kernel: str, headers: tuple[Path, ...], library: Path, *, watched: bool
) -> None:
    """Compile a kernel as C++; its header paths come behind the emulator's own."""
    shared = prelude(watched)
    flags = [*LIBRARY_FLAGS, *(f"-I{folder}" for folder in (shared, HERE, *headers))]
    defined = [f'-DENTRY="{entry}"', f"-DKERNEL={kernel}"]
    main = str(HERE / "main.cpp")
    objects = [str(shared / name) for name in _objects(watched)]
    if not watched:
        _run("g++", *flags, *defined, "-shared", main, *objects, "-o", str(library))
        return
    # The calls that the compiler makes go to watch.cpp and not to its own library.
    part = str(library.with_suffix(".o"))
    _run("g++", *flags, *WATCH_FLAGS, *defined, "-c", main, "-o", part)
    _run("g++", "-shared", part, *objects, "-o", str(library))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise AssertionError(f"{' '.join(command)}\n{done.stderr[:4000]}")


class _OnProcessor(TorchFunctionMode):
    """Torch function mode that makes GPU tensors on the CPU."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.Tensor.cuda:
            return args[0]
        given = {name: _moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(_moved, args), **given)


def _moved(value: Any) -> Any:
    if isinstance(value, str) and value.partition(":")[0] == "cuda":
        return "cpu"
    is_gpu = isinstance(value, torch.device) and value.type == "cuda"
    return torch.device("cpu") if is_gpu else value


@contextlib.contextmanager
def emulated(arch: str, *, watched: bool = False) -> Iterator[Emulator]:
    """Let calls believe in a GPU of an architecture, whose kernels are emulated."""
    memory = Memory() if watched else None
    emulator = Emulator(memory=memory)
    number = int(arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        name="emulated", major=number // 10, minor=number % 10, multi_processor_count=_NUM_SMS
    )
    own = Backend(
        stream=lambda _: 0,
        current_device=lambda: 0,
        is_capturing=lambda: False,
        is_in_bad_fork=lambda: False,
        on_device=lambda _: contextlib.nullcontext(),
        reserve=lambda size, _: torch.empty(size, dtype=torch.uint8),
        properties=lambda _: properties,
        load=emulator.kernel,
        is_loaded=lambda *_: True,
        encodes_maps=lambda: True,
        zero=lambda address, size, _: ctypes.memset(address, 0, size),
    )
    with pytest.MonkeyPatch.context() as patch:
        # Every call asks its tensors themselves: a backend between would make it slower.
        patch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        patch.setattr(torch.Tensor, "get_device", lambda _: 0)
        if memory is not None:
            patch.setattr(torch.Tensor, "data_ptr", memory.noting(torch.Tensor.data_ptr))
        # Asked by `values`, below the backend, by compat and by `warmup`.
        patch.setattr(torch.cuda, "is_current_stream_capturing", own.is_capturing)
        patch.setattr(torch.cuda, "current_device", own.current_device)
        patch.setattr(torch.cuda, "is_available", lambda: True)
        before = backend.install(own)
        try:
            with _OnProcessor():
                yield emulator
        finally:
            backend.install(before)
