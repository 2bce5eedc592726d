"""The backward pass on a GPU: row statistics, then dK, dV and the sums of dQ, then dQ.

Memory beside the results: LSE and delta in fp32 (8 bytes a row and head), and the sums of dQ in
fp32 (4 bytes an element of q, rounded up to whole tiles); where the kernel takes fp32 as fp16 parts
(halves.py), as much again as q, k, v and dO. No tensor is Lq x Lkv.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn import halves, lists
from jitattn.bwd_tiles import bwd_spec, round_spec, score_grad_spec, specs_of_backward
from jitattn.errors import UnsupportedError
from jitattn.jit import launch
from jitattn.jit.device import device
from jitattn.jit.enums import Access, MaskKind, Numerics, ScoreTarget, SeqLayout
from jitattn.jit.params import FWD_SEQ_FIELDS
from jitattn.jit.spec import StatsSpec, padded_head_dim
from jitattn.layouts import parse
from jitattn.loaded import loaded_kernel
from jitattn.masks import LocalStride
from jitattn.prepared import strides_of
from jitattn.sequences import Padded, Paged, overlaps
from jitattn.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import Tensor

    from jitattn.halves import Halves
    from jitattn.jit.spec import BwdSpec, BwdTile, KernelSpec, Problem, ScoreGradSpec
    from jitattn.masks import Rule
    from jitattn.problem import Call, Runtime, Strides
    from jitattn.scores import Scores

_LOG2_E: Final = math.log2(math.e)
_TINY_SCALE: Final = 1e-30
#: Blocks of local + stride patterns whose keys the kernel gathers.
_FINE_BLOCKS: Final = (16, 32)
_NO_SEQUENCES: Final = (0,) * len(FWD_SEQ_FIELDS)


class Gradients(NamedTuple):
    """What a backward pass gives; `None` where nothing was asked for."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    bias: Tensor | None = None
    relative_bias: Tensor | None = None
    alibi_slopes: Tensor | None = None
    sinks: Tensor | None = None


