"""Aliases the names in JITATTN_ALIAS when Python starts; a start never fails for it.

Found by PYTHONPATH (`python -m jitattn.compat --site`). Another sitecustomize, which this one
hides, is run as well.
"""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import warnings
from importlib.machinery import PathFinder
from pathlib import Path

try:
    from jitattn.compat import alias_from_environment

    alias_from_environment()
except Exception as error:  # noqa: BLE001 - nothing may stop the program, nor a warning made one
    with contextlib.suppress(Warning):
        warnings.warn(f"JITATTN_ALIAS: {type(error).__name__}: {error}", stacklevel=1)

_HERE = Path(__file__).resolve().parent
_others = [path for path in sys.path if path and Path(path).resolve() != _HERE]
_hidden = PathFinder.find_spec("sitecustomize", _others)
if _hidden is not None and _hidden.loader is not None:
    _hidden.loader.exec_module(importlib.util.module_from_spec(_hidden))
