"""Loads cubins and launches kernels through CuPy. CuPy's partial types stay in this file.

The launch takes raw pointers packed into one parameter struct and a raw stream number: no arrays
cross into CuPy. The struct lives in a buffer of the calling thread; the driver copies it during the
launch, so the buffer is free again when the call returns.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
import tempfile
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from jitattn.cache import files, settings
from jitattn.errors import InternalError, LaunchError
from jitattn.jit import tensor_maps
from jitattn.jit.build import build, rebuild
from jitattn.jit.tensor_maps import MAP_BYTES, encode
from jitattn.spec import install
from jitattn.spec.arguments import MAX_BYTES
from jitattn.spec.kernel_spec import entry_symbol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from jitattn.jit.build import Built
    from jitattn.jit.tensor_maps import BoxedTensor
    from jitattn.spec.arguments import ArgumentTable, Layout
    from jitattn.spec.kernel_spec import KernelSpec

#: CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MAX_DYNAMIC_SHARED_SIZE_BYTES: Final = 8
#: CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: shared arrays of fixed size.
_SHARED_SIZE_BYTES: Final = 1
#: More shared memory than this requires a function attribute.
_DEFAULT_SMEM_BYTES: Final = 48 * 1024
#: Most tensor maps that a kernel takes.
MOST_MAPS: Final = 4
#: Largest grid in x.
MAX_GRID: Final = 2**31 - 1


class _Thread:
    """Per-thread launch state: a parameter buffer, and the devices with a current context."""

    __slots__ = ("_pointers", "buffer", "devices", "params")

    def __init__(self) -> None:
        self.buffer = ctypes.create_string_buffer(MAX_BYTES + MOST_MAPS * MAP_BYTES)
        begin = ctypes.addressof(self.buffer)
        # The parameter struct, or the tensor maps and the struct after them.
        self._pointers = (
            (ctypes.c_void_p * 1)(begin),
            *(
                (ctypes.c_void_p * 2)(begin, begin + count * MAP_BYTES)
                for count in range(1, MOST_MAPS + 1)
            ),
        )
        #: As cuLaunchKernel takes them, by the number of maps.
        self.params = tuple(map(ctypes.addressof, self._pointers))
        self.devices: set[int] = set()


_local = threading.local()


def _make_context() -> None:
    """Make the current device's context current in a thread without CUDA calls so far.

    Nothing is called where a context is current: a graph may be capturing, which `cudaFree` ends.
    """
    cuda = import_cupy().cuda
    if cuda.driver.ctxGetCurrent() == 0:
        cuda.runtime.free(0)


def _thread_on(device_index: int) -> _Thread:
    """Return the launch state of this thread, creating the device's context if necessary."""
    try:
        thread: _Thread = _local.thread
    except AttributeError:
        thread = _local.thread = _Thread()
    if device_index not in thread.devices:
        _make_context()
        thread.devices.add(device_index)
    return thread


@dataclass(frozen=True, slots=True, eq=False)
class Kernel:
    """A kernel loaded on one device."""

    spec: KernelSpec
    built: Built
    device_index: int
    blocks_per_sm: int  #: resident CTAs per multiprocessor
    _module: Any  # dropping it would unload the function
    _function: Any
    _launch: Any  # CuPy's cuLaunchKernel
    _block: int  # threads per CTA
    _smem_bytes: int
    _arguments: ArgumentTable

    def bind(
        self,
        grid: int,
        numbers: Mapping[str, float],
        dynamic: Sequence[str],
        maps: Sequence[tuple[str, BoxedTensor]] = (),
    ) -> BoundLaunch:
        """Bind the grid and all arguments but those named `dynamic`.

        `maps`: the tensor maps of a kernel that takes some, each with the dynamic argument that is
        its address.

        Raises
        ------
        LaunchError
            An argument is missing, unknown or given twice.
        """
        layout = self._arguments.layout(numbers, dynamic)
        if len(maps) != len(self.spec.tensor_maps):
            raise InternalError(f"{self.spec.family} takes the maps {self.spec.tensor_maps}")
        if maps:
            _thread_on(self.device_index)  # encoding needs a current context
            encoded = [(dynamic.index(name), encode(boxed)) for name, boxed in maps]
            layout = layout.after(encoded)
        return BoundLaunch(self, grid, layout)


class BoundLaunch:
    """A kernel with its grid and constant arguments packed; `launch` fills in the others."""

    __slots__ = (
        "_block",
        "_device_index",
        "_function",
        "_launch",
        "_num_maps",
        "_pack_into",
        "_smem",
        "grid",
        "kernel",
        "parts",
    )  # fmt: skip

    def __init__(self, kernel: Kernel, grid: int, layout: Layout) -> None:
        self.kernel, self.grid, self.parts = kernel, grid, layout.parts
        self._pack_into, self._device_index = layout.pack_into, kernel.device_index
        self._function, self._launch = kernel._function.ptr, kernel._launch
        self._block, self._smem = kernel._block, kernel._smem_bytes
        self._num_maps = len(kernel.spec.tensor_maps)

    def launch(self, stream: int, values: Iterable[int | bytes]) -> None:
        """Launch the kernel in a raw CUDA stream.

        Parameters
        ----------
        stream : int
        values : iterable of int and bytes
            One for each of `parts`: itself, where that is bytes, or the argument that it stands
            for.
        """
        thread: _Thread | None = getattr(_local, "thread", None)
        if thread is None or self._device_index not in thread.devices:
            thread = _thread_on(self._device_index)
        self._pack_into(thread.buffer, 0, *values)
        self._launch(
            self._function, self.grid, 1, 1, self._block, 1, 1, self._smem, stream,
            thread.params[self._num_maps], 0,
        )  # fmt: skip


