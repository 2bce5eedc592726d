"""Arguments of the forward kernels, which backward kernels extend (`bwd_arguments.py`).

Beside the common fields, a kernel's arguments depend on its problem: sequence layouts, score
modifications, block lists, scales of prepared operands.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides, struct_of
from jitattn.spec.call_arguments import BlockListArguments, ScoreArguments, SequenceArguments
from jitattn.spec.enums import MaskKind
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import Problem

#: Parameters of every forward kernel.
FWD: Final = ArgumentStruct(
    "FwdParams",
    (
        Argument("q", "const void*", "[B, Lq, Hq, D]"),
        Argument("k", "const void*", "[B, Lkv, Hkv, D]"),
        Argument("v", "const void*", "[B, Lkv, Hkv, Dv]"),
        Argument("out", "void*", "[B, Lq, Hq, Dv]"),
        Argument("lse", "float*", "[B, Hq, Lq] or, ragged, [Hq, total]; may be null"),
        Argument(
            "partial_out",
            "float*",
            "[num_items, head_tiles, block_q, Dv], contiguous; null: no splits",
        ),
        Argument("partial_lse", "float*", "[num_items, head_tiles, block_q], contiguous"),
        Argument("arrivals", "int32_t*", "[num_items, head_tiles], all 0, and so left behind"),
        *strides("q", "batch", "row", "head"),
        *strides("k", "batch", "row", "head"),
        *strides("v", "batch", "row", "head"),
        *strides("out", "batch", "row", "head"),
        *strides("lse", "batch", "head"),
        Argument("batch", "int32_t"),
        Argument("len_q", "int32_t", "ragged: the largest"),
        Argument("len_kv", "int32_t", "ragged and paged: the largest"),
        Argument("heads_q", "int32_t"),
        Argument("heads_per_kv", "int32_t", "Hq / Hkv"),
        Argument(
            "heads_per_tile",
            "int32_t",
            "query heads packed into the rows of a tile: 1 or heads_per_kv",
        ),
        Argument("num_q_tiles", "int32_t", "ceil(len_q * heads_per_tile / block_q)"),
        Argument(
            "num_splits",
            "int32_t",
            "CTAs that share the keys of one query tile; 0: balanced on the device",
        ),
        Argument("num_slots", "int32_t", "balanced: CTAs that the GPU holds at a time"),
        Argument("diagonal", "int32_t", "causal: query i sees keys <= i + diagonal"),
        Argument(
            "negate_q",
            "int32_t",
            "1 if the scale is negative: q changes sign, the scale does not",
        ),
        Argument(
            "row_div_mul",
            "uint32_t",
            "row / heads_per_tile = (mulhi(row, mul) + row) >> shift",
        ),
        Argument("row_div_shift", "uint32_t"),
        Argument("scale_log2", "float", "|scale| * log2(e), never 0"),
    ),
)

#: Further parameters for sequence layouts, score modifications and block lists, as requests have
#: them.
FWD_SEQ: Final = struct_of("FwdSeqParams", SequenceArguments, base="FwdParams")
FWD_SCORE: Final = struct_of("FwdScoreParams", ScoreArguments, base="FwdSeqParams")
FWD_BLOCK_LIST: Final = struct_of(
    "FwdBlockListParams",
    BlockListArguments,
    Argument("tile_mask", "int32_t", "positions of a query tile, a power of two, less 1"),
    base="FwdScoreParams",
)

#: Further parameters: scales of prepared operands, which are contiguous: INT8 Q and K, or all
#: three as fp16 parts, [B, H, L, parts, D]. Backward kernels have q_scale as
#: d_out_scale.
SCALED: Final = ArgumentStruct(
    "ScaledParams",
    (
        Argument("q_scale", "const float*", "as the LSE"),
        Argument("k_scale", "const float*", "[B, Hkv, ceil(Lkv / 64)]"),
        Argument("v_scale", "const float*", "as k_scale; with Q and K in 8 bits [B, Hkv], or null"),
        *strides("q_scale", "batch", "head"),
    ),
    base="Base",
)

#: Let a traced function's parameters begin and end at multiples of 8 bytes; nothing is in them.
FUNCTION_GAPS: Final = ("function_begin", "function_end")
#: Further parameters for a traced function: none here, those of its program in its kernels.
NO_FUNCTION: Final = ArgumentStruct("FunctionParams", (), base="Base")

FWD_STRUCTS: Final = (FWD, FWD_SEQ, FWD_SCORE, FWD_BLOCK_LIST, NO_FUNCTION, SCALED)
#: Parameter structs of kernels whose operands are not scaled.
FWD_UNSCALED: Final = tuple(ArgumentTable(*FWD_STRUCTS[:count]) for count in (1, 2, 3, 4))
_SCALED: Final = tuple(table.extended(SCALED) for table in FWD_UNSCALED)
#: Every parameter struct of the forward kernels.
FWD_TABLES: Final = (*FWD_UNSCALED, *_SCALED)


def fwd_arguments(problem: Problem) -> ArgumentTable:
    """Return the arguments of the forward kernel of a problem."""
    numerics = problem.numerics
    is_scaled = bool(numerics.is_quantized or numerics.num_parts)
    if problem.function:
        place = 3 if problem.mask is MaskKind.BLOCK_LISTS else 2
        return _with_function(problem.function, place, is_scaled)
    tables = _SCALED if is_scaled else FWD_UNSCALED
    if problem.mask is MaskKind.BLOCK_LISTS:
        return tables[3]
    if problem.has_scores:
        return tables[2]
    return tables[0 if problem.is_uniform else 1]


def fwd_structs(problem: Problem) -> tuple[ArgumentStruct, ...]:
    """Return the structs of the generated header of a problem's kernels."""
    if not problem.function:
        return FWD_STRUCTS
    own = function_struct(problem.function)
    return tuple(own if one is NO_FUNCTION else one for one in FWD_STRUCTS)


@functools.lru_cache(1024)
def function_struct(text: str, *more: Argument) -> ArgumentStruct:
    """Return the parameter struct of a traced function, by the text of its program.

    `more`: further fields, of kernels that need them.
    """
    program = parse(text)
    types = {"i32": "int32_t", "i64": "int64_t", "f32": "float"}
    fields = [Argument(f"number{idx}", types[kind]) for idx, kind in enumerate(program.numbers)]
    for idx in program.divisors():
        fields += [Argument(f"number{idx}_{part}", "uint32_t") for part in ("mul", "shift")]
    for idx, (_, dims) in enumerate(program.tensors):
        fields.append(Argument(f"tensor{idx}", "const void*"))
        fields += [Argument(f"tensor{idx}_stride_{axis}", "int64_t") for axis in range(dims)]
        fields += [Argument(f"tensor{idx}_size_{axis}", "int32_t") for axis in range(dims)]
    fields += more
    # C++ would put the first field of a struct into the gap at the end of its base.
    fields.append(Argument(FUNCTION_GAPS[0], "int64_t"))
    if sum(one.code in "iIf" for one in fields) % 2:
        fields.append(Argument(FUNCTION_GAPS[1], "int32_t"))
    return ArgumentStruct("FunctionParams", tuple(fields), base="Base")


@functools.lru_cache(1024)
def _with_function(text: str, place: int, is_scaled: bool) -> ArgumentTable:
    table = FWD_UNSCALED[place].extended(function_struct(text))
    return table.extended(SCALED) if is_scaled else table
