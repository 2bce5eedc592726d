"""Front doors: the names, arguments and layouts of other systems over jitattn's one core.

Change one import, or let the old one find ours::

    with jitattn.compat.alias("flash_cosine_sim_attention"):
        from flash_cosine_sim_attention import flash_cosine_sim_attention

They translate, and compute nothing themselves.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import sys
from typing import TYPE_CHECKING, Final

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType, TracebackType

#: Names that programs import, and the modules of ours that answer to them.
DOORS: Final = {
    "dkernel": "jitattn.compat.dkernel",
    "fast_ops": "jitattn.compat.fast_ops",
    "flash_attn": "jitattn.compat.flash_attn",
    "flash_attn_2_cuda": "jitattn.compat.flash_attn_2_cuda",
    "flash_attn_2_cuda_vllm": "jitattn.compat.flash_attn_2_cuda",
    "flash_attn_vllm": "jitattn.compat.flash_attn",
    "flash_cosine_sim_attention": "jitattn.compat.flash_cosine_sim_attention",
    "warp_attention": "jitattn.compat.warp_attention",
}


class Alias(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A name that finds one of our modules, and its submodules, until it is undone.

    A context manager; `undo` does the same once and for all. Modules that were imported under the
    name meanwhile stay with those who hold them.
    """

    def __init__(self, name: str, target: str) -> None:
        self.name, self.target = name, target
        self._before = {key: module for key, module in sys.modules.items() if self._is_ours(key)}
        for key in self._before:
            del sys.modules[key]
        sys.meta_path.insert(0, self)

    def _is_ours(self, fullname: str) -> bool:
        return fullname == self.name or fullname.startswith(f"{self.name}.")

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Answer to the name and to what is below it."""
        del path, target
        if not self._is_ours(fullname):
            return None
        ours = self.target + fullname.removeprefix(self.name)
        if importlib.util.find_spec(ours) is None:
            return None
        return importlib.util.spec_from_loader(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return our module itself, so that both names mean one thing."""
        return importlib.import_module(self.target + spec.name.removeprefix(self.name))

    def exec_module(self, module: ModuleType) -> None:
        """Nothing is left to do; the import system has put another spec on it."""
        module.__spec__ = importlib.util.find_spec(module.__name__) or module.__spec__

    def undo(self) -> None:
        """Give the name back."""
        if self not in sys.meta_path:
            return
        sys.meta_path.remove(self)
        for key in [key for key in sys.modules if self._is_ours(key)]:
            del sys.modules[key]
        sys.modules.update(self._before)

    def __enter__(self) -> Alias:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def alias(name: str, *, shadow: bool = False) -> Alias:
    """Let ``import name`` find our front door.

    Parameters
    ----------
    name : str
        One of `DOORS`.
    shadow : bool
        Do so even if a package of that name is installed.

    Returns
    -------
    Alias
        A context manager, with `undo`. Without either, it holds for the process.

    Raises
    ------
    InvalidInputError
        We have no such door, or a package of that name is installed.

    Examples
    --------
    >>> import jitattn.compat
    >>> with jitattn.compat.alias("flash_cosine_sim_attention"):
    ...     import flash_cosine_sim_attention as theirs
    >>> theirs is jitattn.compat.flash_cosine_sim_attention
    True
    """
    if name not in DOORS:
        raise InvalidInputError(f"alias({name!r}): it must be one of {', '.join(DOORS)}")
    if not shadow and is_installed(name):
        raise InvalidInputError(
            f"alias({name!r}): a package of that name is installed; pass shadow=True to be found "
            "before it"
        )
    return Alias(name, DOORS[name])


def is_installed(name: str) -> bool:
    """Return whether the name leads to a module that is not one of ours."""
    for finder in sys.meta_path:
        if isinstance(finder, Alias):
            continue
        found = finder.find_spec(name, None)
        if found is not None:
            return True
    return False
