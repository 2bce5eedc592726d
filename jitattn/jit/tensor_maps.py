"""Encodes tensor maps, the 128 bytes that tell TMA where the boxes of a tensor lie.

The driver encodes a map on the host, without touching the GPU. Its first word is the tensor's
address, so a map is encoded once for all addresses: `is_available` compares two encodings, and the
plans take no kernel with TMA if the driver's maps were laid out otherwise. CUDA driver API:
"cuTensorMapEncodeTiled".
"""

from __future__ import annotations

import ctypes
import functools
import sys
from typing import Any, Final, NamedTuple

from jitattn.errors import InternalError

#: Bytes of a map, and of its address.
MAP_BYTES: Final = 128
ADDRESS_BYTES: Final = 8
#: Most bytes between two rows.
MOST_STRIDE: Final = 2**40 - 16
#: Largest extent of a dimension.
MOST_EXTENT: Final = 2**32

_ALIGNMENT: Final = 64
_DTYPES: Final = {"fp16": 6, "bf16": 9}  # CU_TENSOR_MAP_DATA_TYPE_...
_INTERLEAVE_NONE, _SWIZZLE_128B, _PROMOTE_L2_128B, _FILL_ZEROS = 0, 3, 2, 0


class BoxedTensor(NamedTuple):
    """A tensor of 16-bit elements and the box of it that one copy moves, innermost dimension first.

    Attributes
    ----------
    dtype : str
        "fp16" or "bf16".
    shape : tuple of int
        At most 2^32 each.
    strides : tuple of int
        In bytes, of all dimensions but the innermost; multiples of 16 below 2^40.
    box : tuple of int
        At most 256 each; the innermost at most 128 bytes.
    """

    dtype: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def encode(boxed: BoxedTensor) -> bytes:
    """Return a map without its address, which comes first.

    Raises
    ------
    InternalError
        The driver refuses the map.
    """
    return _encode(boxed, 1 << 20)[ADDRESS_BYTES:]


@functools.cache
def is_available() -> bool:
    """Return whether the driver encodes maps, with the address in the first word alone."""
    sample = BoxedTensor("fp16", (64, 8), (128,), (64, 8))
    try:
        maps = [(address, _encode(sample, address)) for address in (1 << 20, (3 << 40) + 4096 + 16)]
    except (OSError, AttributeError, InternalError):  # no driver, or one older than CUDA 12
        return False
    return len({one[ADDRESS_BYTES:] for _, one in maps}) == 1 and all(
        int.from_bytes(one[:ADDRESS_BYTES], "little") == address for address, one in maps
    )


def _encode(boxed: BoxedTensor, address: int) -> bytes:
    memory = ctypes.create_string_buffer(MAP_BYTES + _ALIGNMENT)
    place = -(-ctypes.addressof(memory) // _ALIGNMENT) * _ALIGNMENT
    rank = len(boxed.shape)
    result = _driver().cuTensorMapEncodeTiled(
        ctypes.c_void_p(place),
        _DTYPES[boxed.dtype],
        rank,
        ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*boxed.shape),
        (ctypes.c_uint64 * rank)(*boxed.strides),
        (ctypes.c_uint32 * rank)(*boxed.box),
        (ctypes.c_uint32 * rank)(*([1] * rank)),
        _INTERLEAVE_NONE,
        _SWIZZLE_128B,
        _PROMOTE_L2_128B,
        _FILL_ZEROS,
    )
    if result != 0:
        raise InternalError(f"cuTensorMapEncodeTiled returned {result} for {boxed}")
    return ctypes.string_at(place, MAP_BYTES)


@functools.cache
def _driver() -> Any:  # noqa: ANN401 - ctypes
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
