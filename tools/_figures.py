"""Stores kernel figures by cache key, so that only changed kernels are built again.

A key covers templates, generated header, options and compiler (`cache.entry.cache_key`): figures of
other sources or of another compiler are not found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

FIGURES_FILE: Final = Path(__file__).resolve().parents[1] / "tests" / "data" / "kernel_figures.json"
#: Fields of a row, in order.
FIELDS: Final = ("registers", "spill_bytes", "smem_bytes", "cubin_bytes", "compile_ms")
_ABOUT: Final = (
    "Figures of the kernels of the compile matrix by cache key: "
    f"{', '.join(FIELDS)}. Written by tools/compile_matrix.py --update."
)


def load(path: Path = FIGURES_FILE) -> tuple[dict[str, list[Any]], str]:
    """Load the stored figures by key, and their compiler; empty if there is no file."""
    if not path.exists():
        return {}, ""
    found = json.loads(path.read_text())
    return found["figures"], found["compiler"]


def save(figures: Mapping[str, list[Any]], compiler: str, path: Path = FIGURES_FILE) -> None:
    """Write figures sorted by key, one line per kernel."""
    rows = ",\n".join(f"  {json.dumps(key)}: {json.dumps(figures[key])}" for key in sorted(figures))
    head = f' "about": {json.dumps(_ABOUT)},\n "compiler": {json.dumps(compiler)},\n'
    path.write_text(f'{{\n{head} "figures": {{\n{rows}\n }}\n}}\n')
