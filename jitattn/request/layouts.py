"""Validates the sequence layouts of a call (ragged, padded, paged) → `Problem` + `Runtime`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError, WithoutMemoryError
from jitattn.jit import backend
from jitattn.request import problem
from jitattn.request.block_lists import heads_agree
from jitattn.request.outputs import check_out
from jitattn.request.problem import Indices, Runtime
from jitattn.request.score_checks import Sizes
from jitattn.request.scores import check, fits_staging
from jitattn.spec.arguments import NO_LEFT, divisor
from jitattn.spec.call_arguments import ScoreArguments, SequenceArguments
from jitattn.spec.enums import LENGTHS, MaskKind, SeqLayout, Staging
from jitattn.values.masks import parts_of
from jitattn.values.norm import DEFAULT_SCALE
from jitattn.values.sequences import Padded, Paged, Ragged
from jitattn.values.tensors import NO_ADDRESS, address_of, index_address, strides_of

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.spec.kernel_spec import Problem
    from jitattn.values.sequences import KvSequences, QSequences

_MAX_COUNT: Final = 2**31 - 1


class _Side(NamedTuple):
    """The sizes and dimension order of q, or of k and v."""

    batch: int
    rows: int  #: of the tensor: of all sequences together, or of each, or of all pages
    heads: int
    longest: int
    row: int  #: dimension of rows; -1 and so on
    head: int
    outer: int | None  #: dimension of the batch or of pages; None for a flat tensor
    page_size: int = 0  #: 0 where there are no pages
    outer_size: int = 0  #: of a batched tensor: its rows of the batch


class Parsed(NamedTuple):
    """A validated call, possibly with placeholders, which cannot be launched."""

    problem: Problem
    runtime: Runtime
    has_memory: bool  #: no tensor is a placeholder, or one of a transform on a GPU


def parse(q: Tensor, k: Tensor, v: Tensor, call: Call) -> tuple[Problem, Runtime]:
    """Validate every argument of `attention`; separate compile-time from run-time facts.

    Raises
    ------
    InvalidInputError
        An argument breaks a rule. The message gives argument and value, the rule, the way out.
    UnsupportedError
        The request is legal, but nothing computes it yet.
    WithoutMemoryError
        A tensor is a placeholder, or is inside a transform and on a GPU.
    """
    parsed = parse_any(q, k, v, call)
    if not parsed.has_memory:
        raise WithoutMemoryError
    return parsed.problem, parsed.runtime


def parse_any(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Parsed:
    """Parse as `parse` does, but accept placeholders: tensors without an address."""
    is_uniform = call.q_seqs is None and call.kv_seqs is None
    problem.check_alike(q, k, v)
    problem.axes(call.layout)
    check_kinds(call.q_seqs, call.kv_seqs, q.device)
    if is_uniform:
        problem.check_batched(q, k, v, call.layout)
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
    usual = max(1, head_dim) ** -0.5 if call.scores.qk_norm is None else DEFAULT_SCALE
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
    if not fits_staging(head_dim, head_dim_v, q.element_size()):
        scores.fields.update(bias_staged=Staging.OFF, dense_staged=Staging.OFF)
    setting = problem.setting_of(call.gear, q)
    aligned = ((0 if address < 0 else address) | units) & 15 == 0
    facts = (q.dtype, result_dtype, head_dim, head_dim_v, setting, aligned, *layouts)
    found = problem.problem_of(facts, scores.fields)
    diagonal, arguments = scores.diagonal, scores.arguments
    is_listed = found.mask is MaskKind.BLOCK_LISTS
    if found.is_uniform:
        corner = theirs.longest - ours.longest if scores.bottom_right else 0
        diagonal += corner
        arguments = _of_uniform(arguments, corner, ours.longest)
    indices = None if found.is_uniform else _indices(call, ours, theirs, scores.bottom_right)
    has_memory = address >= 0 and scores.has_memory
    if indices is not None:
        has_memory = has_memory and indices.arguments.has_memory
    rule = parts_of(call.mask).rule
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
        arguments if found.has_scores else None,
        rule if is_listed else None,
        is_listed and has_memory and heads_agree(rule, ours.heads, theirs.heads),
        q.dim() == 3,
        k.dim() == 3,
        _are_apart(call.q_seqs) and _are_apart(call.kv_seqs),
        _shares_rows(call.kv_seqs),
        call.kv_seqs.block_table.shape[1] if isinstance(call.kv_seqs, Paged) else 1,
        None if scores.function is None else tuple(scores.function.items()),
    )
    return Parsed(found, runtime, has_memory)


def _of_uniform(arguments: ScoreArguments, corner: int, len_q: int) -> ScoreArguments:
    """Add the diagonal of a uniform batch to the left bound of a window."""
    if arguments.left <= NO_LEFT or (arguments.full_on_decode and len_q == 1):
        return arguments._replace(left=NO_LEFT)
    return arguments._replace(left=arguments.left + corner)


def check_kinds(q_seqs: QSequences, kv_seqs: KvSequences, device: torch.device) -> None:
    """Check the types of `q_seqs` and `kv_seqs`, and the device of their indices."""
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
        if index_address(name, seqs.stop) == NO_ADDRESS:  # a placeholder: not launched
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
        ("rows of the batch", k_side.outer_size, v_side.outer_size),
    ):
        if one != other:
            raise InvalidInputError(f"{what} differ: {one} and {other} {shapes}")


def _strides(name: str, tensor: Tensor, side: _Side) -> problem.Strides:
    """Return (batch or page, row, head) strides in elements; 0 for dimensions of size 1."""
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
    div_mul, div_shift = divisor(page_size)
    arguments = SequenceArguments(
        q_start=q_start,
        q_stop=q_stop,
        kv_start=kv_start,
        kv_stop=kv_stop,
        block_table=table,
        table_stride=table_stride,
        bottom_right=bottom_right,
        q_word=q_word,
        kv_word=kv_word,
        table_word=table_word,
        q_span_kind=q_kind,
        kv_span_kind=kv_kind,
        q_rows=ours.rows,
        kv_rows=kv_rows,
        num_pages=num_pages,
        page_size=page_size,
        page_div_mul=div_mul,
        page_div_shift=div_shift,
    )
    return Indices(arguments, isinstance(q_seqs, Ragged))


def _are_apart(seqs: QSequences | KvSequences) -> bool:
    """Return whether every row belongs to at most one sequence; pages count as separate."""
    if isinstance(seqs, Ragged):
        return not seqs.stop_is_length  # cumulative lengths
    if isinstance(seqs, Padded):
        return seqs.batch_idx is None
    return True


def _shares_rows(seqs: KvSequences) -> bool:
    """Return whether sequences may share rows of k and v."""
    return isinstance(seqs, Paged) or (isinstance(seqs, Padded) and seqs.batch_idx is not None)


def _words(index: Tensor) -> int:
    return index.element_size() // 4