class _Rows(NamedTuple):
    """Rows of q and of the LSE: batch, rows and heads, and strides (batch, row, head)."""

    batch: int
    length: int
    heads: int
    head_axis: int
    row_axis: int

    def strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Of a tensor like q."""
        stride = tensor.stride()
        return (stride[0] if self.row_axis else 0, stride[self.row_axis], stride[self.head_axis])

    def stat_strides(self, tensor: Tensor) -> tuple[int, int, int]:
        """Of a tensor like the LSE, as (batch, head, row)."""
        stride = tensor.stride()
        return (stride[0] if self.row_axis else 0, stride[-2], stride[-1])


def check_differentiable(call: Call) -> None:
    """Refuse a call on a GPU whose gradients nothing computes.

    Raises
    ------
    UnsupportedError
    """
    seqs = call.kv_seqs
    if isinstance(seqs, Paged):
        raise UnsupportedError(
            "an input requires grad and kv_seqs is Paged(...): pages have no gradients; gather "
            "them into k and v (Ragged or batched), or call under torch.no_grad()"
        )
    if isinstance(seqs, Padded) and seqs.batch_idx is not None:
        raise UnsupportedError(
            "an input requires grad and kv_seqs is Padded(batch_idx=...): several sequences may "
            "share a row; index k and v themselves, or call under torch.no_grad()"
        )
    if call.kv_seqs is not None:
        overlaps(call.kv_seqs)  # read from the device once, and remembered by the value


class _Pass(NamedTuple):
    """What every launch of a backward pass needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    stats: Tensor
    problem: Problem
    runtime: Runtime
    call: Call
    rows: _Rows
    arch: str
    device_index: int
    stream: int
    d_out_strides: Strides
    parts: Halves | None = None  #: what q, k, v and d_out are then

    def in_halves(self, problem: Problem) -> _Pass:
        """Return the same pass on fp16 parts, for the problem of the kernel that takes them."""
        parts = halves.split(
            self.q, self.k, self.v, problem, self.runtime, self.d_out, self.d_out_strides
        )
        d_out = self.d_out if parts.d_out is None else parts.d_out
        runtime = self.runtime._replace(
            q_strides=strides_of(parts.q),
            k_strides=strides_of(parts.k),
            v_strides=strides_of(parts.v),
        )
        return self._replace(
            q=parts.q,
            k=parts.k,
            v=parts.v,
            d_out=d_out,
            d_out_strides=strides_of(d_out),
            runtime=runtime,
            parts=parts,
        )

    def num_tiles(self, problem: Problem, tile: BwdTile) -> tuple[int, int]:
        """Query tiles and key blocks of the longest sequence."""
        len_q = self.runtime.len_q
        if problem.mask is MaskKind.BLOCK_LISTS:
            len_q += tile.block_q - 1  # tiles begin where lists do
        num_kv_tiles = -(-self.runtime.len_kv // tile.block_kv)
        if problem.mask is MaskKind.FINE_STRIDE:
            num_kv_tiles += 1  # either kind of keys may leave a block half empty
        return -(-len_q // tile.block_q), num_kv_tiles

    @property
    def scale(self) -> float:
        """The scale, never 0."""
        return abs(self.runtime.scale) or _TINY_SCALE

    def launch(
        self,
        spec: BwdSpec | ScoreGradSpec,
        num_ctas: int,
        target: Tensor,
        target_strides: tuple[int, int, int],
        kv_gradients: tuple[Tensor, Tensor] | None = None,
        turns: Tensor | None = None,
        targets: tuple[int, int] = (0, 0),
    ) -> None:
        """Launch a kernel that takes `BwdParams`; `target` is what it has as dq_sum."""
        if num_ctas > launch.MAX_GRID:
            raise UnsupportedError(
                f"the backward pass needs {num_ctas} CTAs: a grid has at most 2**31 - 1; split the "
                "batch"
            )
        runtime, tile = self.runtime, spec.tile
        heads_q, heads_kv = runtime.heads_q, runtime.heads_kv
        num_q_tiles, num_kv_tiles = self.num_tiles(spec.problem, tile)
        indices = runtime.indices
        scores = runtime.score_params if spec.problem.has_scores else ()
        tail: tuple[float, ...] = (*_NO_SEQUENCES, *scores) if scores else ()
        if indices is not None:
            tail = (*indices.addresses, indices.bottom_right, *indices.counts, *scores)
        if runtime.listed is not None:
            longest = max(runtime.len_kv, runtime.diagonal + runtime.len_q)
            heads = (heads_q, heads_kv)
            made = lists.lists_of(runtime.listed, heads, longest, tile.block_q, self.q.device)
            tail = (*tail, *made.params, tile.block_q - 1, 0)
        of_d_out: tuple[int, ...] = ()
        if self.parts is not None:
            parts = self.parts
            scales = (parts.q_scale, parts.k_scale, parts.v_scale)
            tail = (*tail, *(scale.data_ptr() for scale in scales), 0, 0)
            of_d_out = () if parts.d_out_scale is None else (parts.d_out_scale.data_ptr(),)
        written: tuple[int, ...] = (0, 0)
        strides: tuple[int, ...] = (0,) * 6
        if kv_gradients is not None:
            written = tuple(tensor.data_ptr() for tensor in kv_gradients)
            strides = tuple(
                stride for tensor in kv_gradients for stride in self._kv_strides(tensor)
            )
        loaded_kernel(spec, self.device_index).launch(
            num_ctas,
            self.stream,
            self.q.data_ptr(),
            self.k.data_ptr(),
            self.v.data_ptr(),
            *(0, 0, 0, 0, 0),
            *runtime.q_strides,
            *runtime.k_strides,
            *runtime.v_strides,
            *(0, 0, 0, 0, 0),
            runtime.batch,
            runtime.len_q,
            runtime.len_kv,
            heads_q,
            heads_q // heads_kv,
            1,
            num_q_tiles,
            1,
            0,
            runtime.diagonal,
            *(0, 0, 0),
            self.scale * _LOG2_E,
            *tail,
            self.d_out.data_ptr(),
            self.stats[0].data_ptr(),
            self.stats[1].data_ptr(),
            target.data_ptr(),
            *written,
            0 if turns is None else turns.data_ptr(),
            *self.d_out_strides,
            *strides,
            *target_strides,
            *self.rows.stat_strides(self.stats[0])[:2],
            num_kv_tiles,
            self.scale,
            *targets,
            *of_d_out,
        )

    def _kv_strides(self, tensor: Tensor) -> tuple[int, int, int]:
        stride = tensor.stride()
        if tensor.dim() == 3:
            return 0, stride[0], stride[1]
        row = 1 if self.call.layout == "bshd" else 2
        return stride[0], stride[row], stride[3 - row]


def run_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    call: Call,
    wanted: Collection[str] = (),
) -> Gradients:
    """Compute the gradients of a call of `attention`, given its results and their gradients.

    Parameters
    ----------
    q, k, v : Tensor
        As they were given, on a GPU.
    out, lse : Tensor
        As they were returned.
    d_out : Tensor, like `out`
    d_lse : Tensor, like `lse`, optional
    call : Call
    wanted : collection of str
        Which of bias, relative_bias, alibi_slopes and sinks need gradients.

    Raises
    ------
    UnsupportedError
        Sequences of keys overlap, or the call needs more CTAs than a grid has.
    """
    if call.kv_seqs is not None and overlaps(call.kv_seqs):
        raise UnsupportedError(
            "sequences of kv_seqs overlap: their keys would have several gradients at a time; give "
            "each its own rows"
        )
    negated = call.scale is not None and call.scale < 0
    if call.scale is not None and negated:
        # q k^T * -s = q (-k)^T * s
        k, call = -k, call._replace(scale=-call.scale)
    problem, runtime = parse(q, k, v, call._replace(out=None))
    row_axis, head_axis = 0, 1
    if q.dim() == 4:
        row_axis, head_axis = (1, 2) if call.layout == "bshd" else (2, 1)
    batch = q.shape[0] if row_axis else 1
    rows = _Rows(batch, q.shape[row_axis], q.shape[head_axis], head_axis, row_axis)
    dense = torch.contiguous_format
    is_empty = not (runtime.batch * runtime.len_q * runtime.len_kv and q.numel() and v.numel())
    is_sparse = is_empty or problem.kv_layout is not SeqLayout.BATCHED
    like = torch.zeros_like if is_sparse else torch.empty_like
    dk, dv = like(k, memory_format=dense), like(v, memory_format=dense)
    dq = (torch.zeros_like if is_empty else torch.empty_like)(q, memory_format=dense)
    found = Gradients(dq, dk, dv)
    with torch.cuda.device(q.get_device()):
        if is_empty:
            zeros = {
                name: torch.zeros_like(getattr(call.scores, name), memory_format=dense)
                for name in wanted
            }
            return found._replace(**zeros)
        stats = _row_stats(rows, out, lse, d_out, d_lse, problem, call)
        d_out = d_out.to(q.dtype)
        needs_copy = d_out.stride(-1) != 1 and d_out.shape[-1] > 1
        if needs_copy or (problem.access is Access.VEC16 and not _aligned(d_out)):
            d_out = d_out.clone(memory_format=dense)  # contiguous() would keep an odd address
        index = q.get_device()
        stream = torch._C._cuda_getCurrentRawStream(index)
        arch = device(index).arch
        whole = _Pass(
            q,
            k,
            v,
            d_out,
            stats,
            problem,
            runtime,
            call,
            rows,
            arch,
            index,
            stream,
            rows.strides(d_out),
        )
        _main(whole, dq, dk, dv)
        others = _of_scores(whole, wanted)
    return found._replace(dk=-dk if negated else dk, **others)


def kernel_problem(problem: Problem, runtime: Runtime, arch: str) -> Problem:
    """Return the problem of the kernel for dq, dk and dv of a call."""
    own = without_lists(problem, runtime.listed, arch)
    if own is not problem:
        return own
    return halves.backward_problem_of(problem, runtime) or problem


def without_lists(problem: Problem, rule: Rule | None, arch: str) -> Problem:
    """Return that of lists of `rule`; small blocks of a causal local + stride need no lists."""
    if not (isinstance(rule, LocalStride) and rule.causal and rule.block_size in _FINE_BLOCKS):
        return problem
    whole = replace(problem, mask=MaskKind.LOCAL_STRIDE)
    if bwd_spec(whole, arch).tile.block_kv <= rule.block_size:
        return whole
    return replace(problem, mask=MaskKind.FINE_STRIDE)


def specs_of_gradients(
    problem: Problem, rule: Rule | None, scores: Scores, arch: str, *, deterministic: bool
) -> list[KernelSpec]:
    """Return every kernel that the backward pass of a call can need; `rule`: what is listed."""
    own = without_lists(problem, rule, arch)
    specs = specs_of_backward(own, arch, deterministic=deterministic)
    targets = [] if scores.bias is None else [_target_of(scores.bias)]
    if scores.relative_bias is not None or scores.alibi_slopes is not None:
        targets.append(ScoreTarget.DISTANCE)
    return [*specs, *(score_grad_spec(problem, arch, target) for target in targets)]


def _target_of(bias: Tensor) -> ScoreTarget:
    return ScoreTarget.MATRIX if bias.shape[2] > 1 else ScoreTarget.ROW


def _aligned(tensor: Tensor) -> bool:
    units = tensor.data_ptr() | tensor.shape[-1] * tensor.element_size()
    for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True):
        if size > 1:
            units |= stride * tensor.element_size()
    return units & 15 == 0


