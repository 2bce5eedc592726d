"""Runs the demo, tools/demo.py: ``python -m jitattn.demo``, from a wheel or a checkout."""

from __future__ import annotations

import runpy
from pathlib import Path

from jitattn.errors import InternalError


def main() -> None:
    """Run the demo with the arguments of the command line; it ends the process."""
    package = Path(__file__).resolve().parent
    for folder in (package / "_tools", package.parent / "tools"):
        if (folder / "demo.py").is_file():
            runpy.run_path(str(folder / "demo.py"), run_name="__main__")
            return
    raise InternalError(
        f"the demo is neither in {package / '_tools'} nor in {package.parent / 'tools'}: the "
        "installation is damaged; install jitattn again"
    )


if __name__ == "__main__":
    main()
