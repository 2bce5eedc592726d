"""Validates the arguments of a call → `Problem` (compile-time facts) + `Runtime` (run-time facts).

The one validation of the CPU and the GPU path. It may run on every call, so the usual call costs
plain comparisons only: messages are built on failure, and `Problem`s are cached, keyed by the few
facts that they follow from (a closed, small set: dtypes, head dims, mask kind, gear and
the alignment class; never lengths, counts or strides).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final, NamedTuple, NoReturn, TypeAlias

import torch

from jitattn.errors import (
    InternalError,
    InvalidInputError,
    UnsupportedError,
)
from jitattn.jit.device import device
from jitattn.request.scores import NO_CHANGES
from jitattn.spec.enums import TILE_ROWS, Access, Dtype, SeqLayout
from jitattn.spec.kernel_spec import Problem
from jitattn.values.gears import get_default_gear, resolve_numerics
from jitattn.values.given import integer, real
from jitattn.values.masks import is_mask
from jitattn.values.tensors import (
    CPU_DTYPES,
    DTYPES,
    MAX_HEAD_DIM,
    refuse_nested,
    short,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from jitattn.request.scores import Scores
    from jitattn.spec.call_arguments import ScoreArguments, SequenceArguments
    from jitattn.values.masks import Mask, Rule
    from jitattn.values.sequences import KvSequences, QSequences

#: Strides in elements, (batch, row, head); 0 for a dimension of size 0 or 1.
Strides: TypeAlias = tuple[int, int, int]

MAX_SPLITS: Final = 256
_FP64: Final = torch.float64
#: Rows, keys and heads are counted in 32 bits.
_MAX_COUNT: Final = 2**31 - 1
#: |scale| · log2(e) is passed as fp32.
_MAX_SCALE: Final = 3.4e38 / math.log2(math.e)

#: The gear, None for the dtype's own, and whether the GPU is faster with fp16 accumulators.
Setting: TypeAlias = tuple[int | None, bool]
_problems: dict[tuple[object, ...], Problem] = {}
_MOST_PROBLEMS: Final = 4096


class Call(NamedTuple):
    """The keyword arguments of `attention`, unchecked."""

    mask: Mask
    scale: float | None
    layout: str
    gear: int | None
    out: Tensor | None
    out_dtype: torch.dtype | None
    num_splits: int | None
    return_lse: bool
    q_seqs: QSequences
    kv_seqs: KvSequences
    scores: Scores = NO_CHANGES
    deterministic: bool = False
    tile_rows: int | None = None


class Indices(NamedTuple):
    """The location of each sequence in a batch that is not uniform."""

    arguments: SequenceArguments
    is_flat: bool  #: q is [total, Hq, D], and so out; LSE is [Hq, total]

    @property
    def q_rows_in_all(self) -> int | None:
        """Return an upper bound on the query rows of all sequences; None if they may share rows."""
        found = self.arguments
        return found.q_rows if self.is_flat and not found.q_span_kind else None


class Runtime(NamedTuple):
    """The run-time facts of a call: sizes, strides and numbers.

    Strides are in elements, as (batch, row, head), whatever the layout was.
    """

    batch: int
    len_q: int
    len_kv: int
    heads_q: int
    heads_kv: int  #: 0 only with heads_q == 0
    q_strides: Strides
    k_strides: Strides
    v_strides: Strides
    scale: float  #: finite, any sign
    diagonal: int  #: causal, window: query i sees the keys <= i + diagonal; 0 for Full
    indices: Indices | None = None  #: None: every sequence fills its row of the batch
    scores: ScoreArguments | None = None  #: score modifications; None: the scale only
    listed: Rule | None = None  #: the rule of the block lists
    heads_agree: bool = True  #: the query heads of a kv head share its lists
    q_is_flat: bool = False  #: q is [total, Hq, D]
    k_is_flat: bool = False  #: k and v are [total, Hkv, D]
    rows_are_apart: bool = True  #: no row belongs to two sequences; pages aside
    shares_rows: bool = False  #: sequences may share rows of k and v: pages, or rows by index
    table_width: int = 1  #: entries of a row of the block table
    function: tuple[tuple[str, float], ...] | None = None  #: arguments of a traced function


def is_deterministic(call: Call) -> bool:
    """Return whether dq must be bitwise reproducible, by the call or by torch's global switch."""
    return call.deterministic or torch.are_deterministic_algorithms_enabled()


def axes(layout: str) -> tuple[int, int]:
    """Return the row and head dimensions of a batched tensor."""
    if layout == "bshd":
        return 1, 2
    if layout == "bhsd":
        return 2, 1
    raise InvalidInputError(
        f"layout={layout!r}: the layout is 'bshd' ([B, L, H, D]) or 'bhsd' ([B, H, L, D])"
    )


