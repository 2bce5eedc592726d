"""Words of the commands: kernels, sizes, durations and counts as people read them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Final

#: Values of spec fields that a usual call has, and that are not worth a word.
_USUAL: Final = frozenset({"off", "none", "batched", "vec16", "f32_acc", "tf32x3", ""})
_NAMED: Final = ("family", "arch", "dtype", "out_dtype", "head_dim", "head_dim_v", "mask")
#: Fields that a tile of rows and keys stands for: no two kernels with one differ in these alone.
_OF_TILE: Final = (
    "block_q", "block_kv", "stages", "q_stages", "min_blocks_per_sm", "num_warps", "warps_q",
    "warps_kv", "warps_scores", "warps_keys", "warps_dq",
)  # fmt: skip
_UNITS: Final = ("KiB", "MiB", "GiB", "TiB")


def describe(spec: Mapping[str, str | int]) -> str:
    """Describe a kernel in a few words; kernels that differ have descriptions that differ.

    Family, architecture, dtypes, head dims, mask and tile come first, then what is unusual.
    """
    words = [str(spec[name]) for name in ("family", "arch") if name in spec]
    words += [dtypes(spec), dims(spec), str(spec.get("mask", "")), tile(spec), features(spec)]
    return " ".join(filter(None, words))


def dtypes(spec: Mapping[str, str | int]) -> str:
    """Return the dtype of a kernel, and that of its result where it is another: bf16>fp32."""
    dtype, out = str(spec.get("dtype", "")), str(spec.get("out_dtype", ""))
    if not dtype:
        return out
    return dtype if out in ("", dtype) else f"{dtype}>{out}"


def dims(spec: Mapping[str, str | int]) -> str:
    """Return the head dim of a kernel, and that of v where it is another: 192:128."""
    dim, dim_v = str(spec.get("head_dim", "")), str(spec.get("head_dim_v", ""))
    if not dim:
        return dim_v
    return dim if dim_v in ("", dim) else f"{dim}:{dim_v}"


def tile(spec: Mapping[str, str | int]) -> str:
    """Return query rows, keys and stages of a kernel's tile: 128x64x2; empty without a tile."""
    if not _has_tile(spec):
        return ""
    sizes = (spec.get(name) for name in ("block_q", "block_kv", "stages"))
    return "x".join(str(size) for size in sizes if size is not None)


def features(spec: Mapping[str, str | int]) -> str:
    """Return what a kernel has beside dtypes, head dims, mask and tile: sinks kv_layout=paged."""
    words = []
    for name, value in spec.items():
        if name in _NAMED or value in _USUAL or (name in _OF_TILE and _has_tile(spec)):
            continue
        if name == "function":  # its text is long
            value = hashlib.sha256(str(value).encode()).hexdigest()[:8]
        words.append(name if value == "on" else f"{name}={value}")
    return " ".join(words)


def _has_tile(spec: Mapping[str, str | int]) -> bool:
    return "block_q" in spec and "block_kv" in spec


def size(count: int) -> str:
    """Return a number of bytes with a unit: 512 bytes, 72.7 KiB, 1.5 MiB."""
    if count < 1024:
        return counted(count, "byte")
    number, unit = count / 1024, 0
    while number >= 1023.95 and unit + 1 < len(_UNITS):
        number, unit = number / 1024, unit + 1
    return f"{number:.1f} {_UNITS[unit]}"


def counted(count: int, noun: str) -> str:
    """Return a count with its noun: 1 kernel, 2 kernels."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in its two largest units: 8 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
