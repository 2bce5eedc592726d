"""What the cache keeps of a kernel: its cubin, its metadata, and the key that names both.

A key has two parts. The first 40 digits say which kernel it is: templates, spec, options. The other
24 say which compiler made it. The user's own cache asks for the whole key; directories that are
only read are content with the first part, so that what NVRTC 12 made serves where 13 is installed.
Every ingredient of the key is in the metadata, so that anyone can compute it again.
"""

from __future__ import annotations

import hashlib
import json
import re
import struct
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Final

from jitattn.jit.spec import arch_number

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Version of the key recipe and of the layout.
SCHEMA: Final = 1
MAX_CUBIN_BYTES: Final = 64 * 1024 * 1024
MAX_JSON_BYTES: Final = 1024 * 1024
#: Digits of a key that name the kernel, without the compiler.
KERNEL_DIGITS: Final = 40
KEY: Final = re.compile(r"[0-9a-f]{64}")
_ARCH: Final = re.compile(r"sm_\d{2,3}[af]?")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """What is known of a cubin. For people and reports; nothing of it reaches a launch."""

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
    compile_ms: float  #: 0 where it is not known (in archives)
    log: str  #: of the compiler
    bytes: int  #: of the cubin
    sha256: str  #: of the cubin

    def key_again(self) -> str:
        """Compute the key from its ingredients."""
        return cache_key(
            self.spec, self.source_digest, self.header_digest, self.options, self.toolchain
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """A checked entry."""

    cubin: bytes
    metadata: Metadata


def cache_key(
    spec: Mapping[str, str | int],
    source_digest: str,
    header_digest: str,
    options: tuple[str, ...],
    toolchain: str,
) -> str:
    """Return the key of a kernel, from everything that its bytes depend on.

    Parameters
    ----------
    spec : mapping
        The flat form of the spec (`to_dict`), its family and architecture included.
    toolchain : str
        The compiler; empty where none is installed, which leaves the first 40 digits right.
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
    """Return sha256 over texts, each with its length in front."""
    parts: list[bytes] = []
    for text in texts:
        encoded = text.encode()
        parts += (len(encoded).to_bytes(8, "little"), encoded)
    return sha256(b"".join(parts))


def sha256(content: bytes) -> str:
    """Return the checksum of bytes."""
    return hashlib.sha256(content, usedforsecurity=False).hexdigest()


def is_cubin_for(cubin: bytes, arch: str) -> bool:
    """Whether bytes are an ELF file of machine code for `arch`."""
    if len(cubin) < 64 or cubin[:4] != b"\x7fELF" or cubin[4] != 2:
        return False
    (machine,) = struct.unpack_from("<H", cubin, 18)
    (flags,) = struct.unpack_from("<I", cubin, 48)
    number = flags & 0xFF if cubin[7] == 51 else (flags >> 8) & 0xFF  # ABI 7; from CUDA 13 on, 8
    return bool(machine == 190 and number == arch_number(arch))


def fault(cubin: bytes, metadata: Metadata, arch: str) -> str | None:
    """Say what is wrong with a cubin and its metadata; None if they are right."""
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
    """Render metadata: the same text for the same facts."""
    return json.dumps(asdict(metadata), indent=1, sort_keys=True).encode()


#: The type of every field in JSON.
_KINDS: Final[dict[str, type]] = {
    **{field.name: int if field.type == "int" else str for field in fields(Metadata)},
    "spec": dict,
    "options": list,
    "compile_ms": float,
}


def from_json(text: bytes) -> Metadata | None:
    """Read metadata; None if the text is anything else."""
    try:
        return from_dict(json.loads(text))
    except (ValueError, RecursionError):
        return None


def from_dict(raw: object) -> Metadata | None:
    """Build metadata from what a JSON text held; None if a field is missing or of another kind."""
    if not isinstance(raw, dict):
        return None
    values: dict[str, Any] = {name: raw.get(name) for name in _KINDS}
    for name, kind in _KINDS.items():
        if type(values[name]) is not kind:
            return None
    values["options"] = tuple(values["options"])
    if not all(type(text) is str for text in values["options"]):
        return None
    if not all(type(value) in (str, int) for value in values["spec"].values()):
        return None
    if not (KEY.fullmatch(values["key"]) and _ARCH.fullmatch(values["arch"])):
        return None
    return Metadata(**values)
