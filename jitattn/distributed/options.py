"""What a context-parallel call asks for, apart from q, k, v and who takes part."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.distributed.pieces import Span
from jitattn.distributed.rules import bounds_of
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values.function_cache import function_of
from jitattn.values.mask_functions import check_q_offset
from jitattn.values.masks import Causal, Full, Window, is_mask, parts_of
from jitattn.values.rule_functions import Heads
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.distributed.pieces import Bounds
    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import KeyPadding, Mask, MaskMod, Rule
    from jitattn.values.norm import L2Norm
    from jitattn.values.sequences import KvSequences, QSequences

#: Numbers of Python are read from the index tensors of this many `Ragged` values.
_MOST_READ: Final = 256


class Options(NamedTuple):
    """Keyword arguments of a call, checked, for these query heads."""

    rule: Rule
    key_padding: KeyPadding | None
    function: MaskMod | None
    scale: float | None
    gear: int | None
    softcap: float | None
    relative_bias: Tensor | None
    alibi_slopes: Tensor | None
    sinks: Tensor | None
    score_mod: Callable[..., Any] | None
    q_offset: QOffset | None
    kept: MaskMod | None  #: the pairs that dropout keeps, by rows and keys of the whole
    qk_norm: L2Norm | None
    deterministic: bool
    num_splits: int | None
    tile_rows: int | None
    heads: Heads  #: of the whole call
    spans: tuple[Span, ...]  #: sequences among all positions
    is_flat: bool  #: they are packed
    q_seqs: QSequences  #: as they were given
    kv_seqs: KvSequences
    first_head: int = 0  #: number of the first query head that takes part here
    first_kv: int = 0
    local_kv: int | None = None  #: number of kv heads here; None: all
    is_regular: bool = True  #: query heads read kv heads as GQA counts them

    @property
    def bounds(self) -> Bounds:
        """Bounds of the distances that the mask lets be seen."""
        return bounds_of(self.rule, self.shift)._replace(bias_shift=self.shift)

    @property
    def shift(self) -> int | None:
        """Position of query 0 among the keys, if the call says so for all sequences."""
        return self.q_offset if isinstance(self.q_offset, int) else None

    @property
    def follows_order(self) -> bool:
        """Whether positions decide by their distance and order alone: no function, no bias."""
        more = (self.key_padding, self.function, self.kept, self.score_mod)
        if self.depends_on_distance or self.is_flat or any(one is not None for one in more):
            return False
        return isinstance(self.rule, Full | Causal | Window)

    @property
    def captured(self) -> tuple[Tensor, ...]:
        """Floating tensors that the score function reads and that need gradients."""
        if self.score_mod is None:
            return ()
        return tuple(one for one in function_of(self.score_mod, None).tensors if one.requires_grad)

    @property
    def depends_on_distance(self) -> bool:
        """Whether biases take part that depend on the distance."""
        return self.relative_bias is not None or self.alibi_slopes is not None

    def of_heads(
        self, first: int, count: int, first_kv: int, local_kv: int, is_regular: bool
    ) -> Options:
        """Return the options for a range of query heads, and the kv heads beside it."""
        own = slice(first, first + count)
        bias, slopes, sinks = self.relative_bias, self.alibi_slopes, self.sinks
        return self._replace(
            relative_bias=bias if bias is None or len(bias) == 1 else bias[own],
            alibi_slopes=None if slopes is None else slopes[..., own],
            sinks=None if sinks is None else sinks[own],
            first_head=first,
            first_kv=first_kv,
            local_kv=local_kv,
            is_regular=is_regular,
        )


def split_mask(mask: Mask) -> tuple[Rule, KeyPadding | None, MaskMod | None]:
    """Return the parts of a mask.

    Raises
    ------
    InvalidInputError, UnsupportedError
        It is no mask, or has a part that cannot be sharded.
    """
    if not is_mask(mask):
        raise InvalidInputError(
            f"mask is a {type(mask).__name__}: it must be one of jitattn's masks, as Full() or "
            "Causal()"
        )
    parts = parts_of(mask)
    if parts.dense is not None:
        raise UnsupportedError(
            "mask has a Dense matrix: a rank would need rows of all ranks' positions; say it as a "
            "MaskMod, a BlockSparse or KeyPadding"
        )
    return parts.rule, parts.key_padding, parts.function


def check_offset(q_offset: Any, rule: Rule, is_flat: bool) -> None:  # noqa: ANN401 - checked here
    """Refuse an offset of queries that has no meaning here."""
    if q_offset is None:
        return
    check_q_offset("q_offset", q_offset)
    if isinstance(q_offset, torch.Tensor) and not isinstance(rule, Full):
        raise UnsupportedError(
            "q_offset is a tensor: across ranks it moves functions only (score_mod, MaskMod); "
            "pass an int, or write the rule as a MaskMod"
        )
    if isinstance(q_offset, int) and is_flat and not isinstance(rule, Full):
        raise UnsupportedError(
            f"q_offset={q_offset} with packed sequences: each has its own; leave it out"
        )


@functools.lru_cache(_MOST_READ)
def packed_spans(q_seqs: object, kv_seqs: object, total: tuple[int, int]) -> tuple[Span, ...]:
    """Return where packed sequences lie.

    Raises
    ------
    InvalidInputError, UnsupportedError
        They are not two `Ragged` of as many sequences, in ascending order, in the global rows.
    """
    for name, seqs in (("q_seqs", q_seqs), ("kv_seqs", kv_seqs)):
        if not isinstance(seqs, Ragged):
            raise UnsupportedError(
                f"{name} is {type(seqs).__name__}: across ranks sequences are packed (a Ragged for "
                "q_seqs and for kv_seqs, the same on every rank) or batched; for padding pass "
                "mask & KeyPadding(keep)"
            )
    sides = []
    for name, seqs, rows in (("q_seqs", q_seqs, total[0]), ("kv_seqs", kv_seqs, total[1])):
        sides.append(numbers_of(seqs))
        end = 0
        for start, length in sides[-1]:
            if length < 0 or (length and start < end) or start + length > rows:
                raise InvalidInputError(
                    f"{name} has a sequence of rows {start} to {start + length - 1}: across ranks "
                    f"they must be ascending, apart, and within the {rows} rows of all ranks"
                )
            end = start + length if length else end
    if len(sides[0]) != len(sides[1]):
        raise InvalidInputError(
            f"q_seqs has {len(sides[0])} sequences and kv_seqs {len(sides[1])}: they must match"
        )
    return tuple(Span(*q, *kv) for q, kv in zip(*sides, strict=True))


@functools.lru_cache(_MOST_READ)
def numbers_of(seqs: Ragged) -> list[tuple[int, int]]:
    """Read (start, length) of every sequence; waits for the device once for each value."""
    lengths = seqs.length.tolist()
    start = seqs.start
    starts = [0] * len(lengths) if start is None else start.tolist()
    return list(zip(starts, lengths, strict=True))