def _row_stats(
    rows: _Rows,
    out: Tensor,
    lse: Tensor,
    d_out: Tensor,
    d_lse: Tensor | None,
    problem: Problem,
    call: Call,
) -> Tensor:
    """Return LSE base 2 and delta of every row, and what it adds to dsinks: [2 or 3, B, Hq, Lq]."""
    index = out.get_device()
    if out.stride(-1) != 1 and out.shape[-1] > 1:
        out = out.contiguous()
    d_out = d_out.to(out.dtype)
    if d_out.stride(-1) != 1 and d_out.shape[-1] > 1:
        d_out = d_out.contiguous()
    spec = StatsSpec(
        dtype=DTYPES[out.dtype],
        head_dim_v=problem.head_dim_v,
        access=Access.VEC16 if _aligned(out) and _aligned(d_out) else Access.ELEMENT,
        arch=device(index).arch,
    )
    sinks = call.scores.sinks
    stats = out.new_empty(
        (2 if sinks is None else 3, rows.batch, rows.heads, rows.length), dtype=torch.float32
    )
    num_rows = rows.batch * rows.heads * rows.length
    loaded_kernel(spec, index).launch(
        -(-num_rows * spec.lanes // spec.num_threads),
        torch._C._cuda_getCurrentRawStream(index),
        out.data_ptr(),
        d_out.data_ptr(),
        lse.data_ptr(),
        0 if d_lse is None else d_lse.data_ptr(),
        0 if sinks is None else sinks.data_ptr(),
        stats[0].data_ptr(),
        stats[1].data_ptr(),
        0 if sinks is None else stats[2].data_ptr(),
        *rows.strides(out),
        *rows.strides(d_out),
        *rows.stat_strides(lse),
        *((0, 0, 0) if d_lse is None else rows.stat_strides(d_lse)),
        num_rows,
        rows.length,
        rows.heads,
    )
    return stats


def _main(whole: _Pass, dq: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Compute dq, dk and dv."""
    runtime, rows, call = whole.runtime, whole.rows, whole.call
    problem = kernel_problem(whole.problem, runtime, whole.arch)
    if problem.mask is not whole.problem.mask:  # without lists, whose sequences count as different
        corner = runtime.len_kv - runtime.len_q if problem.is_uniform else 0
        runtime = runtime._replace(diagonal=corner, listed=None)
        whole = whole._replace(problem=problem, runtime=runtime)
    spec = bwd_spec(problem, whole.arch, deterministic=call.deterministic)
    tile = spec.tile
    num_q_tiles, num_kv_tiles = whole.num_tiles(problem, tile)
    heads = runtime.batch * runtime.heads_q
    if spec.in_fragments:
        per_head = num_q_tiles * tile.block_q * spec.dq_columns
        dq_sum = dq.new_zeros(heads * per_head, dtype=torch.float32)
        strides = (runtime.heads_q * per_head, 0, per_head)
    else:
        dq_sum = torch.zeros(dq.shape, dtype=torch.float32, device=dq.device)
        strides = rows.strides(dq_sum)
    turns = None
    if call.deterministic:
        turns = torch.zeros(heads * num_q_tiles, dtype=torch.int32, device=dq.device)
    num_ctas = num_kv_tiles * runtime.heads_kv * runtime.batch
    ours = whole.in_halves(problem) if problem.numerics is Numerics.F16X3 else whole
    ours.launch(spec, num_ctas, dq_sum, strides, (dk, dv), turns)

    first_position = 0
    if spec.in_fragments and runtime.listed is not None:  # tiles begin where lists do
        corner = runtime.diagonal
        if runtime.indices is not None and runtime.indices.bottom_right:
            corner += runtime.len_kv - runtime.len_q
        first_position = corner & (tile.block_q - 1)
    rounding = round_spec(spec)
    num_rows = rows.batch * rows.length * rows.heads
    num_threads = num_rows * -(-spec.problem.head_dim // 4)
    if spec.in_fragments:
        columns = padded_head_dim(spec.problem.head_dim) // rounding.column_tiles
        num_threads = heads * num_q_tiles * tile.block_q * columns // 4
    loaded_kernel(rounding, whole.device_index).launch(
        -(-num_threads // rounding.num_threads),
        whole.stream,
        dq_sum.data_ptr(),
        dq.data_ptr(),
        *strides,
        *rows.strides(dq),
        num_rows,
        rows.length,
        rows.heads,
        whole.scale,
        first_position,
    )


def _of_scores(whole: _Pass, wanted: Collection[str]) -> dict[str, Tensor]:
    """Compute the gradients of what is added to scores."""
    found = {}
    scores = whole.call.scores
    if "sinks" in wanted:
        found["sinks"] = whole.stats[2].sum((0, 2))
    if "bias" in wanted and scores.bias is not None:
        found["bias"] = _of_bias(whole, scores.bias)
    relative, slopes = scores.relative_bias, scores.alibi_slopes
    if "relative_bias" in wanted or "alibi_slopes" in wanted:
        sums = _by_distance(whole)
        if "relative_bias" in wanted and relative is not None:
            found["relative_bias"] = _of_relative(sums, relative, whole.runtime.len_kv)
        if "alibi_slopes" in wanted and slopes is not None:
            distance = torch.arange(sums.shape[-1], device=sums.device) - whole.runtime.len_kv
            by_head = -(sums * distance.abs()).sum(-1)
            found["alibi_slopes"] = by_head.sum(0) if slopes.dim() == 1 else by_head
    return found


def _of_bias(whole: _Pass, bias: Tensor) -> Tensor:
    runtime = whole.runtime
    target = _target_of(bias)
    spec = score_grad_spec(whole.problem, whole.arch, target)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = bias.shape[:2]
    # Lists: tiles begin elsewhere in every sequence, so that each needs a gradient of its own.
    differ = runtime.listed is not None and target is ScoreTarget.MATRIX
    differ &= batch == 1 < runtime.batch and whole.problem.q_layout is not SeqLayout.BATCHED
    if differ:
        batch = runtime.batch
    result = bias.new_zeros((batch, *bias.shape[1:]))
    strides = (result.stride(0), result.stride(2), result.stride(1))  # batch, row, head
    num_ctas = num_kv_tiles * batch * heads
    if target is ScoreTarget.MATRIX:
        num_ctas *= num_q_tiles
    whole.launch(spec, num_ctas, result, strides, targets=(batch, heads))
    return result.sum(0, keepdim=True) if differ else result


def _by_distance(whole: _Pass) -> Tensor:
    """Return sums of dS by key - query + Lkv: [B, Hq, Lq + Lkv]."""
    runtime = whole.runtime
    spec = score_grad_spec(whole.problem, whole.arch, ScoreTarget.DISTANCE)
    num_q_tiles, num_kv_tiles = whole.num_tiles(spec.problem, spec.tile)
    batch, heads = runtime.batch, runtime.heads_q
    sums = torch.zeros(
        (2, batch, heads, runtime.len_q + runtime.len_kv),
        dtype=torch.float32,
        device=whole.q.device,
    )
    num_ctas = (num_q_tiles + num_kv_tiles - 1) * batch * heads
    whole.launch(spec, num_ctas, sums, (0, 0, 0), targets=(batch, heads))
    return sums[0] + sums[1]


def _of_relative(sums: Tensor, relative: Tensor, len_kv: int) -> Tensor:
    """From sums by distance to a table whose first and last entries stand for all beyond."""
    by_head = sums.sum(0)
    if relative.shape[0] == 1:
        by_head = by_head.sum(0, keepdim=True)
    reach = relative.shape[1] // 2
    if reach == 0:
        return by_head.sum(1, keepdim=True)
    # Room for every entry on either side: index 0 is distance -len_kv - reach.
    padded = torch.nn.functional.pad(by_head, (reach, reach))
    low, high = len_kv + 1, len_kv + 2 * reach  # after distance -reach, at distance +reach
    return torch.cat(
        (
            padded[:, :low].sum(1, keepdim=True),
            padded[:, low:high],
            padded[:, high:].sum(1, keepdim=True),
        ),
        1,
    )
