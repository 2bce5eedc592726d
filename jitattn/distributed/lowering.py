"""Says a piece of a sharded call as arguments of `attention`.

The window is native. Biases by distance become tables of the piece's own distances. Functions see
the positions of the whole sequences, by offsets that they hold: numbers and tensors, so that other
offsets compile nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.errors import InternalError
from jitattn.values.masks import Causal, Full, KeyPadding, MaskMod, Window
from jitattn.values.rule_functions import pattern_of
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

    from jitattn.distributed.options import Options
    from jitattn.distributed.pieces import Piece
    from jitattn.values.masks import Mask


class Launch:
    """Pieces that one call of `attention` computes: one, or several packed sequences' of a window.

    Attributes
    ----------
    pieces : tuple of Piece
    window : (left, right)
    corner : int
        Of the pieces, which share it where biases depend on distances.
    """

    def __init__(self, pieces: tuple[Piece, ...]) -> None:
        self.pieces = pieces
        one = pieces[0]
        self.step, self.corner = one.step, one.corner
        hides_left = any(piece.window[0] is not None for piece in pieces)
        hides_right = any(piece.window[1] is not None for piece in pieces)
        self.window = one.left if hides_left else None, one.right if hides_right else None
        self._made: dict[Any, Any] = {}

    @property
    def longest(self) -> int:
        """Rows and keys of the longest piece."""
        return max(max(piece.num_rows, piece.num_keys) for piece in self.pieces)

    @property
    def has_own_distances(self) -> bool:
        """Whether distances are not those that `attention` counts in these rows and keys."""
        return self.step != 1 or any(one.corner for one in self.pieces)

    def has_functional(self, options: Options) -> bool:
        """Whether slopes are part of the score function: those by sequence, where none fit."""
        slopes = options.alibi_slopes
        if slopes is None or slopes.dim() == 1:
            return False
        return options.is_flat or self.has_own_distances

    def kept(self, name: str, device: torch.device, make: Callable[[], Any]) -> Any:  # noqa: ANN401
        """Return what was made of these pieces for a device before, or make it."""
        key = name, device
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def sequences(self, device: torch.device) -> tuple[Ragged, Ragged]:
        """Return where the packed sequences' rows and keys lie in their blocks."""

        def make() -> tuple[Ragged, Ragged]:
            sides = []
            for start, length in (("row", "num_rows"), ("key", "num_keys")):
                numbers = [[getattr(one, name) for one in self.pieces] for name in (start, length)]
                both = torch.tensor(numbers, dtype=torch.int32, device=device)
                sides.append(Ragged(both[0], both[1], max(numbers[1])))
            return sides[0], sides[1]

        found: tuple[Ragged, Ragged] = self.kept("sequences", device, make)
        return found

    def numbers(self, name: str, device: torch.device) -> Tensor:
        """Return a field of every piece, [pieces], int32."""

        def make() -> Tensor:
            values = [getattr(one, name) for one in self.pieces]
            return torch.tensor(values, dtype=torch.int32, device=device)

        found: Tensor = self.kept(name, device, make)
        return found


def launches_of(pieces: list[Piece], *, is_flat: bool, by_distance: bool) -> tuple[Launch, ...]:
    """Group pieces by what a call needs: packed ones by window, and by distance for biases.

    Pieces of one group are of one pair of segments, so that no row and no key is in two of them.
    """
    if not is_flat:
        return tuple(Launch((one,)) for one in pieces)
    groups: dict[Any, list[Piece]] = {}
    for one in pieces:
        key = (one.pair, one.left, one.right, one.step, one.corner if by_distance else 0)
        groups.setdefault(key, []).append(one)
    return tuple(Launch(tuple(group)) for group in groups.values())


def arguments_of(launch: Launch, options: Options, device: torch.device) -> dict[str, Any]:
    """Return the keyword arguments of `attention` for a launch."""
    given: dict[str, Any] = {
        "mask": _mask_of(launch, options, device),
        "scale": options.scale,
        "gear": options.gear,
        "softcap": options.softcap,
        "qk_norm": options.qk_norm,
        "num_splits": options.num_splits,
        "tile_rows": options.tile_rows,
        "deterministic": options.deterministic,
        "score_mod": _score_of(launch, options, device),
    }
    given |= tables_of(launch, options)
    if options.is_flat:
        given["q_seqs"], given["kv_seqs"] = launch.sequences(device)
    return {name: value for name, value in given.items() if value is not None}


