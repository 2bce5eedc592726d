"""Kernels without a GPU: their sources as C++, run on the processor, one CTA after another.

Raw PTX is in cuda_src/jitattn/ptx alone; tests/emulator has twins of these files, CUDA's words, and
threads that wait for each other. Everything else of a kernel, and all of the host's part of a call,
is what a GPU runs. It ends the process where a GPU would stop or go astray: at addresses that are
not aligned or lead out of shared memory, and where threads wait in vain. What this cannot see:
speed, races between CTAs, what tensor cores truncate.

`pytest tests/gpu --emulate sm_86` runs the GPU tests this way.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from jitattn import dispatch, workspace
from jitattn.jit import device, launch, sources
from jitattn.jit.codegen import HEADER_NAME, render
from jitattn.jit.params import STRUCTS
from jitattn.jit.spec import KernelSpec, entry_symbol

HERE = Path(__file__).parents[1] / "emulator"
LIBRARY_FLAGS = (
    "-std=c++20",
    "-O1",
    "-shared",
    "-fPIC",
    "-mf16c",
    "-mfma",
    "-w",
    "-fno-strict-aliasing",
)
#: Of a made-up GPU: few, so that long queries are balanced too.
_NUM_SMS = 4
_BLOCKS_PER_SM = 2
#: Kernels of sources that have changed since are deleted after a day.
_KEPT_SECONDS = 24 * 3600.0


def missing() -> str:
    """What this machine lacks; empty if nothing."""
    if shutil.which("g++") is None:
        return "needs g++"
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return "needs Linux"
    return "" if " f16c" in flags and " fma" in flags else "needs a processor with F16C and FMA"


class _Options(ctypes.Structure):
    _fields_ = (("late_copies", ctypes.c_int32), ("last_to_first", ctypes.c_int32))


@dataclass
class Emulator:
    """Which kernels were run."""

    launched: list[KernelSpec] = field(default_factory=list)

    def kernel(self, spec: KernelSpec, device_index: int) -> EmulatedKernel:
        """Stand in for `launch.kernel`."""
        return EmulatedKernel(spec, self)


@dataclass(frozen=True)
class EmulatedKernel:
    """Stands in for `launch.Kernel`."""

    spec: KernelSpec
    emulator: Emulator
    blocks_per_sm: int = _BLOCKS_PER_SM

    @property
    def built(self) -> SimpleNamespace:
        """What `explain` reports."""
        facts = {"registers": 0, "spill_bytes": 0, "smem_bytes": self.spec.smem_bytes}
        metadata = SimpleNamespace(**facts)
        return SimpleNamespace(spec=self.spec, key="", origin="emulated", metadata=metadata)

    def launch(self, grid: int, stream: int, *params: float) -> None:
        """Run the kernel to its end."""
        spec = self.spec
        self.emulator.launched.append(spec)
        given = STRUCTS[spec.params].pack(*params)
        # A kernel gives the same in any order; each kernel and grid is run in one of four.
        order = zlib.crc32(f"{spec.to_key()} {grid}".encode())
        options = _Options(order & 1, order >> 1 & 1)
        _library(spec)(given, grid, spec.num_threads, spec.smem_bytes, ctypes.byref(options))


@functools.cache
def _sources(family: str) -> Path:
    """Write the templates of a family as C++; return the folder, which its kernels are kept in too.

    It is of these very sources, and of the user, whose later runs and other processes find it.
    """
    found = sources.closure(family)
    checksum = hashlib.sha256(f"{found.digest} {LIBRARY_FLAGS}".encode())
    for path in sorted(path for path in HERE.rglob("*") if path.is_file()):
        checksum.update(path.read_bytes())
    parent = Path(tempfile.gettempdir()) / f"jitattn-emulator-{os.getuid()}"
    folder = parent / f"{family}-{checksum.hexdigest()[:16]}"
    parent.mkdir(mode=0o700, exist_ok=True)
    if parent.lstat().st_uid != os.getuid():  # what lies there is loaded as code
        raise RuntimeError(f"{parent} belongs to someone else")
    if folder.exists():
        return folder
    for old in parent.glob(f"{family}-*"):
        if time.time() - old.stat().st_mtime > _KEPT_SECONDS:
            shutil.rmtree(old, ignore_errors=True)
    new = Path(tempfile.mkdtemp(dir=parent))
    for name, text in ((f"entry/{family}.cu", found.entry), *found.headers.items()):
        if name.startswith("jitattn/ptx/"):
            continue
        path = new / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = text.replace("extern __shared__", "extern")
        path.write_text(re.sub(r"\b__shared__\b", "static", text))
    try:
        new.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(new)
    return folder


@functools.cache
def _library(spec: KernelSpec) -> Any:
    """Compile a kernel, which takes some seconds, or find it."""
    folder = _sources(spec.family)
    library = folder / f"{hashlib.sha256(spec.to_key().encode()).hexdigest()[:24]}.so"
    if not library.exists():
        _compile(spec, folder, library)
    function = ctypes.CDLL(str(library)).emulate
    function.argtypes = [
        ctypes.c_char_p, ctypes.c_uint, ctypes.c_int, ctypes.c_int, ctypes.c_void_p
    ]  # fmt: skip
    function.restype = None
    return function


def _compile(spec: KernelSpec, folder: Path, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as own:
        (Path(own) / HEADER_NAME).write_text(render(spec))
        command = ["g++", *LIBRARY_FLAGS, f"-I{own}", f"-I{HERE}", f"-I{folder}"]
        command += [f'-DENTRY="entry/{spec.family}.cu"', f"-DKERNEL={entry_symbol(spec)}"]
        command += [str(HERE / "main.cpp"), "-o", f"{own}/kernel.so"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{spec.to_key()}\n{done.stderr[:4000]}")
        Path(own, "kernel.so").replace(library)


def _zeros(count: int, device_index: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


class _OnProcessor(TorchFunctionMode):
    """What is asked to be on a GPU is on the processor."""

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
def emulated(arch: str) -> Iterator[Emulator]:
    """Let calls believe in a GPU of an architecture, whose kernels are emulated."""
    emulator = Emulator()
    number = int(arch.removeprefix("sm_"))
    properties = SimpleNamespace(
        name="emulated", major=number // 10, minor=number % 10, multi_processor_count=_NUM_SMS
    )
    with pytest.MonkeyPatch.context() as patch:
        for target, attribute, value in (
            (torch.Tensor, "is_cuda", property(lambda _: True)),
            (torch.Tensor, "get_device", lambda _: 0),
            (torch.cuda, "is_available", lambda: True),
            (torch.cuda, "device_count", lambda: 1),
            (torch.cuda, "current_device", lambda: 0),
            (torch.cuda, "synchronize", lambda *_: None),
            (torch.cuda, "get_device_capability", lambda *_: divmod(number, 10)),
            (torch.cuda, "get_device_properties", lambda _: properties),
            (torch.cuda, "device", lambda _: contextlib.nullcontext()),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.cuda, "_is_in_bad_fork", lambda: False),
            (torch._C, "_cuda_getCurrentRawStream", lambda _: 0),
            (torch._C, "_cuda_getDevice", lambda: 0),
            (launch, "kernel", emulator.kernel),
            (launch, "is_loaded", lambda *_: True),
            (launch, "zero", lambda address, size, _: ctypes.memset(address, 0, size)),
            (workspace, "_zeros", _zeros),
            (workspace, "_of_stream", {}),
            (workspace, "_for_captures", {}),
            (dispatch, "_fwd_kernels", {}),
        ):
            patch.setattr(target, attribute, value, raising=False)
        device.device.cache_clear()
        try:
            with _OnProcessor():
                yield emulator
        finally:
            device.device.cache_clear()
