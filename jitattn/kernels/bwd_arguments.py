"""Arguments of the backward kernels, which extend the forward kernel's (`fwd_arguments.py`)."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

from jitattn.kernels.fwd_arguments import FWD_TABLES, SCALED, fwd_arguments, fwd_structs
from jitattn.spec.arguments import Argument, ArgumentStruct, ArgumentTable, strides

if TYPE_CHECKING:
    from jitattn.spec.kernel_spec import Problem

#: Backward parameters beside those of the forward kernel, except `out`, `lse` and splits.
BWD: Final = ArgumentStruct(
    "BwdParams",
    (
        Argument("d_out", "const void*", "[B, Lq, Hq, Dv], dtype of q"),
        Argument(
            "lse_log2",
            "const float*",
            "[B, Hq, Lq] or, ragged, [Hq, total]: log2(e) LSE; +inf for blind rows",
        ),
        Argument("delta", "const float*", "likewise: rowsum(dO * O) - dLSE"),
        Argument(
            "sink_rest",
            "const float*",
            "likewise: part of the weights that a sink leaves to the keys",
        ),
        Argument(
            "d_out_scale",
            "const float*",
            "[2]: by which dO and delta are scaled, and its inverse; null: 1",
        ),
        Argument(
            "dq_sum",
            "float*",
            "dQ / scale, zeroed; in fragment order, or as q. bwd/sm80/scores.cuh: the gradient of "
            "the bias; or, zeroed, [2, B, Hq, Lq + Lkv]",
        ),
        Argument("dk", "void*", "[B, Lkv, Hkv, D]; in parts: fp32, and unscaled"),
        Argument("dv", "void*", "[B, Lkv, Hkv, Dv]; likewise"),
        Argument(
            "dq_semaphore",
            "int32_t*",
            "[B, Hq, num_q_tiles], zeroed: key blocks that have added; null: any",
        ),
        *strides("d_out", "batch", "row", "head"),
        *strides("dk", "batch", "row", "head"),
        *strides("dv", "batch", "row", "head"),
        *strides("dk", "split"),
        *strides("dv", "split"),
        Argument(
            "dq_stride_batch",
            "int64_t",
            "of dq_sum as q; in fragment order, of batch and head",
        ),
        *strides("dq", "row", "head"),
        Argument("stat_stride_batch", "int64_t", "of lse_log2 and delta"),
        *strides("stat", "head"),
        Argument("num_kv_tiles", "int32_t", "of the longest sequence"),
        Argument("num_q_splits", "int32_t", "CTAs that share the query tiles of a key block"),
        Argument(
            "in_parts",
            "int32_t",
            "dk and dv are fp32 parts of splits and sequences: 1 written, 2 added to",
        ),
        Argument("first_q_tile", "int32_t", "of this launch"),
        Argument("end_q_tile", "int32_t"),
        Argument("scale", "float", "|scale|"),
        Argument(
            "target_batch",
            "int32_t",
            "bwd/sm80/scores.cuh: batches and heads of the gradient, 1 or B and 1 or Hq",
        ),
        Argument("target_heads", "int32_t"),
    ),
    base="Base",
)

#: Further parameters for operands split into fp16 parts.
BWD_SCALED: Final = ArgumentStruct(
    "BwdScaledParams",
    (Argument("d_out_part_scale", "const float*", "[B, Hq, ceil(Lq / 64)], contiguous"),),
    base="BwdParams<Base>",
)


@functools.lru_cache(1024)
def _extended(forward: ArgumentTable) -> ArgumentTable:
    if SCALED in forward.structs:
        return forward.extended(BWD, BWD_SCALED)
    return forward.extended(BWD)


#: Every parameter struct of the backward kernels, but those of traced functions.
BWD_TABLES: Final = tuple(map(_extended, FWD_TABLES))


def bwd_structs(problem: Problem) -> tuple[ArgumentStruct, ...]:
    """Return the structs of the generated header of a problem's kernels."""
    return (*fwd_structs(problem), BWD, BWD_SCALED)


def bwd_arguments(problem: Problem) -> ArgumentTable:
    """Return the backward-kernel arguments of a problem."""
    return _extended(fwd_arguments(problem))
