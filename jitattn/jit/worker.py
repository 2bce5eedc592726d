"""Worker process of `jit/pool.py`, run by its path: builds one kernel after another.

Its input is lines of JSON: first the import path, then one spec per line; it answers each with a
line. Modules come neither from ``PYTHONPATH``, which splits paths that contain its separator, nor
from the working directory, which another user may own. jitattn is loaded from the package of this
file, even if another module has its name.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import sys
from typing import BinaryIO


def _load_package() -> None:
    """Import the package jitattn that contains this file."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location(
        "jitattn", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"jitattn cannot be imported from {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["jitattn"] = module
    spec.loader.exec_module(module)


class _Collected(logging.Handler):
    """Keeps warnings for the parent, which gives each once, however many workers have it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._found: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record."""
        text = record.getMessage()
        self._found.append((str(getattr(record, "subject", text)), text))

    def take(self) -> list[tuple[str, str]]:
        """Return what was collected since the last call."""
        found, self._found = self._found, []
        return found


def _answer(line: bytes, warnings: _Collected) -> bytes:
    from jitattn.jit import pool
    from jitattn.spec.kernel_spec import spec_from_dict

    outcome = pool.build_here(spec_from_dict(json.loads(line)))
    return pool.to_answer(outcome, warnings.take())


def _work(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer each line of input until its end."""
    hello = json.loads(requests.readline())
    sys.path[:] = [*hello["path"], *(entry for entry in sys.path if entry not in hello["path"])]
    _load_package()
    warnings = _Collected()
    logging.getLogger("jitattn").addHandler(warnings)  # and so none goes to stderr
    _send(replies, json.dumps({"ready": hello["token"]}).encode())
    for line in requests:
        _send(replies, _answer(line, warnings))


def _send(replies: BinaryIO, line: bytes) -> None:
    replies.write(line + b"\n")
    replies.flush()


def _main() -> None:
    # Only replies may reach the pipe; output of libraries goes to stderr.
    replies = os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)
    except OSError:  # stderr is closed
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _work(sys.stdin.buffer, replies)
    except BrokenPipeError:  # the parent has ended
        os._exit(1)


if __name__ == "__main__":
    _main()
