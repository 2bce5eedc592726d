"""Exact attention for NVIDIA GPUs, compiled when it is first called.

Importing this package loads neither torch nor CuPy, reads no environment and creates nothing;
`attention`, `explain`, `warmup` and `reference` are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

from jitattn.errors import (
    CacheError,
    CacheMissError,
    CommunicationError,
    CompileError,
    InternalError,
    InvalidInputError,
    JitAttnError,
    LaunchError,
    UnsupportedError,
)
from jitattn.values.gears import get_default_gear, set_default_gear
from jitattn.values.masks import (
    BlockSparse,
    Causal,
    Dense,
    Full,
    KeyPadding,
    LocalStride,
    Mask,
    MaskMod,
    PerHead,
    Window,
)

if TYPE_CHECKING:
    from jitattn import compat, distributed, integrations, patterns, reference
    from jitattn.api.apply_rotary import apply_rotary
    from jitattn.api.attention import attention
    from jitattn.api.explain import explain
    from jitattn.api.kvcache import attention_with_kvcache
    from jitattn.api.l2norm import l2norm
    from jitattn.api.merge import merge
    from jitattn.api.warmup import warmup
    from jitattn.values.dropout import dropout_mask, dropout_state
    from jitattn.values.norm import L2Norm
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import Padded, Paged, Ragged

__version__ = "0.1.0.dev0"

__all__ = [
    "BlockSparse",
    "CacheError",
    "CacheMissError",
    "Causal",
    "CommunicationError",
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
    "MaskMod",
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
    "distributed",
    "dropout_mask",
    "dropout_state",
    "explain",
    "get_default_gear",
    "integrations",
    "l2norm",
    "merge",
    "patterns",
    "reference",
    "set_default_gear",
    "warmup",
]

#: Names that need torch, with their modules; imported at first use.
_LAZY: Final = {
    "L2Norm": "values.norm",
    "Padded": "values.sequences",
    "Paged": "values.sequences",
    "Ragged": "values.sequences",
    "Rotary": "values.rotary",
    "apply_rotary": "api.apply_rotary",
    "attention": "api.attention",
    "attention_with_kvcache": "api.kvcache",
    "dropout_mask": "values.dropout",
    "dropout_state": "values.dropout",
    "explain": "api.explain",
    "l2norm": "api.l2norm",
    "merge": "api.merge",
    "warmup": "api.warmup",
}
_LAZY_MODULES: Final = frozenset({"compat", "distributed", "integrations", "patterns", "reference"})


def __getattr__(name: str) -> object:
    if name in _LAZY_MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_LAZY[name]}"), name)
    globals()[name] = value  # later uses are dict look-ups
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
