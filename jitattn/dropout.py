"""Dropout of attention weights: the generator of the kernels, for masks and for the CPU path.

Philox4x32-7 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) gives 16 bits
for every weight from (state, batch, head, query, key), so that nothing has to be stored: a backward
pass, another layout or another device draws the same weights. `cuda_src/jitattn/dropout.cuh` says
which bits are whose.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from torch import Tensor

_WORD: Final = 0xFFFFFFFF
_ROUNDS: Final = 7


class Dropout(NamedTuple):
    """A validated dropout: weights whose number is below `threshold` are dropped."""

    threshold: int  #: p · 2^16
    state: Tensor  #: int64 [2]
    first_batch: int = 0  #: of the first sequence of a call, among those of the whole batch

    @property
    def scale(self) -> float:
        """By which weights that stay are multiplied."""
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
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.randint(-(2**63), 2**63 - 1, (2,), device=device, generator=generator)


def threshold_of(p: float) -> int:
    """Check a probability, and return it in units of 2^-16.

    Raises
    ------
    InvalidInputError
        It is not from 0 to below 1.
    """
    is_number = isinstance(p, int | float) and not isinstance(p, bool)
    if not is_number or not 0.0 <= p < 1.0:
        raise InvalidInputError(
            f"dropout_p={p!r}: it must be from 0 to below 1, the part of the weights to drop"
        )
    return min(65535, round(p * 65536))


def check_state(state: Tensor, device: torch.device) -> None:
    """Refuse what is no state of this device.

    Raises
    ------
    InvalidInputError
    """
    fits = isinstance(state, torch.Tensor) and state.dtype is torch.int64
    if not fits or list(state.shape) != [2] or state.device != device or not state.is_contiguous():
        what = type(state).__name__
        if isinstance(state, torch.Tensor):
            what = f"{state.dtype} {list(state.shape)} on {state.device}"
        raise InvalidInputError(
            f"dropout_state is {what}: it must be a contiguous int64 tensor [2] on {device}, as "
            "jitattn.dropout_state(device) makes"
        )


def dropout_mask(
    state: Tensor, p: float, batch: int, heads: int, len_q: int, len_kv: int
) -> Tensor:
    """Return which weights stay: exactly those of a call with this state and probability.

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
    check_state(state, state.device)
    dropout = Dropout(threshold_of(p), state)
    return keeps(dropout, batch, heads, range(len_q), range(len_kv))


def keeps(dropout: Dropout, batch: int, heads: int, queries: range, keys: range) -> Tensor:
    """Return which weights of a part of the score matrix stay, [B, Hq, queries, keys]."""
    device = dropout.state.device
    if not len(keys) * len(queries) * batch * heads:
        return torch.ones(batch, heads, len(queries), len(keys), dtype=torch.bool, device=device)
    first, last = keys.start // 32, (keys.stop - 1) // 32
    x = torch.arange(first * 4, last * 4 + 4, device=device)
    y = torch.arange(queries.start, queries.stop, device=device)[:, None]
    z = torch.arange(batch * heads, device=device)[:, None, None] + dropout.first_batch * heads
    seed, offset = dropout.state[0], dropout.state[1] & _WORD
    words = philox((x, y, z, offset), (seed & _WORD, seed >> 32 & _WORD))
    # [B · H, queries, spans · 4] of each word → [B · H, queries, spans, 4 words, 4 pairs, 2 halves]
    shape = (batch * heads, len(queries), last - first + 1, 4)
    spread = torch.stack([word.expand(batch * heads, len(queries), -1) for word in words], dim=-1)
    spread = spread.reshape(*shape, 4).transpose(3, 4)
    halves = torch.stack([spread & 0xFFFF, spread >> 16], dim=-1)
    numbers = halves.reshape(batch, heads, len(queries), -1)
    skip = keys.start - first * 32
    return numbers[..., skip : skip + len(keys)] >= dropout.threshold


def philox(
    counter: tuple[Tensor, ...], key: tuple[Tensor | int, Tensor | int], rounds: int = _ROUNDS
) -> tuple[Tensor, ...]:
    """Return the four 32-bit words of Philox4x32, elementwise, in int64."""
    x, y, z, w = counter
    key0, key1 = key
    for _ in range(rounds):
        first, second = x * 0xD2511F53, z * 0xCD9E8D57  # the low 64 bits, which are all
        x, y, z, w = (
            (second >> 32 & _WORD) ^ y ^ key0,
            second & _WORD,
            (first >> 32 & _WORD) ^ w ^ key1,
            first & _WORD,
        )
        key0, key1 = key0 + 0x9E3779B9 & _WORD, key1 + 0xBB67AE85 & _WORD
    return x, y, z, w