def tables_of(launch: Launch, options: Options) -> dict[str, Tensor]:
    """Return the biases of a launch that depend on the distance, as arguments; differentiable."""
    bias, slopes = options.relative_bias, options.alibi_slopes
    given = {"relative_bias": bias, "alibi_slopes": slopes}
    if not launch.has_own_distances:  # slopes by sequence are of those that take part
        if launch.has_functional(options):
            del given["alibi_slopes"]
        return {name: one for name, one in given.items() if one is not None}
    if bias is None and (slopes is None or slopes.dim() != 1):
        return {}
    return {"relative_bias": _table_of(launch, bias, slopes)}


def _table_of(launch: Launch, bias: Tensor | None, slopes: Tensor | None) -> Tensor:
    """Return the biases by distance of a launch, [Hq or 1, 2 X + 1]; differentiable.

    The entry of the distance x that `attention` counts is that of step * x + corner.
    """
    reach = max(launch.longest - 1, 0)
    step, corner = launch.step, launch.corner
    first, last = -step * reach + corner, step * reach + corner
    found: Tensor | None = None
    if bias is not None:
        wide = bias.to(torch.promote_types(bias.dtype, torch.float32))
        own = bias.shape[1] // 2
        before, after = max(0, -own - first), max(0, last - own)
        rows = wide.shape[0]
        parts = (wide[:, :1].expand(rows, before), wide, wide[:, -1:].expand(rows, after))
        begin = first + own + before
        found = torch.cat(parts, dim=1)[:, begin : begin + last - first + 1 : step]
    if slopes is not None and slopes.dim() == 1:
        wide = slopes.to(torch.promote_types(slopes.dtype, torch.float32))
        distance = torch.arange(first, last + 1, step, device=slopes.device).abs()
        of_slopes = -wide[:, None] * distance.to(wide.dtype)
        found = of_slopes if found is None else found + of_slopes
    if found is None:
        raise InternalError("no bias depends on distances")
    return found.contiguous()


def _mask_of(launch: Launch, options: Options, device: torch.device) -> Mask:
    left, right = launch.window
    mask: Any = Full()
    if left is None and right == 0:
        mask = Causal()
    elif left is not None or right is not None:
        mask = Window(left, right, launch.pieces[0].keep_first)
    if options.key_padding is not None:
        piece = launch.pieces[0]
        stop = piece.kv_idx + (piece.num_keys - 1) * piece.step + 1
        mask = mask & KeyPadding(
            options.key_padding.keep[:, piece.kv_idx : stop : piece.step].contiguous()
        )
    pattern = pattern_of(options.rule, options.heads, device)
    if pattern is not None:
        mask = mask & _moved_pattern(pattern, launch, options, device)
    if options.function is not None:
        mask = mask & _moved_mask(options.function, launch, options, device)
    if options.kept is not None:
        by_rows = options._replace(q_offset=None)
        mask = mask & _moved_mask(options.kept, launch, by_rows, device)
    return mask  # type: ignore[no-any-return]


def _moved_pattern(
    pattern: Callable[..., Any], launch: Launch, options: Options, device: torch.device
) -> MaskMod:
    shift = options.bounds.shift
    first_head, step = options.first_head, launch.step
    if not options.is_flat:
        piece = launch.pieces[0]
        span = options.spans[piece.sequence]
        shift = span.kv_length - span.q_length if shift is None else shift
        position, key, is_decode = piece.q_idx + shift, piece.kv_idx, span.q_length == 1
        return MaskMod(
            lambda b, h, q_idx, kv_idx: pattern(
                h + first_head, q_idx * step + position, kv_idx * step + key, is_decode
            )
        )

    def make() -> tuple[Tensor, Tensor]:
        spans = [options.spans[one.sequence] for one in launch.pieces]
        moved = [one.kv_length - one.q_length if shift is None else shift for one in spans]
        starts = [one.q_idx + own for one, own in zip(launch.pieces, moved, strict=True)]
        are_single = [one.q_length == 1 for one in spans]
        return (
            torch.tensor(starts, dtype=torch.int32, device=device),
            torch.tensor(are_single, dtype=torch.bool, device=device),
        )

    positions, decodes = launch.kept(f"positions {shift}", device, make)
    keys = launch.numbers("kv_idx", device)
    return MaskMod(
        lambda b, h, q_idx, kv_idx: pattern(
            h + first_head, q_idx * step + positions[b], kv_idx * step + keys[b], decodes[b]
        )
    )