_kernels: dict[tuple[KernelSpec, int], Kernel] = {}
_lock = threading.Lock()


def kernel(spec: KernelSpec, device_index: int) -> Kernel:
    """Load the kernel of `spec` on a device, from the cache or by compiling it.

    Raises
    ------
    CompileError
        NVRTC is missing or refused the source.
    LaunchError
        The driver refused the cubin, even after a fresh compile.
    """
    loaded = _kernels.get((spec, device_index))
    if loaded is None:
        built = build(spec)
        try:
            loaded = _load(built, device_index)
        except LaunchError:
            if built.origin == "compiled" or settings.no_compile():
                raise
            loaded = _load(rebuild(spec), device_index)  # the driver refused a cached cubin
        with _lock:
            loaded = _kernels.setdefault((spec, device_index), loaded)
    return loaded


def is_loaded(spec: KernelSpec, device_index: int) -> bool:
    """Return whether the kernel is loaded on the device."""
    return (spec, device_index) in _kernels


def unload_all() -> None:
    """Drop all loaded kernels; the next call loads its kernel again."""
    _kernels.clear()


def encodes_maps() -> bool:
    """Return whether the driver encodes tensor maps, which kernels with TMA take."""
    _make_context()
    return tensor_maps.is_available()


def zero(address: int, num_bytes: int, stream: int) -> None:
    """Set device memory to zero in a raw CUDA stream, by memset and without a kernel."""
    _memset()(address, 0, num_bytes, stream)


@functools.cache
def _memset() -> Any:  # noqa: ANN401 - of CuPy
    return import_cupy().cuda.runtime.memsetAsync


def _load(built: Built, device_index: int) -> Kernel:
    cupy = import_cupy()
    spec = built.spec
    driver = cupy.cuda.driver
    try:
        with cupy.cuda.Device(device_index):
            cupy.cuda.runtime.free(0)
            module = cupy.cuda.function.Module()
            module.load(built.cubin)
            function = module.get_function(entry_symbol(spec))
            fixed = driver.funcGetAttribute(_SHARED_SIZE_BYTES, function.ptr)
            if fixed + spec.smem_bytes > _DEFAULT_SMEM_BYTES:
                driver.funcSetAttribute(
                    function.ptr, _MAX_DYNAMIC_SHARED_SIZE_BYTES, spec.smem_bytes
                )
            blocks_per_sm = driver.occupancyMaxActiveBlocksPerMultiprocessor(
                function.ptr, spec.num_threads, spec.smem_bytes
            )
    except (driver.CUDADriverError, cupy.cuda.runtime.CUDARuntimeError) as error:
        raise LaunchError(
            f"the driver refused kernel {built.key[:16]} for {spec.arch} ({error}), built by "
            f"{built.metadata.toolchain}; update the driver, or install the extra cu12 instead of "
            "cu13 if it knows CUDA 12 only"
        ) from error
    return Kernel(
        spec=spec,
        built=built,
        device_index=device_index,
        blocks_per_sm=max(1, blocks_per_sm),
        _module=module,
        _function=function,
        _launch=driver.launchKernel,
        _block=spec.num_threads,
        _smem_bytes=spec.smem_bytes,
        _arguments=spec.arguments,
    )


@functools.cache
def import_cupy() -> Any:  # noqa: ANN401 - CuPy's modules have partial types
    """Import CuPy, also where its own cache directory cannot be created.

    Raises
    ------
    LaunchError
        CuPy is not installed.
    """
    is_new = "cupy" not in sys.modules and "CUPY_CACHE_DIR" not in os.environ
    if is_new and not can_make(Path("~/.cupy/kernel_cache")):
        os.environ["CUPY_CACHE_DIR"] = tempfile.mkdtemp(prefix="jitattn-cupy-")
    try:
        import cupy
        import cupy.cuda.function
    except ImportError as error:
        raise LaunchError(
            f"CuPy could not be imported ({error}): it launches the kernels; {install.cuda()}"
        ) from error
    return cupy


def can_make(directory: Path) -> bool:
    """Return whether a directory is writable or can be created, outside other users' homes."""
    try:
        path = directory.expanduser()
        if not files.is_among_ours(path):
            return False
        files.make_parents(path)
    except (OSError, RuntimeError):  # RuntimeError: no home directory is known
        return False
    return os.access(path, os.W_OK)


def _after_fork_in_child() -> None:
    # A child cannot use its parent's CUDA context; `run.forward` says so.
    _kernels.clear()
    _local.__dict__.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
