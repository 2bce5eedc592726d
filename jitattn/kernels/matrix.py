"""Problems of the compile matrix that several kernel families share."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from enum import StrEnum
from typing import Any, Final

from jitattn.kernels.operands import HEAD_DIMS, problem_in_8_bits
from jitattn.spec.enums import BiasKind, Dtype, MaskKind, Numerics, SeqLayout, Staging, Switch
from jitattn.spec.kernel_spec import SWITCHES, Problem
from jitattn.values.gears import resolve_numerics

#: Head dims of real models; together with the largest of each tile row they are the matrix.
MODEL_DIMS: Final = (40, 64, 72, 80, 96, 112, 128, 160, 192, 256)
ALL_DIMS: Final = tuple(range(16, 257, 16))
#: Sequence layouts of q, and of k and v, other than batched.
LAYOUTS: Final = (
    (SeqLayout.RAGGED, SeqLayout.RAGGED),
    (SeqLayout.BATCHED, SeqLayout.PAGED),
    (SeqLayout.RAGGED, SeqLayout.PAGED),
    (SeqLayout.BATCHED, SeqLayout.PAGED16),
)


#: The program of tanh(score + table[head, row - key + number]) * slopes[head], where row >= key.
SLOPES_AND_TABLE: Final = (
    "i32|f16:2,f32:1|score.f32;head.i32;row.i32;key.i32;sub.i32 2 3;number.i32 0;add.i32 4 5;"
    "read.f16 0 1 6;cast.f32 7;add.f32 0 8;tanh.f32 9;read.f32 1 1;mul.f32 10 11;ge.b1 2 3|12|13"
)


def _with_others(*features: dict[str, Any], without: StrEnum | str) -> tuple[dict[str, Any], ...]:
    """Add every mask kind and every optional input that no entry names, each alone.

    Problems of the matrix are causal; `without` is the one that these kernels do not have.
    """
    named = {*(key for one in features for key in one), without}
    masks = {MaskKind.CAUSAL, without, *(one.get("mask") for one in features)}
    switches = ({name: Switch.ON} for name in SWITCHES if name not in named)
    return (*features, *({"mask": kind} for kind in MaskKind if kind not in masks), *switches)


#: Score modifications: each alone, and pairs that occur in models.
FEATURES: Final = _with_others(
    {"mask": MaskKind.WINDOW},
    {"mask": MaskKind.LOCAL_STRIDE},
    {"mask": MaskKind.WINDOW, "sinks": Switch.ON},
    {"mask": MaskKind.WINDOW, "softcap": Switch.ON},
    {"mask": MaskKind.WINDOW, "kv_layout": SeqLayout.PAGED16},
    {"bias": BiasKind.SAME},
    {"bias": BiasKind.FP32},
    {"relative_bias": Switch.ON},
    {"alibi": Switch.ON},
    {"bias": BiasKind.SAME, "bias_staged": Staging.ROW},
    {"bias": BiasKind.SAME, "bias_staged": Staging.MATRIX},
    {"bias": BiasKind.FP32, "bias_staged": Staging.MATRIX},
    {"mask": MaskKind.FULL, "key_padding": Switch.ON},
    {"mask": MaskKind.FULL, "dense": Switch.ON},
    {"dense": Switch.ON, "dense_staged": Staging.MATRIX},
    {"dropout": Switch.ON},
    {"fixed_shift": Switch.ON},
    {"mask": MaskKind.BLOCK_LISTS},
    {"mask": MaskKind.BLOCK_LISTS, "kv_layout": SeqLayout.PAGED},
    {"mask": MaskKind.BLOCK_LISTS, "kv_layout": SeqLayout.PAGED16},
    {"mask": MaskKind.BLOCK_LISTS, "dropout": Switch.ON},
    {"mask": MaskKind.FULL, "function": SLOPES_AND_TABLE},
    {"mask": MaskKind.BLOCK_LISTS, "function": SLOPES_AND_TABLE},
    without=MaskKind.FINE_STRIDE,
)
#: Score modifications of backward kernels.
BACKWARD_FEATURES: Final = _with_others(
    {"mask": MaskKind.WINDOW},
    {"mask": MaskKind.LOCAL_STRIDE},
    {"mask": MaskKind.FINE_STRIDE},
    {"mask": MaskKind.BLOCK_LISTS},
    {"q_layout": SeqLayout.RAGGED, "kv_layout": SeqLayout.RAGGED},
    {"bias": BiasKind.SAME},
    {"bias": BiasKind.FP32},
    {"relative_bias": Switch.ON, "alibi": Switch.ON},
    {"softcap": Switch.ON},
    {"mask": MaskKind.FULL, "key_padding": Switch.ON},
    {"mask": MaskKind.FULL, "dense": Switch.ON},
    {"dropout": Switch.ON},
    {"sinks": Switch.ON},
    {"kv_layout": SeqLayout.PAGED},
    {"mask": MaskKind.FULL, "function": SLOPES_AND_TABLE},
    {"mask": MaskKind.BLOCK_LISTS, "function": SLOPES_AND_TABLE},
    without="fixed_shift",
)
_POSITIONAL: Final = (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.WINDOW, MaskKind.LOCAL_STRIDE)


def problem(
    dtype: Dtype,
    head_dim: int,
    mask: MaskKind = MaskKind.CAUSAL,
    **other: Any,  # noqa: ANN401 - of whatever type the field is
) -> Problem:
    """Build a problem with default numerics; `other` sets further fields."""
    return Problem(
        **{
            "dtype": dtype,
            "out_dtype": dtype,
            "head_dim": head_dim,
            "head_dim_v": head_dim,
            "mask": mask,
            "numerics": resolve_numerics(None, dtype),
            **other,
        }
    )


def problems_in_8_bits(arch: str) -> Iterator[Problem]:
    """Yield the gear-4 problems that have INT8 kernels on `arch`."""
    bf16, fp16 = Dtype.BF16, Dtype.FP16
    asked = [problem(bf16, dim, mask) for dim in HEAD_DIMS for mask in _POSITIONAL]
    asked += [problem(fp16, 128), problem(fp16, 128, head_dim_v=64)]
    in_pages = (SeqLayout.PAGED, SeqLayout.PAGED16)
    for kv_layout, masks in (
        (SeqLayout.RAGGED, (MaskKind.CAUSAL, MaskKind.WINDOW)),
        *((layout, _POSITIONAL) for layout in in_pages),
    ):
        layouts = {"q_layout": SeqLayout.RAGGED, "kv_layout": kv_layout}
        asked += [problem(bf16, dim, mask, **layouts) for dim in HEAD_DIMS for mask in masks]
    for one in asked:
        in_8_bits = problem_in_8_bits(one, arch)
        if in_8_bits is not None:
            yield in_8_bits


def split_fp32_problems() -> Iterator[Problem]:
    """Yield problems with fp32 inputs as fp16 parts, one for each split kernel."""
    for numerics, dim in itertools.product((Numerics.F16X3, Numerics.F16X1), (16, 64, 80, 128)):
        yield problem(Dtype.FP32, dim, numerics=numerics)
    yield problem(Dtype.FP32, 128, head_dim_v=64, numerics=Numerics.F16X3)


def masks_of(asked: Problem) -> Iterator[Problem]:
    """Yield a problem with every positional mask."""
    for mask in _POSITIONAL:
        yield replace(asked, mask=mask)