def _moved_mask(mask: MaskMod, launch: Launch, options: Options, device: torch.device) -> MaskMod:
    """Return a mask function of a piece's rows and keys."""
    kind, parts = mask.parts
    if kind:
        return _combined(kind, [_moved_mask(one, launch, options, device) for one in parts])
    has_own = not (type(mask.q_offset) is int and mask.q_offset == 0)
    offset = mask.q_offset if has_own else options.q_offset
    at = _places(offset, launch, options, device)
    function = mask.function

    def visible(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        return function(*at(b, h, q_idx, kv_idx))

    return MaskMod(visible)


def _score_of(launch: Launch, options: Options, device: torch.device) -> Callable[..., Any] | None:
    """Return the score function of a piece's rows and keys, with slopes that differ by batch."""
    function, slopes = options.score_mod, options.alibi_slopes
    own_slopes = slopes if launch.has_functional(options) else None
    if function is None and own_slopes is None:
        return None
    at = _places(options.q_offset, launch, options, device)
    step, corner, piece = launch.step, launch.corner, launch.pieces[0]
    # The distance of (0, 0): the corner is that of the last row and key.
    origin = corner - step * (piece.num_keys - piece.num_rows)
    if own_slopes is None:

        def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
            return function(s, *at(b, h, q_idx, kv_idx))  # type: ignore[misc]

        return score
    sequence = launch.numbers("sequence", device) if options.is_flat else None
    origins = None
    if options.is_flat:

        def make() -> Tensor:
            each = [one.corner - step * (one.num_keys - one.num_rows) for one in launch.pieces]
            return torch.tensor(each, dtype=torch.int32, device=device)

        origins = launch.kept("origins", device, make)

    def with_slopes(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401
        start = origin if origins is None else origins[b]
        own = b if sequence is None else sequence[b]
        s = s - own_slopes[own, h] * ((kv_idx - q_idx) * step + start).abs()
        return s if function is None else function(s, *at(b, h, q_idx, kv_idx))

    return with_slopes


def mask_of_heads(mask: MaskMod, first_head: int) -> MaskMod:
    """Return a mask function for query heads from one on."""
    kind, parts = mask.parts
    if kind:
        return _combined(kind, [mask_of_heads(one, first_head) for one in parts])
    if first_head == 0:
        return mask
    function = mask.function
    return MaskMod(
        lambda b, h, q_idx, kv_idx: function(b, h + first_head, q_idx, kv_idx), mask.q_offset
    )


def score_of_heads(
    function: Callable[..., Any] | None, first_head: int
) -> Callable[..., Any] | None:
    """Return a score function for query heads from one on."""
    if function is None or first_head == 0:
        return function
    return lambda s, b, h, q_idx, kv_idx: function(s, b, h + first_head, q_idx, kv_idx)


def _combined(kind: str, parts: list[MaskMod]) -> MaskMod:
    """Combine mask functions again as `MaskMod.parts` says."""
    if kind == "not":
        return ~parts[0]
    return parts[0].both(parts[1]) if kind == "and" else parts[0] | parts[1]


def _places(
    offset: Any,  # noqa: ANN401 - a QOffset
    launch: Launch,
    options: Options,
    device: torch.device,
) -> Callable[..., Any]:
    """Return a function from a piece's (b, h, q_idx, kv_idx) to those of the whole call."""
    first_head, step = options.first_head, launch.step
    by_batch = offset if isinstance(offset, torch.Tensor) else None
    number = offset if type(offset) is int else 0
    if not options.is_flat:
        piece = launch.pieces[0]
        span = options.spans[piece.sequence]
        if offset == "bottom_right":
            number = span.kv_length - span.q_length
        row, key = piece.q_idx + number, piece.kv_idx

        def dense(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
            q_idx = q_idx * step + row
            q_idx = q_idx if by_batch is None else q_idx + by_batch[b]
            return b, h + first_head, q_idx, kv_idx * step + key

        return dense
    is_corner = isinstance(offset, str)

    def make() -> Tensor:
        spans = [options.spans[one.sequence] for one in launch.pieces]
        moved = [one.kv_length - one.q_length if is_corner else number for one in spans]
        starts = [one.q_idx + own for one, own in zip(launch.pieces, moved, strict=True)]
        return torch.tensor(starts, dtype=torch.int32, device=device)

    rows = launch.kept(f"rows {is_corner} {number}", device, make)
    keys, sequence = launch.numbers("kv_idx", device), launch.numbers("sequence", device)

    def packed(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:  # noqa: ANN401 - symbols
        own = sequence[b]
        q_idx = q_idx * step + rows[b]
        q_idx = q_idx if by_batch is None else q_idx + by_batch[own]
        return own, h + first_head, q_idx, kv_idx * step + keys[b]

    return packed
