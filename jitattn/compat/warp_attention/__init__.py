"""The front door of WarpAttention: short queries on a long history, in five gears.

`warp_attention_forward`, and under its older name, which the original's readme imports.

What is better here: every GPU from sm_80 on; fp16, bf16 and fp32; head dims from 1 to 256, grouped
heads; gradients; keys are split over the whole GPU where queries are short; no call waits for the
device where `q_max_seq_len` is given; sequence tensors may be int32; causal sequences of their own
are aligned to the bottom right, each by its lengths; gears have meanings and guarantees
(`values/gears.py`). `version` picks the tile: 0 is for up to 16 query rows of a kv head, 1 for up
to 64, 2 for more, and -1 (the default) the one that fits; the split of the keys follows from their
number. The gear is 4 until `set_default_gear` here says otherwise, whatever
`jitattn.set_default_gear` says; as a context, it is so within. Sequences without keys give 0.

Errors are of the original's kinds: an AssertionError for gear, version and missing sequence
tensors, a RuntimeError for what its binding checks; each of them is an `InvalidInputError` too.
"""

from __future__ import annotations

import functools
import logging
import math
from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn import __version__
from jitattn.api.explain import explain
from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, ExtensionError, check, errors_as, in_words
from jitattn.errors import InvalidInputError
from jitattn.values.gears import GEARS, DefaultGear
from jitattn.values.masks import Causal, Full
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from torch import Tensor

__all__ = [
    "__version__",
    "_warp_attention_forward",
    "get_default_gear",
    "get_log_level",
    "log_next_power_of_2",
    "num_gears",
    "num_kernel_versions",
    "set_default_gear",
    "set_log_level",
    "warp_attention_forward",
]

num_gears: Final = len(GEARS)
#: Tile rows of each version.
_TILE_ROWS: Final = (16, 64, 128)
num_kernel_versions: Final = len(_TILE_ROWS)
#: Python logging levels by the original's: silent, errors, warnings, information, all.
_LEVELS: Final = (
    logging.CRITICAL + 1,
    logging.ERROR,
    logging.WARNING,
    logging.INFO,
    logging.DEBUG,
    1,
)
#: From these levels on, calls log their kernel, and all of its fields.
_KERNELS, _EVERYTHING = 4, 5
_LOG: Final = logging.getLogger("jitattn.compat.warp_attention")
#: The core's argument names in error messages, and this door's.
_WORDS: Final = {
    "q": "query",
    "k": "key",
    "v": "value",
    "q_seqs": "q_seq_start and q_seq_len",
    "kv_seqs": "kv_seq_start and kv_seq_len",
    "check the layout argument": "the layout is [B, L, H, D]",
}
_FULL: Final = Full()
_CAUSAL: Final = Causal()
_settings = {"gear": 4, "log_level": 2}


@errors_as(ExtensionError, _WORDS)
def warp_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | None = None,
    out: Tensor | None = None,
    gear: int | None = None,
    version: int = -1,
    is_causal: bool = False,
    q_seq_start: Tensor | None = None,
    q_seq_len: Tensor | None = None,
    kv_seq_start: Tensor | None = None,
    kv_seq_len: Tensor | None = None,
    q_max_seq_len: int = -1,
    kv_max_seq_len: int = -1,
) -> Any:  # noqa: ANN401 - Tensor
    """Compute attention; differentiable without `out`.

    Parameters
    ----------
    query : Tensor, [B, M, Hq, D], or [total, Hq, D] with `q_seq_start` and `q_seq_len`
    key, value : Tensor, [B, N, Hkv, D], or [total, Hkv, D] with `kv_seq_start` and `kv_seq_len`
        Either side may have sequences of its own.
    scale : float, default 1 / sqrt(D)
    out : Tensor, as query, optional
        Written in place and returned; rows of no sequence keep what they hold. Without it they
        are 0.
    gear : int from 0 to 4, optional
        From accurate to fast; `get_default_gear` if left out.
    version : int from -1 to 2
        The tile; -1 to have it chosen.
    is_causal : bool
        Aligned to the bottom right.
    q_seq_start, q_seq_len, kv_seq_start, kv_seq_len : Tensor, [B], int64 or int32
        First row and number of rows of each sequence. Ignored for 4-D tensors.
    q_max_seq_len, kv_max_seq_len : int
        Bounds on the lengths. -1 reads them from the device, which waits for it: that of queries,
        which decides on the tile, at every call but a captured one, for which tensors are bounds
        enough; that of keys only for gradients.

    Returns
    -------
    Tensor, as query

    Raises
    ------
    CheckFailedError
        Gear or version is none, a 3-D tensor comes without its sequences, or only one of key and
        value is 3-D; an AssertionError.
    ExtensionError
        Tensors do not fit together; a RuntimeError.
    """
    if gear is None:
        gear = _settings["gear"]
    elif type(gear) is not int or not 0 <= gear < num_gears:
        _check_gear(gear)
    if not -1 <= version < num_kernel_versions:
        raise CheckFailedError(
            f"version={version}: it must be from -1 (chosen) to {num_kernel_versions - 1}"
        )
    q_seqs = kv_seqs = None
    if query.ndim == 3:
        q_seqs = _sequences("query", query, q_seq_start, q_seq_len, q_max_seq_len)
    if key.ndim == 3:
        if value.ndim != 3:
            raise CheckFailedError(
                f"value has shape {list(value.shape)}, and key {list(key.shape)}: with sequences "
                "of their own, both must have 3 dimensions; flatten value with value.flatten(0, 1)"
            )
        same = kv_seq_start is q_seq_start and kv_seq_len is q_seq_len
        if q_seqs is not None and same and kv_max_seq_len in (-1, q_max_seq_len):
            kv_seqs = q_seqs  # self-attention: checked once
        else:
            if kv_max_seq_len < 0 and not _wants_gradients(query, key, value):
                kv_max_seq_len = key.shape[0]
            kv_seqs = _sequences("key", key, kv_seq_start, kv_seq_len, kv_max_seq_len)
    arguments: dict[str, Any] = {
        "mask": _CAUSAL if is_causal else _FULL,
        "scale": scale,
        "gear": gear,
        "out": out,
        "q_seqs": q_seqs,
        "kv_seqs": kv_seqs,
        "tile_rows": None if version < 0 else _TILE_ROWS[version],
    }
    if _settings["log_level"] >= _KERNELS and not torch.compiler.is_compiling():
        _log_kernel(query, key, value, arguments)
    return attention(query, key, value, **arguments)


