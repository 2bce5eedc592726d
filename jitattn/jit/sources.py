"""Locates the CUDA templates, and reads the include closure of an entry file."""

from __future__ import annotations

import functools
import hashlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jitattn.cache import memo
from jitattn.errors import InternalError
from jitattn.jit.codegen import HEADER_NAME

_INCLUDE: Final = re.compile(r"^\s*#\s*include\s+(\S+)", re.MULTILINE)
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")
_PACKAGE: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Sources:
    """Entry file and all headers that it includes, except the generated one."""

    family: str
    entry: str  #: text of entry/<family>.cu
    headers: dict[str, str]  #: include name → text, sorted by name
    digest: str  #: sha256 over names and texts


@functools.lru_cache(maxsize=32)
def locate(package: Path = _PACKAGE) -> Path:
    """Return the folder that holds entry/ and jitattn/.

    It is jitattn/_cuda_src in an installed wheel, and cuda_src beside the package in a checkout or
    editable install.

    Raises
    ------
    InternalError
        Neither is there.
    """
    for candidate in (package / "_cuda_src", package.parent / "cuda_src"):
        if os.path.isdir(f"{candidate}/entry"):
            return candidate
    raise InternalError(
        f"the CUDA templates are in neither {package / '_cuda_src'} nor "
        f"{package.parent / 'cuda_src'}: the installation is damaged; install jitattn again"
    )


@functools.lru_cache(maxsize=32)
def digest(family: str) -> str:
    """Return the digest of `closure(family)`, from the memo unless a file has changed."""
    root = locate()
    name = f"templates of {family} in {root}"
    fact = memo.recall(name)
    if fact is not None:
        signature, remembered = fact
        paths = [str(part[0]) for part in signature]
        is_of_family = paths[:1] == [str(root / "entry" / f"{family}.cu")]
        is_digest = isinstance(remembered, str) and _DIGEST.fullmatch(remembered)
        if is_of_family and is_digest and memo.signature(paths) == signature:
            return str(remembered)
    files = [root / "entry" / f"{family}.cu", *(root / name for name in closure(family).headers)]
    # The signature is taken first, so that a change during reading is detected next time.
    signature = memo.signature(files)
    source = _close(family, root)
    memo.remember(name, signature, source.digest)
    return source.digest


@functools.lru_cache(maxsize=32)
def closure(family: str, root: Path | None = None) -> Sources:
    """Read the entry file of a kernel family and all that it includes; memoized.

    Raises
    ------
    InternalError
        A file is missing, or includes something other than "jitattn/…" or the generated header.
    """
    return _close(family, locate() if root is None else root)


def _close(family: str, root: Path) -> Sources:
    entry = _read(root, f"entry/{family}.cu")
    headers: dict[str, str] = {}
    pending = [(f"entry/{family}.cu", entry)]
    while pending:
        includer, text = pending.pop()
        for quoted in _INCLUDE.findall(text):
            name = quoted.strip('"')
            if name == HEADER_NAME or name in headers:
                continue
            if quoted != f'"{name}"' or not name.startswith("jitattn/") or ".." in name:
                raise InternalError(
                    f'{includer} includes {quoted}: templates include "jitattn/…" only'
                )
            headers[name] = _read(root, name)
            pending.append((name, headers[name]))
    headers = dict(sorted(headers.items()))
    checksum = hashlib.sha256(usedforsecurity=False)
    for name, text in (("entry", entry), *headers.items()):
        for part in (name.encode(), text.encode()):
            checksum.update(len(part).to_bytes(8, "little") + part)
    return Sources(family=family, entry=entry, headers=headers, digest=checksum.hexdigest())


def _read(root: Path, name: str) -> str:
    try:
        # Line ends are normalized, so that a checkout with CRLF gives the same kernels.
        return (root / name).read_text(encoding="utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise InternalError(f"template {name} cannot be read from {root}: {error}") from error
