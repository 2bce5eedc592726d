"""The CUDA templates: where they are, and the closure of files that an entry needs."""

from __future__ import annotations

import functools
import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from jitattn.errors import InternalError
from jitattn.jit.codegen import HEADER_NAME

_INCLUDE: Final = re.compile(r"^\s*#\s*include\s+(\S+)", re.MULTILINE)
_PACKAGE: Final = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, slots=True)
class Sources:
    """One entry file and every header that it reaches, without the generated one."""

    entry: str  #: text of entry/<family>.cu
    headers: dict[str, str]  #: include name → text, sorted by name
    digest: str  #: sha256 over names and texts


def locate(package: Path = _PACKAGE) -> Path:
    """Return the folder that holds entry/ and jitattn/.

    An installed wheel carries it as jitattn/_cuda_src; in a checkout (an editable install too) it
    is cuda_src, beside the package.

    Raises
    ------
    InternalError
        Neither is there.
    """
    for candidate in (package / "_cuda_src", package.parent / "cuda_src"):
        if (candidate / "entry").is_dir():
            return candidate
    raise InternalError(
        f"the CUDA templates are in neither {package / '_cuda_src'} nor "
        f"{package.parent / 'cuda_src'}: the installation is damaged; install jitattn again"
    )


@functools.lru_cache(maxsize=32)
def closure(family: str, root: Path | None = None) -> Sources:
    """Read the entry of a kernel family and all that it includes. Memoised for the process.

    Raises
    ------
    InternalError
        A file is missing, or includes something other than "jitattn/…" or the generated header.
    """
    root = locate() if root is None else root
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
    digest = hashlib.sha256(usedforsecurity=False)
    for name, text in (("entry", entry), *headers.items()):
        for part in (name.encode(), text.encode()):
            digest.update(len(part).to_bytes(8, "little") + part)
    return Sources(entry=entry, headers=headers, digest=digest.hexdigest())


def _read(root: Path, name: str) -> str:
    try:
        # Line ends are made equal, so that a checkout with CRLF gives the same kernels.
        return (root / name).read_text(encoding="utf-8").replace("\r\n", "\n")
    except OSError as error:
        raise InternalError(f"template {name} cannot be read from {root}: {error}") from error