_warp_attention_forward = warp_attention_forward


def log_next_power_of_2(x: int) -> int:
    """Return ceil(log2(x)), and 0 for 0."""
    return max(0, math.ceil(x) - 1).bit_length()


def set_default_gear(new_gear: int) -> DefaultGear:
    """Set the gear of calls through this door that name none.

    Returns
    -------
    DefaultGear
        To be used as a context, which gives the gear before back, or to be dropped.

    Raises
    ------
    CheckFailedError
        It is no gear.
    """
    _check_gear(new_gear)
    before, _settings["gear"] = _settings["gear"], new_gear
    return DefaultGear(functools.partial(set_default_gear, before))


def get_default_gear() -> int:
    """Return the gear of calls through this door that name none."""
    return _settings["gear"]


def set_log_level(level: int) -> None:
    """Set the level of Python's logger ``jitattn``, for all of jitattn.

    0 is silent, 1 for errors, 2 for warnings (a cache directory that cannot be used), 3 for what
    is compiled and how the cache fares besides. From 4 on, each call through this door says which
    kernel it takes, and with 5, everything that `jitattn.explain` knows of it: both are for
    looking, and make calls slow. Up to 3, calls cost nothing more. What is below a warning shows
    once the program has set logging up, as with ``logging.basicConfig()``.

    Raises
    ------
    CheckFailedError
        It is no level.
    """
    check(
        type(level) is int and 0 <= level < len(_LEVELS),
        f"level={level!r}: it must be an int from 0 (silent) to {len(_LEVELS) - 1} (everything)",
    )
    _settings["log_level"] = level
    logging.getLogger("jitattn").setLevel(_LEVELS[level])


def get_log_level() -> int:
    """Return the level that `set_log_level` set; by default 2, warnings."""
    return _settings["log_level"]


def _check_gear(gear: int) -> None:
    check(
        type(gear) is int and 0 <= gear < num_gears,
        f"gear={gear!r}: it must be an int from 0 (most accurate) to {num_gears - 1} (fastest)",
    )


def _log_kernel(query: Tensor, key: Tensor, value: Tensor, arguments: dict[str, Any]) -> None:
    found = explain(query, key, value, **arguments)
    if _settings["log_level"] >= _EVERYTHING:
        _LOG.log(_LEVELS[_EVERYTHING], "warp_attention_forward:\n%s", found)
        return
    kernel = "no kernel"
    if found.kernel:
        tile = found.kernel
        kernel = (
            f"{tile['family']} for {tile['arch']} in numerics {tile['numerics']}, tile "
            f"{tile['block_q']} x {tile['block_kv']}, {found.num_splits} splits, {found.key[:16]}"
        )
    _LOG.debug(
        "warp_attention_forward: query %s, key %s, gear %d, path %s: %s",
        list(query.shape),
        list(key.shape),
        found.gear,
        found.path,
        kernel,
    )


def _wants_gradients(*tensors: Tensor) -> bool:
    """Return whether autograd records the call; arrays of other libraries have no gradients."""
    return torch.is_grad_enabled() and any(getattr(x, "requires_grad", False) for x in tensors)


def _sequences(
    name: str, tensor: Tensor, start: Tensor | None, length: Tensor | None, longest: int
) -> Ragged:
    """Return the sequences of a call; synchronizes to read an unknown largest length."""
    side = "q" if name == "query" else "kv"
    if start is None or length is None:
        raise CheckFailedError(
            f"{name} has shape {list(tensor.shape)}: with 3 dimensions, {side}_seq_start and "
            f"{side}_seq_len must say where its sequences lie"
        )
    is_on_gpu = getattr(length, "is_cuda", False)
    if longest < 0 and is_on_gpu and torch.cuda.is_current_stream_capturing():
        longest = tensor.shape[0]
    try:
        return Ragged(start, length, None if longest < 0 else int(longest))
    except InvalidInputError as error:
        names = {
            "Ragged(start=...)": f"{side}_seq_start",
            "Ragged(length=...)": f"{side}_seq_len",
            "start": f"{side}_seq_start",
            "length": f"{side}_seq_len",
            "Ragged": name,
            "max_length": f"{side}_max_seq_len",
        }
        raise ExtensionError(in_words(error, names)) from error
