"""Front doors: the names, arguments and layouts of other attention libraries, over jitattn.

Change one import, or let the old one find ours::

    with jitattn.compat.alias("flash_cosine_sim_attention"):
        from flash_cosine_sim_attention import flash_cosine_sim_attention

They translate arguments and results, and compute nothing themselves.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.abc
import os
import sys
import threading
import warnings
from collections import Counter
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from typing import TYPE_CHECKING, Final

from jitattn.compat._distributions import (
    claimed_distributions,
    forget_in_programs,
    normalized,
    packages_of,
)
from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from importlib.metadata import Distribution, DistributionFinder
    from types import ModuleType, TracebackType

#: Package names that programs import, and jitattn's modules that replace them.
DOORS: Final = {
    "dkernel": "jitattn.compat.dkernel",
    "fast_ops": "jitattn.compat.fast_ops",
    "flash_attn": "jitattn.compat.flash_attn",
    "flash_attn_2_cuda": "jitattn.compat.flash_attn_2_cuda",
    "flash_attn_2_cuda_vllm": "jitattn.compat.flash_attn_2_cuda",
    "flash_attn_3": "jitattn.compat.flash_attn_3",
    "flash_attn_interface": "jitattn.compat.flash_attn_interface",
    "flash_attn_vllm": "jitattn.compat.flash_attn",
    "flash_cosine_sim_attention": "jitattn.compat.flash_cosine_sim_attention",
    "sageattention": "jitattn.compat.sageattention",
    "warp_attention": "jitattn.compat.warp_attention",
    "xformers": "jitattn.compat.xformers",
}
#: Names that come with another: FlashAttention 3 has two, and diffusers looks for the second.
_TOGETHER: Final = {"flash_attn_interface": ("flash_attn_3",)}


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

    def find_distributions(
        self, context: DistributionFinder.Context | None = None
    ) -> Iterable[Distribution]:
        """Return the distributions that aliases claim, as `importlib.metadata` asks for them."""
        if "path" in vars(context or ()):
            return ()  # what lies in certain folders alone
        with _lock:
            claimed = set(_claims)
        return claimed_distributions(claimed, getattr(context, "name", None))

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
#: Distributions that aliases claim, and how many of those do.
_claims: Final[Counter[str]] = Counter()


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
    """Import aliases of jitattn's modules and their submodules, until they are undone.

    A context manager; `undo` does the same once and for all. A name may have several, undone in any
    order: it is given back with the last. Modules that were imported under the name meanwhile stay
    with those who hold them.
    """

    def __init__(self, *names: str, claimed: Sequence[str] = ()) -> None:
        self.names = names
        self._claimed = claimed
        self._stands = True
        with _lock:
            for name in names:
                if name not in _held:
                    _held[name] = _Held(_taken_out(name))
                _held[name].count += 1
            _claims.update(claimed)
            if not sys.meta_path or sys.meta_path[0] is not _FINDER:
                sys.meta_path.insert(0, _FINDER)
        if claimed:
            try:
                forget_in_programs()
            except Warning:  # where warnings are errors: all names or none
                with contextlib.suppress(Warning):
                    self.undo()
                raise

    def undo(self) -> None:
        """Release the names, unless other aliases hold them."""
        with _lock:
            if not self._stands:
                return
            self._stands = False
            for package in self._claimed:
                _claims[package] -= 1
                if not _claims[package]:
                    del _claims[package]
            for name in self.names:
                held = _held[name]
                held.count -= 1
                if held.count == 0:
                    del _held[name]
                    _taken_out(name)
                    sys.modules.update(held.before)
        if self._claimed:
            forget_in_programs()

    def __enter__(self) -> Alias:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()


def alias(
    *names: str, shadow: bool = False, distribution: bool | str | Sequence[str] = False
) -> Alias:
    """Make ``import name`` load jitattn's front door, for all names or for none.

    Parameters
    ----------
    names : str
        Of `DOORS`. With "flash_attn_interface" comes "flash_attn_3", which diffusers looks for.
    shadow : bool
        Do so even if a package of that name is installed, or a module of that name imported.
    distribution : bool, str or sequence of str
        Answer `importlib.metadata` too, as transformers and diffusers ask it: True for the packages
        of all names that have a version of their own, but for "flash-attn-4", or some of these
        packages (``("flash-attn", "flash-attn-4")``). Call it before the first import of diffusers,
        which asks once.

    Returns
    -------
    Alias
        A context manager, with `undo`. Without either, it holds for the process.

    Raises
    ------
    InvalidInputError
        We have no such door or package, or a package of that name is installed or imported.

    Examples
    --------
    >>> import jitattn.compat
    >>> with jitattn.compat.alias("flash_cosine_sim_attention"):
    ...     import flash_cosine_sim_attention as theirs
    >>> theirs is jitattn.compat.flash_cosine_sim_attention
    True
    """
    if not names:
        raise InvalidInputError(f"alias(): name one or more of {', '.join(DOORS)}")
    further = [more for name in names for more in _TOGETHER.get(name, ())]
    names = tuple(dict.fromkeys((*names, *further)))
    for name in names:
        if name not in DOORS:
            raise InvalidInputError(f"alias({name!r}): it must be one of {', '.join(DOORS)}")
        if not shadow and is_installed(name):
            raise InvalidInputError(
                f"alias({name!r}): a package of that name is installed or imported; pass "
                "shadow=True to be found before it"
            )
    return Alias(*names, claimed=_claimed(names, distribution))


def _claimed(names: Sequence[str], distribution: bool | str | Sequence[str]) -> list[str]:
    """Return the names of the packages that are claimed."""
    found = packages_of(names)
    if isinstance(distribution, bool):
        return [one.name for one in found.values() if one.by_default] if distribution else []
    wanted = [distribution] if isinstance(distribution, str) else list(distribution)
    for one in wanted:
        if normalized(one) not in found:
            raise InvalidInputError(
                f"alias(distribution={one!r}): the names {', '.join(names)} have these packages: "
                f"{', '.join(found) or 'none'}"
            )
    return list(dict.fromkeys(normalized(one) for one in wanted))


def alias_from_environment() -> None:
    """Alias the names in ``JITATTN_ALIAS``, with their distributions; warn of unknown ones.

    For programs whose first line cannot be changed: `python -m jitattn.compat --help`.
    """
    asked = [name.strip() for name in os.environ.get("JITATTN_ALIAS", "").split(",")]
    names = [name for name in asked if name in DOORS]
    unknown = [name for name in asked if name and name not in DOORS]
    if names:
        alias(*names, shadow=True, distribution=True)
    if unknown:
        warnings.warn(
            f"JITATTN_ALIAS: {', '.join(unknown)} is none of {', '.join(DOORS)}", stacklevel=2
        )


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
