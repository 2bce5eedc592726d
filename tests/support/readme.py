"""The Python examples of README.md, run one after another as a reader would."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_README = Path(__file__).parents[2] / "README.md"


def examples() -> list[str]:
    """Return the code of every Python block, in order."""
    return re.findall(r"^```python\n(.*?)^```$", _README.read_text(encoding="utf-8"), re.M | re.S)


def line_of(code: str) -> int:
    """Return the line of the README in which a block begins."""
    text = _README.read_text(encoding="utf-8")
    return text[: text.index(code)].count("\n") + 1


def run(code: str, names: dict[str, Any], device: str = "cuda") -> None:
    """Execute a block with the names of those before it; on a CPU, with its device replaced."""
    compiled = compile(
        "\n" * (line_of(code) - 1) + code.replace('device="cuda"', f'device="{device}"'),
        str(_README),
        "exec",
    )
    exec(compiled, names)
