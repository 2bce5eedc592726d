"""The worker process of `jit/pool.py`: builds one kernel after another. It is run by its path.

Its input is lines of JSON: first where to import from, then a spec each; it answers each with a
line. Neither ``PYTHONPATH`` nor the working directory says where modules come from, for the one
splits paths that hold its separator and the other may be anybody's; and jitattn is loaded from
beside this file, whatever else has its name.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import BinaryIO


def _load_package() -> None:
    """Import the jitattn that this file is part of."""
    folder = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    spec = importlib.util.spec_from_file_location(
        "jitattn", os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    if spec is None or spec.loader is None:
        raise ImportError(f"jitattn cannot be imported from {folder}")
    module = importlib.util.module_from_spec(spec)
    sys.modules["jitattn"] = module
    spec.loader.exec_module(module)


def _answer(line: bytes) -> bytes:
    from jitattn.jit import pool
    from jitattn.spec.kernel_spec import spec_from_dict

    return pool.to_answer(pool.build_here(spec_from_dict(json.loads(line))))


def _work(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer line by line, until the input ends."""
    hello = json.loads(requests.readline())
    sys.path[:] = [*hello["path"], *(entry for entry in sys.path if entry not in hello["path"])]
    _load_package()
    _send(replies, json.dumps({"ready": hello["token"]}).encode())
    for line in requests:
        _send(replies, _answer(line))


def _send(replies: BinaryIO, line: bytes) -> None:
    replies.write(line + b"\n")
    replies.flush()


def _main() -> None:
    # Nothing but replies may reach the pipe, whatever a library prints.
    replies = os.fdopen(os.dup(1), "wb")
    try:
        os.dup2(2, 1)
    except OSError:  # there are no messages
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    try:
        _work(sys.stdin.buffer, replies)
    except BrokenPipeError:  # nobody waits for an answer any more
        os._exit(1)


if __name__ == "__main__":
    _main()
