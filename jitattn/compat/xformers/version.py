"""The version of xformers whose names are here."""

from __future__ import annotations

from typing import Final

__version__: Final = "0.0.35"
