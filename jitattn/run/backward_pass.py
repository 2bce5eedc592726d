"""One backward pass on a GPU: its operands, and how its kernels are launched."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.errors import UnsupportedError
from jitattn.jit import launch
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.request import block_lists as lists
from jitattn.run import split_fp32 as halves
from jitattn.run.prepare import strides_of
from jitattn.spec.enums import MaskKind, Switch
from jitattn.spec.params import FWD_SEQ_FIELDS

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.run.kv_parts import KvTarget
    from jitattn.run.split_fp32 import Halves
    from jitattn.spec.kernel_spec import BwdSpec, BwdTile, Problem, ScoreGradSpec

_LOG2_E: Final = math.log2(math.e)
_TINY_SCALE: Final = 1e-30
_NO_SEQUENCES: Final = (0,) * len(FWD_SEQ_FIELDS)
_ALL_TILES: Final = 2**31 - 1


class Rows(NamedTuple):
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


class Pass(NamedTuple):
    """What every launch of a backward pass needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    d_out: Tensor
    stats: Tensor
    problem: Problem
    runtime: Runtime
    call: Call
    rows: Rows
    arch: str
    device_index: int
    stream: int
    d_out_strides: Strides
    #: [2], on the device: by which d_out and delta are scaled, and its inverse; None: not at all
    d_out_scale: Tensor | None = None
    parts: Halves | None = None  #: what q, k, v and d_out are then

    def in_halves(self, problem: Problem) -> Pass:
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

    def scale_address(self, idx: int) -> int:
        """Return the address of the scale of d_out, or (1) of its inverse; 0 if there is none."""
        return 0 if self.d_out_scale is None else self.d_out_scale.data_ptr() + 4 * idx

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
        kv_targets: tuple[KvTarget, KvTarget] | None = None,
        turns: Tensor | None = None,
        targets: tuple[int, int] = (0, 0),
        num_q_splits: int = 1,
        in_parts: int = 0,
        q_tiles: tuple[int, int] = (0, _ALL_TILES),
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
        between_splits: tuple[int, ...] = (0, 0)
        if kv_targets is not None:
            written = tuple(one.tensor.data_ptr() for one in kv_targets)
            strides = tuple(step for one in kv_targets for step in one.strides[1:])
            between_splits = tuple(one.strides.split for one in kv_targets)
        rest = self.stats[2].data_ptr() if spec.problem.sinks is Switch.ON else 0
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
            rest,
            self.scale_address(0),
            target.data_ptr(),
            *written,
            0 if turns is None else turns.data_ptr(),
            *self.d_out_strides,
            *strides,
            *between_splits,
            *target_strides,
            *self.rows.stat_strides(self.stats[0])[:2],
            num_kv_tiles,
            num_q_splits,
            in_parts,
            *q_tiles,
            self.scale,
            *targets,
            *of_d_out,
        )
