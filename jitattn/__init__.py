"""Exact attention for NVIDIA GPUs, compiled when it is first called.

Importing this package loads neither torch nor CuPy, reads no environment and creates nothing;
`attention`, `explain`, `warmup` and `reference` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Final

from jitattn.errors import (
    CacheError,
    CacheMissError,
    CompileError,
    InternalError,
    InvalidInputError,
    JitAttnError,
    LaunchError,
    UnsupportedError,
)
from jitattn.gears import get_default_gear, set_default_gear
from jitattn.masks import (
    BlockSparse,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    Mask,
    PerHead,
    Window,
)

if TYPE_CHECKING:
    from jitattn import patterns, reference
    from jitattn.apply_rotary import apply_rotary
    from jitattn.attention import attention
    from jitattn.cosine import L2Norm, l2norm
    from jitattn.dropout import dropout_mask, dropout_state
    from jitattn.explain import explain
    from jitattn.kvcache import attention_with_kvcache
    from jitattn.merge import merge
    from jitattn.rotary import Rotary
    from jitattn.sequences import Padded, Paged, Ragged
    from jitattn.warmup import warmup

__version__ = "0.1.0.dev0"

__all__ = [
    "BlockSparse",
    "CacheError",
    "CacheMissError",
    "Causal",
    "CompileError",
    "Dense",
    "Full",
    "InternalError",
    "InvalidInputError",
    "JitAttnError",
    "KeyPadding",
    "L2Norm",
    "LaunchError",
    "LocalStride",
    "Mask",
    "Padded",
    "Paged",
    "PerHead",
    "Ragged",
    "Rotary",
    "UnsupportedError",
    "Window",
    "__version__",
    "apply_rotary",
    "attention",
    "attention_with_kvcache",
    "compat",
    "dropout_mask",
    "dropout_state",
    "explain",
    "get_default_gear",
    "l2norm",
    "merge",
    "patterns",
    "reference",
    "set_default_gear",
    "warmup",
]

#: Functions that live in a submodule of the same name, and submodules, loaded on first use.
_LAZY_FUNCTIONS: Final = frozenset({"apply_rotary", "attention", "explain", "merge", "warmup"})
#: Names that need torch, by the submodule of another name that they live in.
_LAZY_NAMES: Final = {
    "L2Norm": "cosine",
    "Padded": "sequences",
    "Paged": "sequences",
    "Ragged": "sequences",
    "Rotary": "rotary",
    "attention_with_kvcache": "kvcache",
    "dropout_mask": "dropout",
    "dropout_state": "dropout",
    "l2norm": "cosine",
}
_LAZY_MODULES: Final = frozenset({"compat", "patterns", "reference"})


class _Package(ModuleType):
    """The package itself: `jitattn.attention` stays the function once its module is loaded.

    The import system binds a loaded submodule to its parent under its own name. Where a public
    function has that name, the function goes there instead.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if name in _LAZY_FUNCTIONS and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


def __getattr__(name: str) -> object:
    if name in _LAZY_FUNCTIONS or name in _LAZY_MODULES:
        module = importlib.import_module(f"{__name__}.{name}")
        return getattr(module, name) if name in _LAZY_FUNCTIONS else module
    if name in _LAZY_NAMES:
        module = importlib.import_module(f"{__name__}.{_LAZY_NAMES[name]}")
        return getattr(module, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))


sys.modules[__name__].__class__ = _Package
