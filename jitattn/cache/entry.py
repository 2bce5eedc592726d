"""Cache entries: a cubin, its metadata, and the key of both.

A key has two parts. The first 40 digits identify the kernel: templates, spec, options. The other 24
identify the compiler. The user's own cache looks up the whole key; read-only directories are
searched by the first part, so that a cubin of NVRTC 12 is found where NVRTC 13 is installed. All
inputs of the key are in the metadata, so that it can be computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from jitattn.spec.kernel_spec import ARCH, arch_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

#: Version of the key recipe and of the layout.
SCHEMA: Final = 1
MAX_CUBIN_BYTES: Final = 64 * 1024 * 1024
MAX_JSON_BYTES: Final = 1024 * 1024
#: Characters kept of a compiler log; as JSON they take at most 12 bytes each.
MAX_LOG: Final = 64 * 1024
#: Digits of a key that identify the kernel, without the compiler.
KERNEL_DIGITS: Final = 40
KEY: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Facts about a cubin, for people and reports; no launch depends on them."""

    key: str
    spec: dict[str, str | int]
    arch: str
    toolchain: str
    options: tuple[str, ...]
    source_digest: str  #: of the templates
    header_digest: str  #: of the generated header
    registers: int
    stack_bytes: int
    spill_bytes: int
    smem_bytes: int  #: dynamic shared memory of a CTA
    compile_ms: float  #: 0 where unknown (in archives)
    log: str  #: of the compiler
    bytes: int  #: of the cubin
    sha256: str  #: of the cubin

    def key_again(self) -> str:
        """Compute the key from the other fields."""
        return cache_key(
            self.spec, self.source_digest, self.header_digest, self.options, self.toolchain
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """Cubin and metadata that passed all checks."""

    cubin: bytes
    metadata: Metadata


def cache_key(
    spec: Mapping[str, str | int],
    source_digest: str,
    header_digest: str,
    options: tuple[str, ...],
    toolchain: str,
) -> str:
    """Compute the key of a kernel from everything that its bytes depend on.

    Parameters
    ----------
    spec : mapping
        The flat form of the spec (`to_dict`), its family and architecture included.
    toolchain : str
        The compiler; empty if none is installed. The first 40 digits do not depend on it.
    """
    kernel = _digest(
        str(SCHEMA),
        source_digest,
        json.dumps(spec, sort_keys=True, separators=(",", ":")),
        header_digest,
        *options,
    )
    return kernel[:KERNEL_DIGITS] + _digest(kernel, toolchain)[KERNEL_DIGITS:]


def _digest(*texts: str) -> str:
    """Return the SHA-256 of texts, each preceded by its length."""
    parts: list[bytes] = []
    for text in texts:
        encoded = text.encode()
        parts += (len(encoded).to_bytes(8, "little"), encoded)
    return sha256(b"".join(parts))


def sha256(content: bytes) -> str:
    """Return the SHA-256 of bytes."""
    return hashlib.sha256(content, usedforsecurity=False).hexdigest()


def is_cubin_for(cubin: bytes, arch: str) -> bool:
    """Return whether bytes are an ELF file of machine code for `arch`."""
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or cubin[4] != 2:
        return False
    (machine,) = struct.unpack_from("<H", cubin, 18)
    (flags,) = struct.unpack_from("<I", cubin, 48)
    number = flags & 0xFF if cubin[7] == 51 else (flags >> 8) & 0xFF  # ABI 7; from CUDA 13 on, 8
    return bool(machine == 190 and number == arch_number(arch))


def fault(cubin: bytes, metadata: Metadata, arch: str) -> str | None:
    """Describe what is wrong with a cubin and its metadata; None if nothing is."""
    for named in (metadata.arch, metadata.spec.get("arch")):
        if named != arch:
            return f"it is for {named}, not for {arch}"
    if metadata.bytes != len(cubin):
        return f"the cubin has {len(cubin)} bytes, not {metadata.bytes}"
    if metadata.sha256 != sha256(cubin):
        return "the checksum of the cubin is wrong"
    if not is_cubin_for(cubin, arch):
        return f"the cubin is no machine code for {arch}"
    return None


def to_json(metadata: Metadata) -> bytes:
    """Render metadata as canonical JSON."""
    facts = {name: getattr(metadata, name) for name in _CHECKS}  # asdict would copy each deeply
    return json.dumps(facts, indent=1, sort_keys=True).encode()


def _matches(pattern: str) -> Callable[[object], bool]:
    """Return a check for text that matches a pattern as a whole."""
    compiled = re.compile(pattern)
    return lambda value: type(value) is str and compiled.fullmatch(value) is not None


def _is_count(most: int) -> Callable[[object], bool]:
    return lambda value: type(value) is int and 0 <= value <= most


def _is_spec(value: object) -> bool:
    """Return whether a value is a flat spec of any version: words, programs, 32-bit numbers."""
    if type(value) is not dict or len(value) > 256:
        return False
    return all(
        _is_word(name)
        and (_is_word(field) or _is_program(field) or (type(field) is int and abs(field) < 2**31))
        for name, field in value.items()
    )


def _is_options(value: object) -> bool:
    return type(value) is list and len(value) <= 64 and all(map(_is_option, value))


def _is_log(value: object) -> bool:
    if type(value) is not str or len(value) > MAX_LOG:
        return False
    try:
        value.encode()
    except UnicodeEncodeError:  # a lone surrogate
        return False
    return True


_is_word: Final = _matches(r"[a-z0-9_]{1,64}")
_is_program: Final = _matches(r"[a-z0-9.,;:| -]{1,131072}")  # its characters (spec/program.py)
_is_option: Final = _matches(r"[!-~]{1,256}")
_is_digest: Final = _matches(r"[0-9a-f]{0,64}")
_is_figure: Final = _is_count(2**31 - 1)

#: Check of every field as JSON holds it. No later code validates again: values that pass can be
#: printed, hashed, sorted and used as numbers.
_CHECKS: Final[dict[str, Callable[[Any], bool]]] = {
    "key": _matches(KEY.pattern),
    "spec": _is_spec,
    "arch": _matches(ARCH.pattern),
    "toolchain": _matches(r"[a-z][a-z0-9_-]{0,31} [0-9]{1,6}(\.[0-9]{1,6}){0,3}"),
    "options": _is_options,
    "source_digest": _is_digest,
    "header_digest": _is_digest,
    "registers": _is_figure,
    "stack_bytes": _is_figure,
    "spill_bytes": _is_figure,
    "smem_bytes": _is_figure,
    "compile_ms": lambda value: type(value) is float and math.isfinite(value) and value >= 0,
    "log": _is_log,
    "bytes": _is_count(MAX_CUBIN_BYTES),
    "sha256": _matches(r"[0-9a-f]{64}"),
}


def from_json(text: bytes) -> Metadata | None:
    """Parse metadata; None if the text is anything else."""
    try:
        return from_dict(json.loads(text))
    except (ValueError, RecursionError):
        return None


def from_dict(raw: object) -> Metadata | None:
    """Build metadata from parsed JSON; None if a field is missing or invalid."""
    if type(raw) is not dict:
        return None
    if not all(name in raw and is_right(raw[name]) for name, is_right in _CHECKS.items()):
        return None
    values = {name: raw[name] for name in _CHECKS}
    return Metadata(**{**values, "options": tuple(values["options"])})
