"""Validation of calls whose sequences differ: ragged, padded, paged → `Problem` + `Runtime`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError, WithoutMemoryError
from jitattn.jit import backend
from jitattn.request import norm as norms
from jitattn.request import problem
from jitattn.request.outputs import check_out
from jitattn.request.problem import Indices, Runtime
from jitattn.request.score_checks import Sizes
from jitattn.request.scores import NO_CHANGES, NO_LEFT, check
from jitattn.spec.enums import Access, MaskKind, SeqLayout, Staging, Switch
from jitattn.spec.params import FWD_SCORE_FIELDS, divisor
from jitattn.values.masks import Causal, Full, parts_of
from jitattn.values.norm import DEFAULT_SCALE
from jitattn.values.sequences import LENGTHS, Padded, Paged, Ragged
from jitattn.values.tensors import NO_ADDRESS, address_of, index_address, strides_of

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.request.scores import Checked
    from jitattn.spec.kernel_spec import Problem
    from jitattn.values.sequences import KvSequences, QSequences

_MAX_COUNT: Final = 2**31 - 1
#: Bytes of a row of K or V up to which there is room for tiles of a bias beside it.
_LARGEST_STAGED: Final = 512
#: What `check` says of norms, by all that it depends on.
_checked_norms: dict[tuple[object, ...], Checked] = {}
_MOST_NORMS: Final = 256
#: Place of the left bound among the score parameters.
_LEFT: Final = [name for name, _ in FWD_SCORE_FIELDS].index("left")


class _Side(NamedTuple):
    """q, or k and v: sizes, and which dimensions are what."""

    batch: int
    rows: int  #: of the tensor: of all sequences together, or of each, or of all pages
    heads: int
    longest: int
    row: int  #: dimension of rows; -1 and so on
    head: int
    outer: int | None  #: dimension of the batch or of pages; None for a flat tensor
    page_size: int = 0  #: 0 where there are no pages
    outer_size: int = 0  #: of a batched tensor: its rows of the batch


def parse(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Problem, Runtime]:
    """Check every argument of `attention`, and sort its facts by what they change.

    As `problem.parse`, for calls with `q_seqs` or `kv_seqs` too.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule. The message gives argument and value, the rule, the way out.
    UnsupportedError
        The request is legal, but nothing computes it yet.
    WithoutMemoryError
        A tensor is a placeholder, or is inside a transform and on a GPU.
    """
    is_uniform = call.q_seqs is None and call.kv_seqs is None
    if is_uniform and type(call.mask) in (Full, Causal):
        if call.scores is NO_CHANGES:
            return problem.parse(q, k, v, call)
        if _is_norm_only(call.scores):
            return _parse_cosine(q, k, v, call)
    parsed = parse_any(q, k, v, call)
    if not parsed.has_memory:
        raise WithoutMemoryError
    return parsed.problem, parsed.runtime


class Parsed(NamedTuple):
    """Facts of a call, also of one that cannot be launched."""

    problem: Problem
    runtime: Runtime
    has_memory: bool  #: no tensor is a placeholder, or one of a transform on a GPU


def parse_any(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Parsed:
    """Parse any call, without the short cut that `parse` takes; asks no placeholder its address."""
    is_uniform = call.q_seqs is None and call.kv_seqs is None
    problem.check_alike(q, k, v)
    problem.axes(call.layout)
    check_kinds(call.q_seqs, call.kv_seqs, q.device)
    ours = _q_side(q, call)
    theirs = _kv_side("k", k, call)
    _check_fit(q, k, v, ours, theirs, _kv_side("v", v, call))
    batch = ours.batch
    problem.check_counts(q, k, v, batch, ours.longest, theirs.longest, ours.heads, theirs.heads)
    problem.check_mask(call.mask)
    problem.check_options(
        q, call.gear, call.out_dtype, call.num_splits, call.return_lse, call.tile_rows
    )

    head_dim, head_dim_v = q.shape[-1], v.shape[-1]
    usual = head_dim**-0.5 if call.scores.qk_norm is None else DEFAULT_SCALE
    scale = usual if call.scale is None else problem.checked_scale(call.scale)
    sizes = Sizes(batch, ours.heads, theirs.heads, ours.longest, theirs.longest, is_uniform)
    scores = check(call, q, scale, sizes)
    q_strides = _strides("q", q, ours)
    k_strides, v_strides = _strides("k", k, theirs), _strides("v", v, theirs)
    address = 0
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        address |= address_of(name, tensor)
    units = head_dim | head_dim_v
    for stride in (*q_strides, *k_strides, *v_strides):
        units |= stride
    units *= q.element_size()
    result_dtype = q.dtype if call.out_dtype is None else call.out_dtype
    if call.out is not None:
        shape = (*q.shape[:-1], head_dim_v)
        check_out(call.out, (q, k, v), shape, result_dtype)
        address |= address_of("out", call.out)
        for stride in (head_dim_v, *_strides("out", call.out, ours)):
            units |= stride * call.out.element_size()
    layouts = (_layout_of(call.q_seqs), _layout_of(call.kv_seqs, theirs.page_size))
    if max(head_dim, head_dim_v) * q.element_size() > _LARGEST_STAGED:
        scores = scores._replace(
            fields=scores.fields._replace(bias_staged=Staging.OFF, dense_staged=Staging.OFF)
        )
    setting = problem.setting_of(call.gear, q)
    aligned = ((0 if address < 0 else address) | units) & 15 == 0
    facts = (q.dtype, result_dtype, head_dim, head_dim_v, setting, aligned, scores.fields.mask)
    found = problem.problem_of((*facts, *layouts, *scores.fields[1:]))
    diagonal, params = scores.diagonal, scores.params
    is_listed = found.mask is MaskKind.BLOCK_LISTS
    if found.is_uniform:
        corner = theirs.longest - ours.longest if scores.bottom_right else 0
        diagonal += corner
        params = _of_uniform(params, corner, ours.longest)
    indices = None if found.is_uniform else _indices(call, ours, theirs, scores.bottom_right)
    has_memory = address >= 0 and scores.has_memory
    if indices is not None:
        has_memory = has_memory and min(indices.addresses) >= 0
    runtime = Runtime(
        batch,
        ours.longest,
        theirs.longest,
        ours.heads,
        theirs.heads,
        q_strides,
        k_strides,
        v_strides,
        scale,
        diagonal,
        indices,
        params if found.has_scores else (),
        parts_of(call.mask).rule if is_listed else None,
    )
    return Parsed(found, runtime, has_memory)


def _is_norm_only(scores: tuple[Any, ...]) -> bool:
    bias, relative, slopes, softcap, sinks, dropout, norm = scores
    others_are_none = bias is relative is slopes is softcap is sinks is dropout is None
    return others_are_none and norm is not None


def _parse_cosine(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Problem, Runtime]:
    """Parse a batched call with a norm and nothing else that is done with scores.

    What `check` says of it follows from a few facts, and is kept.
    """
    if call.scale is None:
        call = call._replace(scale=DEFAULT_SCALE)
    found, runtime = problem.parse(q, k, v, call)
    norm: Any = call.scores.qk_norm
    if norms.check(norm, q, runtime.heads_q, call) < 0:
        raise WithoutMemoryError
    bound = (norm.groups, norm.bound, norm.head_scale is None)
    key = (type(call.mask), runtime.scale, q.dtype, bound)
    scores = _checked_norms.get(key)
    if scores is None:
        sizes = (runtime.batch, runtime.heads_q, runtime.heads_kv, runtime.len_q, runtime.len_kv)
        if len(_checked_norms) >= _MOST_NORMS:
            _checked_norms.clear()
        scores = _checked_norms[key] = check(call, q, runtime.scale, Sizes(*sizes, True))
    if scores.fields.fixed_shift is Switch.OFF:
        return found, runtime
    result_dtype = q.dtype if call.out_dtype is None else call.out_dtype
    dims = (q.shape[3], v.shape[3])
    setting, aligned = problem.setting_of(call.gear, q), found.access is Access.VEC16
    layouts = (SeqLayout.BATCHED, SeqLayout.BATCHED)
    facts = (q.dtype, result_dtype, *dims, setting, aligned, *scores.fields[:1], *layouts)
    params = _of_uniform(scores.params, runtime.diagonal, runtime.len_q)
    return problem.problem_of((*facts, *scores.fields[1:])), runtime._replace(score_params=params)


def of_normalized(
    q: Tensor, k: Tensor, v: Tensor, parsed: tuple[Problem, Runtime], call: Call
) -> tuple[Problem, Runtime]:
    """Return what `parse` says of a call whose q and k have been normalised since.

    Parameters
    ----------
    q, k : Tensor
        Contiguous, and on addresses of their own; all else is as it was.
    parsed : (Problem, Runtime)
        Of the call before.
    call : Call
        As `norm.call_of_normalized` has it.
    """
    found, runtime = parsed
    if found.access is not Access.VEC16:  # it may be aligned now
        return parse(q, k, v, call)
    strides = [_row_strides(x, call.layout) for x in (q, k)]
    return found, runtime._replace(q_strides=strides[0], k_strides=strides[1])


def _row_strides(tensor: Tensor, layout: str) -> problem.Strides:
    """Strides as `_strides` has them, of a flat or a batched tensor."""
    stride, shape = tensor.stride(), tensor.shape
    if len(shape) == 3:
        return 0, stride[0] if shape[0] > 1 else 0, stride[1] if shape[1] > 1 else 0
    row, head = problem.axes(layout)
    return (
        stride[0] if shape[0] > 1 else 0,
        stride[row] if shape[row] > 1 else 0,
        stride[head] if shape[head] > 1 else 0,
    )


def _of_uniform(params: tuple[float, ...], corner: int, len_q: int) -> tuple[float, ...]:
    """Move the left bound of a window to where all sequences have it."""
    left, _, lifts = params[_LEFT : _LEFT + 3]
    moved = NO_LEFT if left <= NO_LEFT or (lifts and len_q == 1) else left + corner
    return (*params[:_LEFT], moved, *params[_LEFT + 1 :])


def check_kinds(q_seqs: QSequences, kv_seqs: KvSequences, device: torch.device) -> None:
    """Check what kinds of values say where sequences lie, and the device of their indices."""
    for name, seqs, kinds in (
        ("q_seqs", q_seqs, (Ragged, Padded)),
        ("kv_seqs", kv_seqs, (Ragged, Padded, Paged)),
    ):
        if seqs is None:
            continue
        if not isinstance(seqs, kinds):
            allowed = ", ".join(kind.__name__ for kind in kinds)
            raise InvalidInputError(
                f"{name} is a {type(seqs).__name__}: it must be one of {allowed}, or None for "
                "sequences that fill the batch"
            )
        if seqs.device != device:
            raise InvalidInputError(
                f"{name} holds indices on {seqs.device}, q is on {device}: they must be on "
                "one device; move them with .to()"
            )


def _q_side(q: Tensor, call: Call) -> _Side:
    seqs = call.q_seqs
    if isinstance(seqs, Ragged):
        _check_dimensions("q", q, 3, "q_seqs=Ragged(...): [total, Hq, D]")
        return _flat(q, seqs, "q_seqs")
    return _batched("q", q, seqs, call.layout)


def _kv_side(name: str, tensor: Tensor, call: Call) -> _Side:
    seqs = call.kv_seqs
    if isinstance(seqs, Ragged):
        _check_dimensions(name, tensor, 3, "kv_seqs=Ragged(...): [total, Hkv, D]")
        return _flat(tensor, seqs, "kv_seqs")
    if isinstance(seqs, Paged):
        _check_dimensions(
            name,
            tensor,
            4,
            "kv_seqs=Paged(...): [num_pages, page_size, Hkv, D]",
        )
        page_size = tensor.shape[1]
        if page_size < 1 or tensor.shape[0] * page_size > _MAX_COUNT:
            raise InvalidInputError(
                f"{name} has {tensor.shape[0]} pages of {page_size} rows: a page holds at least "
                "one row, and all pages together fewer than 2**31"
            )
        return _Side(
            seqs.batch,
            tensor.shape[0] * page_size,
            tensor.shape[2],
            seqs.max_length(page_size),
            1,
            2,
            0,
            page_size,
        )
    return _batched(name, tensor, seqs, call.layout)


def _flat(tensor: Tensor, seqs: Ragged, name: str) -> _Side:
    longest = tensor.shape[0]
    if not seqs.knows_max_length():
        if index_address(name, seqs.stop) == NO_ADDRESS:  # nothing to be read, nor to be launched
            return _Side(seqs.batch, longest, tensor.shape[1], longest, 0, 1, None)
        if tensor.is_cuda and backend.active.is_capturing():
            raise InvalidInputError(
                f"{name}: the largest length is not known, and cannot be read while a CUDA graph "
                "is captured; give max_length"
            )
    longest = min(seqs.max_length(), longest)
    return _Side(seqs.batch, tensor.shape[0], tensor.shape[1], longest, 0, 1, None)


def _batched(name: str, tensor: Tensor, seqs: Padded | None, layout: str) -> _Side:
    row, head = problem.axes(layout)
    letters = "[B, L, H, D]" if layout == "bshd" else "[B, H, L, D]"
    _check_dimensions(name, tensor, 4, f"a batched tensor: {letters}")
    rows = tensor.shape[row]
    batch = tensor.shape[0]
    if seqs is not None and seqs.batch_idx is not None:
        if name == "q":
            raise InvalidInputError(
                "q_seqs=Padded(batch_idx=...): it names rows of k and v only; index q itself"
            )
        batch = seqs.batch
    elif seqs is not None and seqs.batch != batch:
        raise InvalidInputError(
            f"{name} has batch {batch}, its Padded(...) {seqs.batch} sequences: they must match; "
            "say with batch_idx which rows of k and v they are in"
        )
    longest = rows if seqs is None else seqs.max_length(rows)
    return _Side(batch, rows, tensor.shape[head], longest, row, head, 0, outer_size=tensor.shape[0])


def _check_dimensions(name: str, tensor: Tensor, dimensions: int, rule: str) -> None:
    if tensor.dim() != dimensions:
        raise InvalidInputError(
            f"{name} has shape {list(tensor.shape)}: it must have {dimensions} dimensions with "
            f"{rule}"
        )


def _check_fit(q: Tensor, k: Tensor, v: Tensor, ours: _Side, k_side: _Side, v_side: _Side) -> None:
    shapes = f"(got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)})"
    for what, one, other in (
        ("sequences", ours.batch, k_side.batch),
        ("head_dim", q.shape[-1], k.shape[-1]),
        ("heads", k_side.heads, v_side.heads),
        ("rows", k.shape[k_side.row], v.shape[v_side.row]),
        ("rows in all", k_side.rows, v_side.rows),
        ("sequences", k_side.batch, v_side.batch),
    ):
        if one != other:
            raise InvalidInputError(f"{what} differ: {one} and {other} {shapes}")


def _strides(name: str, tensor: Tensor, side: _Side) -> problem.Strides:
    """Strides in elements as (batch or page, row, head); 0 where no index passes."""
    stride, shape = strides_of(name, tensor), tensor.shape

    def step(dimension: int | None) -> int:
        return 0 if dimension is None or shape[dimension] <= 1 else stride[dimension]

    return step(side.outer), step(side.row), step(side.head)


def _layout_of(seqs: QSequences | KvSequences, page_size: int = 0) -> SeqLayout:
    if isinstance(seqs, Paged):
        return SeqLayout.PAGED16 if page_size % 16 == 0 and seqs.start is None else SeqLayout.PAGED
    return SeqLayout.BATCHED if seqs is None else SeqLayout.RAGGED


def _indices(call: Call, ours: _Side, theirs: _Side, bottom_right: bool) -> Indices:
    q_seqs, kv_seqs = call.q_seqs, call.kv_seqs
    table = table_stride = num_pages = 0
    table_word = page_size = 1
    kv_rows = theirs.rows
    kv_start = kv_stop = q_start = q_stop = 0
    q_word = kv_word = 1
    q_kind = kv_kind = LENGTHS
    if q_seqs is not None:
        q_start, q_stop, q_word, q_kind = q_seqs.addresses()
    if kv_seqs is not None:
        kv_start, kv_stop, kv_word, kv_kind = kv_seqs.addresses()
    if isinstance(kv_seqs, Paged):
        block_table = kv_seqs.block_table
        table, table_word = index_address("block_table", block_table), _words(block_table)
        table_stride = block_table.stride(0) * table_word
        page_size = theirs.page_size
        num_pages = theirs.rows // page_size
        kv_rows = min(_MAX_COUNT, block_table.shape[1] * page_size) if num_pages else 0
    elif isinstance(kv_seqs, Padded) and kv_seqs.batch_idx is not None:
        batch_idx = kv_seqs.batch_idx
        table, table_word = index_address("batch_idx", batch_idx), _words(batch_idx)
        num_pages = theirs.outer_size
    return Indices(
        (q_start, q_stop, kv_start, kv_stop, table, table_stride),
        bottom_right,
        (
            q_word,
            kv_word,
            table_word,
            q_kind,
            kv_kind,
            ours.rows,
            kv_rows,
            num_pages,
            page_size,
            *divisor(page_size),
        ),
        isinstance(q_seqs, Ragged),
    )


def _words(index: Tensor) -> int:
    return index.element_size() // 4
