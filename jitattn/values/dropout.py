"""Dropout of attention weights: the kernels' random numbers, for masks and the CPU path.

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives 16 bits
for every weight from (state, batch, head, query, key), so that nothing has to be stored: a backward
pass, another layout or another device draws the same weights. All 128 bits of a state count.
`cuda_src/jitattn/attention/dropout.cuh` documents the use of the bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError
from jitattn.values.given import real
from jitattn.values.tensors import index_address, is_placeholder

if TYPE_CHECKING:
    from torch import Tensor

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 7
#: Increment of the key's second half per unit of the offset's high half.
_KEY_FACTOR: Final = 0x85EBCA6B
#: Parts in which a large mask is drawn, and bounds on the weights of a part.
_PARTS: Final = 16
_FEWEST_DRAWN: Final = 1 << 18
_MOST_DRAWN: Final = 1 << 24


class Dropout(NamedTuple):
    """Validated dropout; drops the weights whose random number is below `threshold`."""

    threshold: int  #: p · 2^16
    state: Tensor  #: int64 [2]
    first_batch: int = 0  #: index of a call's first sequence in the whole batch

    @property
    def scale(self) -> float:
        """Factor of the weights that are kept, 1 / (1 - p)."""
        return 65536 / (65536 - self.threshold)


def dropout_state(
    device: torch.device | str | int | None = None, *, generator: torch.Generator | None = None
) -> Tensor:
    """Draw the seed and the offset of one dropout.

    On the device, without a host synchronisation: `torch.manual_seed` makes it reproducible, and a
    captured CUDA graph draws another one in every replay.

    Parameters
    ----------
    device : torch.device, str or int, default "cuda" if there is one
    generator : torch.Generator, default torch's own of the device

    Returns
    -------
    Tensor, int64 [2]
        Seed and offset: states that differ in any bit drop other weights.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)


def threshold_of(p: float) -> int:
    """Check a probability and return it in units of 2^-16.

    Raises
    ------
    InvalidInputError
        It is not from 0 to below 1.
    """
    number = real(p)
    if number is None or not 0.0 <= number < 1.0:
        raise InvalidInputError(
            f"dropout_p={p!r}: it must be from 0 to below 1, the part of the weights to drop"
        )
    return min(65535, round(number * 65536))


def check_state(state: Tensor, device: torch.device | None) -> None:
    """Refuse a value that is not a dropout state on this device.

    Raises
    ------
    InvalidInputError
    """
    fits = isinstance(state, torch.Tensor) and state.dtype is torch.int64
    if not fits or list(state.shape) != [2] or state.device != device or not state.is_contiguous():
        what = type(state).__name__
        if isinstance(state, torch.Tensor):
            what = f"{state.dtype} {list(state.shape)} on {state.device}"
        place = "" if device is None else f" on {device}"
        raise InvalidInputError(
            f"dropout_state is {what}: it must be a contiguous int64 tensor [2]{place}, as "
            "jitattn.dropout_state(device) makes"
        )


def dropout_mask(
    state: Tensor, p: float, batch: int, heads: int, len_q: int, len_kv: int
) -> Tensor:
    """Return the mask of kept weights of a call with this state and probability.

    Parameters
    ----------
    state : Tensor, int64 [2]
        As given to `attention`.
    p : float
        As given to `attention`; held to 2^-16.
    batch, heads, len_q, len_kv : int
        Sequences, query heads, and queries and keys of a sequence.

    Returns
    -------
    Tensor, [B, Hq, Lq, Lkv], bool
        True = stays, and is divided by 1 - p.
    """
    check_state(state, getattr(state, "device", None))
    dropout = Dropout(threshold_of(p), state)
    if not torch.compiler.is_dynamo_compiling():
        index_address("state", state)  # refuses freed memory
        if is_placeholder(state):
            return state.new_empty((batch, heads, len_q, len_kv), dtype=torch.bool)
    return keeps(dropout, batch, heads, range(len_q), range(len_kv))


def keeps(dropout: Dropout, batch: int, heads: int, queries: range, keys: range) -> Tensor:
    """Return the mask of kept weights of a part of the score matrix, [B, Hq, queries, keys].

    Numbers are drawn for a sixteenth of the rows at a time, which bounds the working memory of a
    large mask to a byte a weight.
    """
    shape = (batch, heads, len(queries), len(keys))
    num_rows = batch * heads * len(queries)
    device = dropout.state.device
    if not num_rows * len(keys):
        return torch.ones(shape, dtype=torch.bool, device=device)
    wanted = num_rows * len(keys) // _PARTS
    step = max(1, min(max(wanted, _FEWEST_DRAWN), _MOST_DRAWN) // len(keys))
    if step >= num_rows:
        return _kept_rows(dropout, heads, queries, keys, range(num_rows)).view(shape)
    kept = torch.empty((num_rows, len(keys)), dtype=torch.bool, device=device)
    for first in range(0, num_rows, step):
        rows = range(first, min(first + step, num_rows))
        kept[rows.start : rows.stop] = _kept_rows(dropout, heads, queries, keys, rows)
    return kept.view(shape)


def _kept_rows(dropout: Dropout, heads: int, queries: range, keys: range, rows: range) -> Tensor:
    """Return the mask of kept weights in rows of a [B * Hq * queries, keys] matrix."""
    device = dropout.state.device
    first, last = keys.start // 32, (keys.stop - 1) // 32
    row = torch.arange(rows.start, rows.stop, device=device)[:, None]
    x = torch.arange(first * 4, last * 4 + 4, device=device)
    y = row % len(queries) + queries.start
    z = row // len(queries) + dropout.first_batch * heads
    seed, offset = dropout.state[0], dropout.state[1]
    high = offset >> 32
    key = seed + high & _WORD, (seed >> 32) + high * _KEY_FACTOR & _WORD
    words = philox((x, y, z, offset & _WORD), key)
    # Each word, [rows, spans * 4] → [rows, spans, 4 words, 4 pairs] → two numbers of 16 bits each,
    # moved by -2^15 so that signed integers hold them in order.
    halves = [(word ^ 0x80008000).to(torch.int32).view(len(row), -1, 4) for word in words]
    numbers = torch.stack(halves, dim=2).view(torch.int16).view(len(row), -1)
    skip = keys.start - first * 32
    return numbers[:, skip : skip + len(keys)] >= dropout.threshold - 2**15


def philox(
    counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int], rounds: int = _ROUNDS
) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32, elementwise, in int64."""
    x, y, z, w = counter
    key0, key1 = key
    for _ in range(rounds):
        first, second = x * 0xD2511F53, z * 0xCD9E8D57  # modulo 2^64: the whole product
        x, y, z, w = (
            (second >> 32 & _WORD) ^ y ^ key0,
            second & _WORD,
            (first >> 32 & _WORD) ^ w ^ key1,
            first & _WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return x, y, z, w
