"""Installed-package metadata for aliased names: what `importlib.metadata` is told of them."""

from __future__ import annotations

import importlib.metadata
import re
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from os import PathLike


class Package(NamedTuple):
    """A published package that has a door."""

    name: str  #: of the distribution, as PEP 503 writes it
    version: str
    top_level: tuple[str, ...]  #: names that it is imported by
    by_default: bool = True  #: whether ``distribution=True`` claims it


_FLASH_ATTN_3: Final = Package("flash-attn-3", "3.0.0", ("flash_attn_3", "flash_attn_interface"))
#: Packages by the top-level names that an alias takes over.
DISTRIBUTIONS: Final = {
    "flash_attn": (
        Package("flash-attn", "2.8.3", ("flash_attn", "flash_attn_2_cuda")),
        # Programs choose version 4 where they find it: those who want that ask for it.
        Package("flash-attn-4", "4.0.0b36", ("flash_attn",), by_default=False),
    ),
    "flash_attn_3": (_FLASH_ATTN_3,),
    "flash_attn_interface": (_FLASH_ATTN_3,),
    "sageattention": (Package("sageattention", "2.2.0", ("sageattention",)),),
    "xformers": (Package("xformers", "0.0.35", ("xformers",)),),
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


def packages_of(names: Iterable[str]) -> dict[str, Package]:
    """Return the packages that top-level names have, by name."""
    return {package.name: package for name in names for package in DISTRIBUTIONS.get(name, ())}


def claimed_distributions(claimed: set[str], wanted: str | None) -> Iterator[AliasDistribution]:
    """Yield the distributions of claimed packages, or the one that is wanted."""
    every = packages_of(DISTRIBUTIONS)
    for package in sorted(claimed):
        if wanted is None or normalized(wanted) == package:
            yield AliasDistribution(*every[package][:3])


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
