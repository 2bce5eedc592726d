"""Validates score modifications: tensor masks, windows, biases, softcap, sinks and dropout.

The result is the fields of `Problem` that they change, and the numbers and addresses that a kernel
reads (`ScoreArguments`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from torch import Tensor

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request import norm as norms
from jitattn.request.score_checks import Sizes, matrix, padding, softcap_of, vector
from jitattn.spec.arguments import signed_divisor
from jitattn.spec.call_arguments import ScoreArguments, captured_name, captured_numbers
from jitattn.spec.enums import BiasKind, MaskKind, Staging, Switch
from jitattn.spec.program import parse
from jitattn.values.masks import (
    BlockSparse,
    Both,
    Dense,
    KeyPadding,
    LocalStride,
    PerHead,
    parts_of,
)
from jitattn.values.norm import L2Norm
from jitattn.values.tensors import index_address

if TYPE_CHECKING:
    from jitattn.request.problem import Call
    from jitattn.spec.kernel_spec import Problem
    from jitattn.values.dropout import Dropout
    from jitattn.values.functions import Function
    from jitattn.values.mask_base import KernelMask
    from jitattn.values.masks import Rule

#: Windows use signed positions.
_MAX_WINDOW_LENGTH: Final = 2**30
#: Block lists count key groups, and their windows use signed positions.
_MAX_LISTED_LENGTH: Final = 2**28
#: Small tables of these dtypes are converted to fp32.
_NARROW: Final = (torch.float16, torch.bfloat16)
#: Arguments of a mask without a rule, as far as a rule gives them.
_NO_RULE: Final[dict[str, float]] = {**dict.fromkeys(ScoreArguments._fields, 0), "stride": 1}
#: Kinds whose kernels take sequences of any length.
_UNLIMITED: Final = (MaskKind.FULL, MaskKind.CAUSAL, MaskKind.LOCAL_STRIDE)
#: Largest K or V row in bytes that leaves shared memory for staged bias tiles.
_LARGEST_STAGED: Final = 512


class Scores(NamedTuple):
    """The keyword arguments of `attention` that modify scores, unchecked."""

    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: Dropout | None = None
    qk_norm: L2Norm | None = None
    function: Function | None = None


NO_CHANGES: Final = Scores()
#: The tensors among them, which may have gradients; after the bias, small tables.
ADDED: Final = ("bias", "relative_bias", "alibi_slopes", "sinks")
TABLES: Final = ADDED[1:]
#: The numbers among them.
NUMBERS: Final = ("softcap",)
#: Returns the tensors in this order. (torch.compile does not trace it.)
added_of: Final[Callable[[Scores], tuple[Tensor | None, ...]]] = attrgetter(*ADDED)


def captured_names(scores: Scores) -> tuple[str, ...]:
    """Return the names of the captured tensors of a function, which may have gradients as well."""
    function = scores.function
    return () if function is None else tuple(map(captured_name, range(len(function.tensors))))


def added_tensor(scores: Scores, name: str) -> Any:  # noqa: ANN401 - Tensor or None
    """Return a tensor that scores are changed by, by its name."""
    numbers = captured_numbers((name,))
    if numbers and scores.function is not None:
        return scores.function.tensors[numbers[0]]
    return getattr(scores, name)


def in_fp32(scores: Scores) -> Scores:
    """Convert small tables to fp32 as kernels read them; differentiable."""
    changes: dict[str, Any] = {}
    for name in TABLES:
        table = _widened(name, getattr(scores, name))
        if table is not None:
            changes[name] = table
    norm = scores.qk_norm
    if isinstance(norm, L2Norm):
        head_scale = _widened("L2Norm(head_scale)", norm.head_scale)
        if head_scale is not None:
            changes["qk_norm"] = replace(norm, head_scale=head_scale)
    return scores._replace(**changes) if changes else scores


def _widened(name: str, table: Any) -> Tensor | None:  # noqa: ANN401 - checked later
    """Convert a 16-bit table to fp32; return None for any other dtype."""
    if not isinstance(table, Tensor) or table.dtype not in _NARROW:
        return None
    if not torch.compiler.is_dynamo_compiling():
        index_address(name, table)  # raises for freed memory
    return table.float()


class Checked(NamedTuple):
    """The validated problem fields and kernel arguments of score modifications."""

    fields: dict[str, str]  #: of `Problem`
    bottom_right: bool
    diagonal: int  #: beside the Lkv - Lq of a sequence, if bottom_right
    arguments: ScoreArguments  #: `left` without Lkv - Lq
    has_memory: bool  #: no tensor is a placeholder
    function: dict[str, float] | None  #: arguments of a traced function


def tensors_of(call: Call) -> dict[str, Tensor]:
    """Return the tensors of score modifications, by name."""
    parts = parts_of(call.mask)
    found = {
        **{name: getattr(call.scores, name) for name in ADDED},
        "KeyPadding(...)": None if parts.key_padding is None else parts.key_padding.keep,
        "Dense(...)": None if parts.dense is None else parts.dense.keep,
    }
    if isinstance(call.scores.qk_norm, L2Norm):
        found["L2Norm(head_scale)"] = call.scores.qk_norm.head_scale
    if call.scores.function is not None:
        for idx, captured in enumerate(call.scores.function.tensors):
            found[f"captured tensor no. {idx}"] = captured
    patterns = patterns_of(parts.rule)
    for idx, pattern in enumerate(patterns):
        found["BlockSparse(...)" if len(patterns) == 1 else f"BlockSparse(...) no. {idx}"] = pattern
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def of_sequence(call: Call, idx: int) -> Call:
    """Return the score modifications of one sequence of the batch."""
    if not isinstance(call.mask, KeyPadding | Dense | Both) and call.scores == NO_CHANGES:
        return call
    parts = parts_of(call.mask)
    padding, dense = parts.key_padding, parts.dense
    if padding is not None:
        padding = KeyPadding(padding.keep[idx : idx + 1])
    if dense is not None and dense.keep.shape[0] > 1:
        dense = Dense(dense.keep[idx : idx + 1])
    scores = call.scores
    if scores.bias is not None and scores.bias.shape[0] > 1:
        scores = scores._replace(bias=scores.bias[idx : idx + 1])
    if scores.alibi_slopes is not None and scores.alibi_slopes.dim() == 2:
        scores = scores._replace(alibi_slopes=scores.alibi_slopes[idx : idx + 1])
    if scores.dropout is not None:
        scores = scores._replace(dropout=scores.dropout._replace(first_batch=idx))
    if scores.function is not None:
        scores = scores._replace(function=scores.function._replace(first_batch=idx))
    return call._replace(mask=Both(parts.rule, padding, dense), scores=scores)


def check(call: Call, q: Tensor, scale: float, sizes: Sizes) -> Checked:
    """Validate mask and score arguments, and derive problem fields and kernel arguments.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule. The message gives argument and value, the rule, the way out.
    """
    parts = parts_of(call.mask)
    if parts.function is not None:
        raise UnsupportedError(
            "MaskMod: this function takes masks without functions; call attention or "
            "attention_with_kvcache"
        )
    for name, value in tensors_of(call).items():
        if not isinstance(value, Tensor):
            raise InvalidInputError(
                f"{name} is a {type(value).__name__}: it must be a torch tensor"
            )
        if value.device != q.device:
            raise InvalidInputError(
                f"{name} is on {value.device}, q is on {q.device}: they must be on one device; "
                "move it with .to()"
            )
    bias, relative, slopes, softcap, sinks, dropout, norm, function = call.scores
    heads = sizes.heads
    dense = None if parts.dense is None else parts.dense.keep
    nowhere = (0, (0, 0, 0))
    of_bias = nowhere if bias is None else matrix("bias", bias, (q.dtype, torch.float32), sizes)
    of_dense = nowhere if dense is None else matrix("Dense(...)", dense, (torch.bool,), sizes)
    at_padding, padding_stride = 0, 0
    if parts.key_padding is not None:
        at_padding, padding_stride = padding(parts.key_padding.keep, sizes)
    key_padding = parts.key_padding
    if q.is_cuda and function is not None and parse(function.program).score is not None:
        # The function hides them, as it follows what it makes of scores (`api/functions.py`).
        key_padding = dense = None
        at_padding, padding_stride, of_dense = 0, 0, nowhere
    addresses = {
        "bias": of_bias[0],
        "relative_bias": vector("relative_bias", relative, ((heads, -1), (1, -1))),
        "alibi_slopes": vector("alibi_slopes", slopes, ((heads,), (sizes.batch, heads))),
        "sinks": vector("sinks", sinks, ((heads,),)),
        "key_padding": at_padding,
        "dense": of_dense[0],
        "dropout_state": 0 if dropout is None else index_address("dropout_state", dropout.state),
    }
    # Arguments that are no parameters of the attention kernel.
    read = [index_address("BlockSparse(...)", pattern) for pattern in patterns_of(parts.rule)]
    if softcap is not None:
        softcap = softcap_of(softcap)
    shift = None
    if norm is not None:
        read.append(norms.check(norm, q, heads, call))
        if bias is relative is slopes is None and function is None and softcap is None:
            shift = norms.shift_of(norm, scale, q.dtype)
    mask = parts.rule.kernel_mask(heads, sizes.heads_kv)
    _check_rule(parts.rule, mask, sizes)
    magnitude = abs(scale) or 1e-30  # as in `plan.arguments` for a scale of 0
    is_paired = False
    if bias is not None:
        address, steps = of_bias
        pair = 2 * bias.element_size()
        is_paired = (address | (steps[0] | steps[1] | steps[2]) * bias.element_size()) % pair == 0
    kind_of_bias = BiasKind.NONE
    if bias is not None:
        kind_of_bias = BiasKind.SAME if bias.dtype == q.dtype else BiasKind.FP32
    fields = {
        "mask": mask.kind,
        "bias": kind_of_bias,
        "relative_bias": _switch(relative),
        "alibi": _switch(slopes),
        "softcap": _switch(softcap),
        "sinks": _switch(sinks),
        "key_padding": _switch(key_padding),
        "dense": _switch(dense),
        "dropout": _switch(dropout),
        "fixed_shift": _switch(shift),
        "bias_staged": _staged(bias, of_bias, by_row=True),
        "dense_staged": _staged(dense, of_dense, by_row=False),
        "function": "" if function is None else function.program,
    }
    arguments: dict[str, Any] = {
        **_NO_RULE,
        **addresses,
        **_named_strides("bias", of_bias[1]),
        **_named_strides("dense", of_dense[1]),
        "key_padding_stride": padding_stride,
        "alibi_stride_batch": 0
        if slopes is None or slopes.dim() < 2 or len(slopes) < 2
        else slopes.stride(0),
        "relative_stride_head": 0 if relative is None or len(relative) < 2 else relative.stride(0),
        "relative_reach": 0 if relative is None else relative.shape[1] // 2,
        "bias_is_paired": is_paired,
        "bias_is_shared": bias is not None and of_bias[1][1:] == (0, 0),
        "inverse_scale": 1.0 / magnitude,
        "softcap_in": 0.0 if softcap is None else 2 * math.log2(math.e) * magnitude / softcap,
        "softcap_out": 0.0 if softcap is None else softcap / magnitude,
        "neg_shift": shift or 0.0,
        "dropout_threshold": 0 if dropout is None else dropout.threshold,
        "dropout_scale": 1.0 if dropout is None else dropout.scale,
        **mask.arguments,
    }
    of_function = None
    if function is not None:
        read += [index_address("a captured tensor", one) for one in function.tensors]
        of_function = function_arguments(function)
    has_memory = min(*addresses.values(), *read) >= 0
    made = ScoreArguments(**arguments)
    return Checked(fields, mask.bottom_right, mask.diagonal, made, has_memory, of_function)


def function_arguments(function: Function) -> dict[str, float]:
    """Return the arguments of a traced function, without addresses.

    Raises
    ------
    InvalidInputError
        A captured tensor has no elements, or too many in a dimension.
    """
    found: dict[str, float] = {f"number{idx}": x for idx, x in enumerate(function.numbers)}
    for idx in parse(function.program).divisors():
        by = signed_divisor(int(function.numbers[idx]))
        found[f"number{idx}_mul"], found[f"number{idx}_shift"] = by
    for idx, tensor in enumerate(function.tensors):
        for axis, (size, step) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
            if not 0 < size < 2**31:
                raise InvalidInputError(
                    f"a captured tensor has shape {list(tensor.shape)}: each dimension must have "
                    "from 1 to 2**31 - 1 elements"
                )
            found[f"tensor{idx}_size_{axis}"] = size
            found[f"tensor{idx}_stride_{axis}"] = step
    return found


def patterns_of(rule: Rule) -> list[Tensor]:
    """Return the block patterns in a rule."""
    rules = rule.rules if isinstance(rule, PerHead) else (rule,)
    return [part.pattern for part in rules if isinstance(part, BlockSparse)]


def _named_strides(name: str, steps: tuple[int, int, int]) -> dict[str, int]:
    kinds = ("batch", "head", "row")
    return {f"{name}_stride_{kind}": step for kind, step in zip(kinds, steps, strict=True)}


def _switch(value: object) -> Switch:
    return Switch.OFF if value is None else Switch.ON


def _staged(
    matrix: Tensor | None, where: tuple[int, tuple[int, int, int]], *, by_row: bool
) -> Staging:
    """Return how a matrix is staged: 16-byte aligned rows, or one broadcast row."""
    if matrix is None:
        return Staging.OFF
    address, (batch, head, row) = where
    if (address | (batch | head | row) * matrix.element_size()) & 15 or not _ends_whole(matrix):
        return Staging.OFF
    if matrix.shape[2] > 1:
        return Staging.MATRIX
    return Staging.ROW if by_row and head == 0 else Staging.OFF


def fits_staging(head_dim: int, head_dim_v: int, itemsize: int) -> bool:
    """Return whether rows of K and V leave shared memory for staged tiles of a matrix."""
    return max(head_dim, head_dim_v) * itemsize <= _LARGEST_STAGED


def stagings(call: Call, problem: Problem, len_q: int) -> list[tuple[Staging, Staging]]:
    """Return the possible stagings of bias and dense mask in calls like this with `len_q` queries.

    Key counts and strides decide whether rows begin at multiples of 16 bytes, each matrix's on its
    own. A matrix with a row for each query has one row where there is one query.
    """
    if not fits_staging(problem.head_dim, problem.head_dim_v, problem.dtype.bytes):
        return [(Staging.OFF, Staging.OFF)]
    dense = None if problem.dense is Switch.OFF else parts_of(call.mask).dense

    def ways(matrix: Tensor | None, *, by_row: bool) -> list[Staging]:
        if matrix is None:
            return [Staging.OFF]
        if matrix.shape[2] > 1 and len_q > 1:
            return [Staging.OFF, Staging.MATRIX]
        is_shared = matrix.shape[1] == 1 or matrix.stride(1) == 0
        return [Staging.OFF, Staging.ROW] if by_row and is_shared else [Staging.OFF]

    of_bias = ways(call.scores.bias, by_row=True)
    of_dense = ways(None if dense is None else dense.keep, by_row=False)
    return list(itertools.product(of_bias, of_dense))


def _ends_whole(matrix: Tensor) -> bool:
    """Return whether the 16-byte copy that ends the last row stays within the storage."""
    size = matrix.element_size()
    beyond = -matrix.shape[3] * size % 16
    if beyond == 0:
        return True
    last = sum((n - 1) * step for n, step in zip(matrix.shape, matrix.stride(), strict=True))
    end = (matrix.storage_offset() + last + 1) * size
    return end + beyond <= matrix.untyped_storage().nbytes()


def _check_rule(rule: Rule, mask: KernelMask, sizes: Sizes) -> None:
    """Refuse a rule for other heads, or for longer sequences than its kernels take."""
    if isinstance(rule, PerHead):
        if len(rule.rules) not in (sizes.heads, sizes.heads_kv):
            raise InvalidInputError(
                f"PerHead([...]) has {len(rule.rules)} rules: there must be one for each of the "
                f"{sizes.heads} query heads, or of the {sizes.heads_kv} kv heads"
            )
        for part in rule.rules:
            _check_heads(part, sizes)
    else:
        _check_heads(rule, sizes)
    longest = max(sizes.len_q, sizes.len_kv)
    name = type(rule).__name__
    if mask.kind is MaskKind.BLOCK_LISTS:
        if not mask.bottom_right:
            longest = max(sizes.len_kv, sizes.len_q + mask.diagonal)
        if longest > _MAX_LISTED_LENGTH:
            raise InvalidInputError(
                f"{name}(...): positions up to {longest}: lists of blocks take at most "
                f"{_MAX_LISTED_LENGTH}"
            )
    elif mask.kind not in _UNLIMITED and longest > _MAX_WINDOW_LENGTH:
        raise InvalidInputError(
            f"{name}(...): lengths of {sizes.len_q} and {sizes.len_kv}: a {name.lower()} takes at "
            f"most {_MAX_WINDOW_LENGTH}"
        )


def _check_heads(rule: Rule, sizes: Sizes) -> None:
    """Refuse a pattern that is for other heads."""
    if isinstance(rule, BlockSparse) and len(rule.blocks) not in (1, sizes.heads, sizes.heads_kv):
        raise InvalidInputError(
            f"BlockSparse(pattern) is for {len(rule.blocks)} heads: it must be for 1, for the "
            f"{sizes.heads} query heads, or for the {sizes.heads_kv} kv heads"
        )
    if isinstance(rule, LocalStride) and rule.num_dense_heads > sizes.heads_kv:
        raise InvalidInputError(
            f"LocalStride(num_dense_heads={rule.num_dense_heads}): there are only "
            f"{sizes.heads_kv} kv heads"
        )
