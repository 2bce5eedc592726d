"""``JITATTN_RECORD``: a running program notes the kernels that it uses, one JSON line each.

Any number of processes may append to one file. `jitattn-cache prebuild --spec FILE` makes exactly
those kernels, with the tiles that the installed version chooses for them.
"""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

from jitattn.jit import files, settings
from jitattn.jit.choices import to_choice

if TYPE_CHECKING:
    from pathlib import Path

    from jitattn.jit.spec import KernelSpec

_noted: set[tuple[Path, KernelSpec]] = set()


def note(spec: KernelSpec) -> None:
    """Append a kernel to the record, once per process, if a record was asked for."""
    path = settings.record()
    if path is None or (path, spec) in _noted:
        return
    _noted.add((path, spec))
    line = json.dumps(to_choice(spec)) + "\n"
    try:
        # One write of one line: appends of several processes do not mix.
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)
    except OSError as error:
        files.warn_once(path, f"JITATTN_RECORD={path}: it cannot be written ({error})")