def check_batched(q: Tensor, k: Tensor, v: Tensor, layout: str) -> None:
    """Check that the shapes of a uniform batch agree."""
    row, head = axes(layout)
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    if not len(shape_q) == len(shape_k) == len(shape_v) == 4:
        raise InvalidInputError(
            f"q, k and v must have 4 dimensions each, batch first and head_dim last "
            f"({shapes(q, k, v)}); add a batch with .unsqueeze(0), or say where the sequences lie "
            "with q_seqs and kv_seqs"
        )
    if (
        shape_k[0] != shape_q[0]
        or shape_k[3] != shape_q[3]
        or shape_v[0] != shape_q[0]
        or shape_v[row] != shape_k[row]
        or shape_v[head] != shape_k[head]
    ):
        _refuse_shapes(q, k, v, row, head)


def check_alike(q: Tensor, k: Tensor, v: Tensor) -> tuple[torch.Size, torch.Size, torch.Size]:
    """Check that types, dtypes and devices of the inputs agree; return their shapes."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor):
            raise InvalidInputError(
                f"{name} is a {type(tensor).__name__}: q, k and v must be torch tensors"
            )
    dtype, device = q.dtype, q.device
    if not k.dtype == v.dtype == dtype:
        raise InvalidInputError(
            f"q is {short(dtype)}, k is {short(k.dtype)} and v is {short(v.dtype)}: "
            "they must have one dtype; cast them with .to()"
        )
    if not k.device == v.device == device:
        raise InvalidInputError(
            f"q is on {device}, k is on {k.device} and v is on {v.device}: "
            "they must be on one device; move them with .to()"
        )
    if not (q.is_cuda or q.is_cpu or q.is_meta):
        raise UnsupportedError(
            f"q is on {device}: attention runs on CUDA and CPU tensors; move q, k and v with .to()"
        )
    if dtype is _FP64 and q.is_cuda:
        raise UnsupportedError(
            f"q is float64 on {device}: kernels take {', '.join(map(short, DTYPES))}; cast q, k "
            "and v with .to(), or move them to the CPU, whose path computes in fp64"
        )
    try:
        return q.shape, k.shape, v.shape
    except RuntimeError:  # a nested tensor has none
        refuse_nested((("q", q), ("k", k), ("v", v)))
        raise


def check_counts(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    batch: int,
    len_q: int,
    len_kv: int,
    heads_q: int,
    heads_kv: int,
) -> None:
    """Check that head counts are compatible, and that all counts fit 32 bits."""
    if (heads_q % heads_kv if heads_kv else heads_q) != 0:
        raise InvalidInputError(
            f"q has {heads_q} heads but k and v have {heads_kv}: the heads of q must be a multiple "
            f"of those of k and v ({shapes(q, k, v)}); check the layout argument"
        )
    rows = len_q * (heads_q // heads_kv) if heads_kv else len_q
    if rows > _MAX_COUNT or len_kv > _MAX_COUNT or batch * heads_q > _MAX_COUNT:
        raise InvalidInputError(
            f"len_q * (heads_q / heads_kv) is {rows}, len_kv is {len_kv} and batch * heads_q is "
            f"{batch * heads_q}: each must be below 2**31; split the call"
        )


def check_mask(mask: Mask) -> None:
    """Refuse a value that is no mask."""
    if not is_mask(mask):
        raise _no_mask(mask)


def _no_mask(mask: object) -> InvalidInputError:
    kind = type(mask)
    if isinstance(mask, torch.Tensor):
        hint = "wrap a tensor in KeyPadding(...) or Dense(...)"
    elif isinstance(mask, bool):
        hint = "for is_causal=True pass Causal(), else leave mask out"
    elif isinstance(mask, type):
        hint = "the mask is a value, not a class: write Full() or Causal()"
    elif mask is None:
        hint = "leave mask out to let every query see every key"
    else:
        hint = "see jitattn.values.masks"
    return InvalidInputError(
        f"mask is a {kind.__name__}: it must be one of jitattn's masks, as Full() or Causal(); "
        f"{hint}"
    )


def check_options(
    q: Tensor,
    gear: int | None,
    out_dtype: torch.dtype | None,
    num_splits: int | None,
    return_lse: bool,
    tile_rows: int | None,
) -> None:
    """Check scalar options. Types come first: 2.0 and True equal 2 and 1 as dictionary keys."""
    if gear is not None and type(gear) is not int:
        resolve_numerics(gear, DTYPES.get(q.dtype, Dtype.FP16))  # raises if unsupported
    if out_dtype is not None and not isinstance(out_dtype, torch.dtype):
        raise InvalidInputError(
            f"out_dtype={out_dtype!r}: it must be the dtype of q or torch.float32, as a torch.dtype"
        )
    if num_splits is not None and not 1 <= (integer(num_splits) or 0) <= MAX_SPLITS:
        raise InvalidInputError(
            f"num_splits={num_splits!r}: it must be an int from 1 to {MAX_SPLITS}; "
            "leave it out to have it chosen"
        )
    if type(return_lse) is not bool:
        raise InvalidInputError(f"return_lse={return_lse!r}: it must be True or False")
    if tile_rows is not None and integer(tile_rows) not in TILE_ROWS:
        raise InvalidInputError(
            f"tile_rows={tile_rows!r}: it must be one of {', '.join(map(str, TILE_ROWS))}; "
            "leave it out to have it chosen"
        )


def checked_scale(scale: float) -> float:
    """Return the scale as a float; refuse values that are no numbers."""
    number = real(scale)
    if number is not None and -_MAX_SCALE < number < _MAX_SCALE:
        return number
    what = "a tensor" if isinstance(scale, torch.Tensor) else repr(scale)
    raise InvalidInputError(
        f"scale={what}: it must be a number that is finite in fp32 (negative and 0 are fine); "
        "pass a float, or leave it out for 1/sqrt(head_dim)"
    )


def setting_of(gear: int | None, q: Tensor) -> Setting:
    """Return the setting that selects the numerics of a dtype."""
    if gear is None:
        gear = get_default_gear()
    if gear is None or gear < 3:  # independent of the GPU
        return gear, False
    return gear, q.is_cuda and device(q.get_device()).has_fast_fp16_acc


def problem_of(facts: tuple[Any, ...], fields: Mapping[str, str]) -> Problem:
    """Return the interned `Problem` of these facts, and of the fields that scores decide."""
    key = (*facts, *fields.values())
    problem = _problems.get(key)
    if problem is None:
        if len(_problems) >= _MOST_PROBLEMS:  # of traced functions there is no end
            _problems.clear()
        problem = _problems[key] = _new_problem(*facts, fields=fields)
    return problem


def _new_problem(
    dtype: torch.dtype,
    out_dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    setting: Setting,
    aligned: bool,
    q_layout: SeqLayout,
    kv_layout: SeqLayout,
    *,
    fields: Mapping[str, Any],
) -> Problem:
    """Run the checks that depend on these facts alone, and build the `Problem`."""
    if dtype not in CPU_DTYPES:
        raise UnsupportedError(
            f"q is {short(dtype)}: attention takes {', '.join(map(short, CPU_DTYPES))} (which is "
            "for the CPU); cast q, k and v with .to()"
        )
    if out_dtype not in (dtype, torch.float32):
        raise UnsupportedError(
            f"out_dtype={out_dtype}: the result has the dtype of q ({short(dtype)}) or float32; "
            "cast it afterwards"
        )
    for name, dim in (("head_dim", head_dim), ("head_dim of v", head_dim_v)):
        if not 1 <= dim <= MAX_HEAD_DIM:
            raise UnsupportedError(
                f"{name} is {dim}: it must be from 1 to {MAX_HEAD_DIM}; "
                "check the layout, or split the heads"
            )
    # fp64 runs on the CPU only, without a kernel: its gears are those of fp32.
    kind, out_kind = (DTYPES.get(one, Dtype.FP32) for one in (dtype, out_dtype))
    return Problem(
        dtype=kind,
        out_dtype=out_kind,
        head_dim=head_dim,
        head_dim_v=head_dim_v,
        numerics=resolve_numerics(setting[0], kind, has_fast_fp16_acc=setting[1]),
        q_layout=q_layout,
        kv_layout=kv_layout,
        access=Access.VEC16 if aligned else Access.ELEMENT,
        **fields,
    )


def _refuse_shapes(q: Tensor, k: Tensor, v: Tensor, row: int, head: int) -> NoReturn:
    """Raise an error that names the first mismatched size."""
    for what, axis, one, other in (
        ("batch", 0, ("q", q), ("k", k)),
        ("batch", 0, ("q", q), ("v", v)),
        ("head_dim", 3, ("q", q), ("k", k)),
        ("length", row, ("k", k), ("v", v)),
        ("heads", head, ("k", k), ("v", v)),
    ):
        (name, tensor), (name_other, tensor_other) = one, other
        if tensor.shape[axis] != tensor_other.shape[axis]:
            raise InvalidInputError(
                f"{name_other} has {what} {tensor_other.shape[axis]} but {name} has "
                f"{tensor.shape[axis]}: they must match ({shapes(q, k, v)}); "
                "check the layout argument"
            )
    raise InternalError(f"shapes were refused without a reason: {shapes(q, k, v)}")


def shapes(q: Tensor, k: Tensor, v: Tensor) -> str:
    """Format the shapes of the inputs for an error message."""
    return f"got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}"
