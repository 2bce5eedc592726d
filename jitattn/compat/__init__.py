"""Front doors: the names, arguments and layouts of other attention libraries, over jitattn.

Change one import, or let the old one find ours::

    with jitattn.compat.alias("flash_cosine_sim_attention"):
        from flash_cosine_sim_attention import flash_cosine_sim_attention

They translate arguments and results, and compute nothing themselves.
"""

from __future__ import annotations

import functools
import importlib
import importlib.abc
import sys
import threading
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Final

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType, TracebackType

#: Package names that programs import, and jitattn's modules that replace them.
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


@dataclass(slots=True)
class _Held:
    """A module name that aliases have taken over."""

    before: dict[str, ModuleType]  #: what had the name, and names below it
    count: int = 0  #: of aliases that stand


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """An import finder that maps aliased names and their submodules to jitattn's modules.

    Our modules themselves are what is imported, and nothing of them changes: they keep their names,
    specs and loaders, so that they can be reloaded and what is in them pickled.

    Once there, it stays: where `sys.meta_path` gets shorter, other threads, which walk along it
    while they import, miss a finder.
    """

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        """Return the spec of an aliased name or of its submodule.

        Imports nothing: Python holds the lock of all imports meanwhile.
        """
        del target
        name, _, below = fullname.partition(".")
        if name not in _held:
            return None
        where = path if below else __path__
        ours = None if where is None else PathFinder.find_spec(_ours(fullname), where)
        if ours is None:
            return None
        spec = ModuleSpec(fullname, self, origin=ours.origin)
        # Another thread may import a submodule before our module replaces the empty one.
        spec.submodule_search_locations = ours.submodule_search_locations
        return spec

    def exec_module(self, module: ModuleType) -> None:
        """Replace the empty module of the import system by jitattn's module.

        To return ours from `create_module` would let the import system put the alias's spec on it.
        """
        fullname = module.__name__
        ours = _imported(_ours(fullname))
        # For those who make a module by hand, and look at no other, and for threads that asked
        # meanwhile: Python may hand them the module that was there when they asked.
        vars(module)["__getattr__"] = functools.partial(getattr, ours)
        with _lock:
            if fullname.partition(".")[0] not in _held:
                raise ImportError(f"the alias of {fullname} was undone meanwhile", name=fullname)
            sys.modules[fullname] = ours


_FINDER: Final = _Finder()
_lock: Final = threading.RLock()
_held: Final[dict[str, _Held]] = {}


def _ours(fullname: str) -> str:
    name, dot, below = fullname.partition(".")
    return DOORS[name] + dot + below


def _imported(name: str) -> ModuleType:
    """Import a module, its parent packages first.

    Asked for the module at once, Python takes its lock and then those of its packages; a thread
    that imports such a package meanwhile, and with it the module, takes them the other way round.
    """
    package = name.rpartition(".")[0]
    if package:
        _imported(package)
    return importlib.import_module(name)


def _taken_out(name: str) -> dict[str, ModuleType]:
    """Remove a name and its submodules from `sys.modules`."""
    every = sys.modules.copy()  # other threads may import meanwhile
    found = {key: every[key] for key in every if key.partition(".")[0] == name}
    for key in found:
        sys.modules.pop(key, None)
    return found


class Alias:
    """An import alias of one of jitattn's modules and its submodules, until it is undone.

    A context manager; `undo` does the same once and for all. A name may have several, undone in any
    order: it is given back with the last. Modules that were imported under the name meanwhile stay
    with those who hold them.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self._stands = True
        with _lock:
            if name not in _held:
                _held[name] = _Held(_taken_out(name))
            _held[name].count += 1
            if not sys.meta_path or sys.meta_path[0] is not _FINDER:
                sys.meta_path.insert(0, _FINDER)

    def undo(self) -> None:
        """Release the name, unless another alias holds it."""
        with _lock:
            if not self._stands:
                return
            self._stands = False
            held = _held[self.name]
            held.count -= 1
            if held.count == 0:
                del _held[self.name]
                _taken_out(self.name)
                sys.modules.update(held.before)

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
    """Make ``import name`` load jitattn's front door.

    Parameters
    ----------
    name : str
        One of `DOORS`.
    shadow : bool
        Do so even if a package of that name is installed, or a module of that name imported.

    Returns
    -------
    Alias
        A context manager, with `undo`. Without either, it holds for the process.

    Raises
    ------
    InvalidInputError
        We have no such door, or a package of that name is installed or imported.

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
            f"alias({name!r}): a package of that name is installed or imported; pass shadow=True "
            "to be found before it"
        )
    return Alias(name)


def is_installed(name: str) -> bool:
    """Return whether a module of this name is installed that is not jitattn's."""
    if name not in _held:
        loaded = sys.modules.get(name)
        if loaded is not None and loaded is not sys.modules.get(DOORS.get(name, "")):
            return True
    for finder in list(sys.meta_path):
        if not isinstance(finder, _Finder) and finder.find_spec(name, None) is not None:
            return True
    return False
