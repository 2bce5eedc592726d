"""Lists the architectures of this machine's GPUs by the driver alone, without torch or CuPy."""

from __future__ import annotations

import ctypes
import sys
from typing import Final

from jitattn.errors import UnsupportedError

#: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR.
_MAJOR: Final = 75
_MINOR: Final = 76
_WAY_OUT: Final = "name the architecture of the GPU that is meant, as in --arch 90"


def archs() -> list[str]:
    """Return the architectures of this machine's GPUs, each once: ["sm_90"].

    Raises
    ------
    UnsupportedError
        There is no driver, no GPU, or one that is older than sm_80.
    """
    found = _capabilities()
    if not found:
        raise UnsupportedError(f"native: no GPU is found here; {_WAY_OUT}")
    for major, minor in found:
        if major < 8:
            raise UnsupportedError(
                f"native: a GPU here is sm_{major}{minor}, and jitattn needs sm_80 or newer; "
                f"{_WAY_OUT}"
            )
    return list(dict.fromkeys(f"sm_{major}{minor}" for major, minor in found))


def _capabilities() -> list[tuple[int, int]]:
    """Return the compute capability of every GPU; empty without a driver that works."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int()
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return []
        return [_capability(driver, index) for index in range(count.value)]
    except (OSError, AttributeError):
        return []


def _capability(driver: ctypes.CDLL, index: int) -> tuple[int, int]:
    device, values = ctypes.c_int(), (ctypes.c_int(), ctypes.c_int())
    failed = driver.cuDeviceGet(ctypes.byref(device), index)
    for value, attribute in zip(values, (_MAJOR, _MINOR), strict=True):
        failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
    if failed:
        raise OSError(f"the driver does not describe GPU {index}")
    return values[0].value, values[1].value
