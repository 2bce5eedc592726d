"""Commands that install what is missing, for hints: they work from where jitattn is."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parents[1]
#: NVIDIA makes neither a compiler nor a driver for it.
IS_MACOS: Final = sys.platform == "darwin"
#: Way out where no compiler exists.
NO_MACOS: Final = (
    "there is no NVRTC and no CUDA for macOS: the CPU path works here, and all commands that do "
    "not compile; run prebuild on Linux or Windows, in a container for example, and bring the "
    "kernels with export and import"
)


def command(extra: str) -> str:
    """Return the pip command that installs an extra, such as "cli".

    From a checkout it names the folder, as no index need have jitattn. Elsewhere jitattn is
    installed, and pip adds what the extra lacks without asking an index for jitattn itself.
    """
    root = _PACKAGE.parent
    if (root / "pyproject.toml").is_file() and (root / "cuda_src" / "entry").is_dir():
        return f'pip install -e "{root}[{extra}]"'
    return f'pip install "jitattn[{extra}]"'


def cuda(major: int | None = None) -> str:
    """Return the command that installs compiler and launcher, for a driver of a CUDA version.

    Without one, both are named; on macOS, why there is none.
    """
    if IS_MACOS:
        return NO_MACOS
    if major is not None:
        return command(f"cu{12 if major == 12 else 13}")
    return f"{command('cu13')} (driver 580 or newer), or the same with cu12 (driver 525)"
