"""Plans a rotary embedding: one launch, whose grid follows from columns, rows and heads."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

from jitattn.errors import UnsupportedError
from jitattn.jit.launch import MAX_GRID
from jitattn.plan import arguments
from jitattn.plan.step import Place, Plan, Step
from jitattn.spec.enums import Access

if TYPE_CHECKING:
    from jitattn.kernels.rotary import RotarySpec

#: Strides in elements, of (batch, row, head, column).
RowStrides: TypeAlias = tuple[int, int, int, int]
#: Heads of a row that a thread rotates in sequence, if enough threads per SM remain.
_HEADS_PER_THREAD: Final = 4
_THREADS_PER_SM: Final = 4096


class RotaryFacts(NamedTuple):
    """Tensor facts of a rotary embedding."""

    shape: tuple[int, ...]
    x_strides: RowStrides
    out_strides: RowStrides
    table_shape: tuple[int, int]  #: (rows, half of the rotated columns)
    table_strides: tuple[int, int]  #: between the rows of cos and of sin
    num_sequences: int | None  #: of a ragged x; None: every sequence is a row of the batch
    offset_word: int  #: 4-byte words of an index, 0: one offset for all, bound at run time
    cu_word: int  #: 4-byte words of a cumulative length, 0: none
    in_place: bool
    back: bool


def rotate(spec: RotarySpec, facts: RotaryFacts, num_sms: int) -> Plan:
    """Plan a rotary embedding.

    Raises
    ------
    UnsupportedError
        It needs more CTAs than a grid has.
    """
    shape, (table_rows, half) = facts.shape, facts.table_shape
    is_ragged = facts.num_sequences is not None
    batch, length = (1, shape[0]) if is_ragged else shape[:2]
    heads, head_dim = shape[-2:]
    unit = 16 // spec.dtype.bytes if spec.access is Access.VEC16 else 1
    units_per_row = half // unit
    if not facts.in_place:
        units_per_row += -(-(head_dim - 2 * half) // (2 * unit))
    per_head = batch * length * units_per_row
    groups = -(-heads // _HEADS_PER_THREAD)
    if per_head * groups < num_sms * _THREADS_PER_SM:
        groups = heads
    num_ctas = -(-per_head * groups // spec.num_threads)
    if num_ctas > MAX_GRID:
        raise UnsupportedError(
            f"x has shape {list(shape)}, which takes {num_ctas} CTAs: a grid has at most "
            "2**31 - 1; split the batch"
        )
    if not num_ctas:
        return Plan((), {})
    numbers: dict[str, float] = {
        **arguments.strides("x", facts.x_strides[:3]),
        **arguments.strides("out", facts.out_strides[:3]),
        "x_stride_column": facts.x_strides[3],
        "out_stride_column": facts.out_strides[3],
        "cos_stride": facts.table_strides[0],
        "sin_stride": facts.table_strides[1],
        "num_rows": batch * length,
        "batch": batch if facts.num_sequences is None else facts.num_sequences,
        "len": length,
        "heads": heads,
        "head_dim": head_dim,
        "rotary_dim": 2 * half,
        "table_rows": table_rows,
        "offset_word": facts.offset_word or 1,
        "cu_word": facts.cu_word or 1,
        "units_per_row": units_per_row,
        "head_groups": groups,
        "in_place": facts.in_place,
        "sign": -1.0 if facts.back else 1.0,
    }
    places = {name: Place(name) for name in ("x", "out", "cos", "sin", "offset")}
    optional = {
        "offsets": Place("offsets") if facts.offset_word else None,
        "cu_seqlens": Place("cu_seqlens") if facts.cu_word else None,
    }
    arguments.add_optional(optional, numbers, places)
    return Plan((Step(spec, num_ctas, numbers, places),), {})
