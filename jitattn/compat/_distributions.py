"""Installed-package metadata for aliased names: what `importlib.metadata` is told of them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator
    from os import PathLike

#: Distributions by the top-level name that an alias takes over: (name, version, all its names).
DISTRIBUTIONS: Final = {
    "flash_attn": ("flash-attn", "2.8.3", ("flash_attn", "flash_attn_2_cuda")),
}


class AliasDistribution(importlib.metadata.Distribution):
    """A distribution that is not installed, whose modules are jitattn's."""

    def __init__(self, name: str, version: str, top_level: tuple[str, ...]) -> None:
        self._texts = {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
            "Summary: An alias of jitattn's modules (jitattn.compat.alias)\n",
            "top_level.txt": "".join(f"{one}\n" for one in top_level),
            "RECORD": f"{top_level[0]}/__init__.py,,\n",
            "INSTALLER": "jitattn\n",
        }

    def read_text(self, filename: str) -> str | None:
        """Return the text of a metadata file; None if there is none."""
        return self._texts.get(filename)

    def locate_file(self, path: str | PathLike[str]) -> Any:  # noqa: ANN401 - a path of some kind
        """Return where a file of the distribution would be."""
        return Path(__file__).parent / path


def normalized(name: str) -> str:
    """Return a distribution's name as PEP 503 compares names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def of_names(claimed: set[str], wanted: str | None) -> Iterator[AliasDistribution]:
    """Yield the distributions of claimed top-level names, or the one that is wanted."""
    for top_level in sorted(claimed):
        name, version, names = DISTRIBUTIONS[top_level]
        if wanted is None or normalized(wanted) == normalized(name):
            yield AliasDistribution(name, version, names)


def forget_in_programs() -> None:
    """Let libraries that have looked for these packages look again, or say that they cannot."""
    utils = sys.modules.get("transformers.utils.import_utils")
    for name, value in list(vars(utils).items()) if utils is not None else ():
        if hasattr(value, "cache_clear") and ("flash" in name or "package" in name):
            value.cache_clear()
    constant = getattr(utils, "PACKAGE_DISTRIBUTION_MAPPING", None)
    if isinstance(constant, dict):
        constant.clear()
        constant.update(importlib.metadata.packages_distributions())
    if "diffusers" in sys.modules:
        warnings.warn(
            "diffusers was imported before: it looks for attention packages once; call "
            "jitattn.compat.alias before",
            stacklevel=4,
        )
