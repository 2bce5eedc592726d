"""fp32 operands as fp16 parts, for long queries on a GPU: two each, or one in gears 3 and 4.

A kernel makes the parts (cuda_src/jitattn/split_halves.cuh), then the forward kernel multiplies
these, at twice the rate of TF32. Calls that this does not serve take TF32 products: short
queries, sequences of their own and pages, whatever is done with scores but masks of positions, head
dims that are no multiple of 16 or above 128, other alignments than 16 bytes.

A scale is of one row of q, and of 64 rows of a head of k or v: beside a finite number that is 2^20
times as large, others of these rows keep 18 bits, and 2^-38 of it is the least that is left,
whether or not a query sees that number. The product of the largest of q and of k must be a number
of fp32, and v below 1e28.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit import launch
from jitattn.jit.device import device
from jitattn.jit.enums import RowClass
from jitattn.loaded import loaded_kernel
from jitattn.prepared_specs import BLOCK_KEYS, problem_in_halves, split_spec

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.jit.spec import Problem
    from jitattn.problem import Call, Runtime

#: Products of a sequence's q and k, of two numbers each, that make up for a kernel more. us on an
#: H200, 16 heads, D=64, parts and TF32: 256 rows on 4096 keys (2^30) 127 and 143, 128 rows (2^29)
#: 91 and 89, 512 on 512 (2^28) 42 and 43.
LEAST_PRODUCTS: Final = 1 << 29


class Halves(NamedTuple):
    """q, k and v as fp16 parts, and what undoes their scales."""

    q: Tensor  #: [B, Hq, Lq, parts * D]
    k: Tensor  #: [B, Hkv, Lkv, parts * D]
    v: Tensor  #: [B, Hkv, Lkv, parts * Dv]
    q_scale: Tensor  #: [B, Hq, Lq]
    k_scale: Tensor  #: [B, Hkv, ceil(Lkv / 64)]
    v_scale: Tensor  #: as k_scale


def problem_of(problem: Problem, runtime: Runtime, call: Call) -> Problem | None:
    """Return the problem of the kernel for fp16 parts, if that serves the call."""
    rows = runtime.len_q * (runtime.heads_q // max(1, runtime.heads_kv))
    if rows <= RowClass.ROWS64 or call.tile_rows in (16, 64):
        return None
    # Not the batch: a sequence has the same bits in any, with a fixed number of splits.
    scores = runtime.heads_q * runtime.len_q * runtime.len_kv
    if scores * problem.head_dim < LEAST_PRODUCTS or runtime.scale < 0:
        return None
    return problem_in_halves(problem)


def split(q: Tensor, k: Tensor, v: Tensor, problem: Problem, runtime: Runtime) -> Halves:
    """Make the parts on the device of q, in the current stream.

    They take as much memory as q, k and v; one part of each half of it. A tensor that is expanded
    counts as if it were not.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    index = q.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    batch, heads_q, heads_kv = runtime.batch, runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    spec = split_spec(problem, device(index).arch)
    blocks_q, blocks_kv = -(-len_q // BLOCK_KEYS), -(-len_kv // BLOCK_KEYS)

    def halves(heads: int, length: int, dim: int) -> Tensor:
        shape = (batch, heads, length, spec.num_parts * dim)
        return torch.empty(shape, dtype=torch.float16, device=q.device)

    def scales(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.float32, device=q.device)

    made = Halves(
        halves(heads_q, len_q, problem.head_dim),
        halves(heads_kv, len_kv, problem.head_dim),
        halves(heads_kv, len_kv, problem.head_dim_v),
        scales(batch, heads_q, len_q),
        scales(batch, heads_kv, blocks_kv),
        scales(batch, heads_kv, blocks_kv),
    )
    num_ctas = batch * (heads_q * blocks_q + 2 * heads_kv * blocks_kv)
    if num_ctas > launch.MAX_GRID:
        raise UnsupportedError(
            f"q, k and v need {num_ctas} CTAs to be split: a grid has at most 2**31 - 1; split the "
            "batch"
        )
    loaded_kernel(spec, index).launch(
        num_ctas,
        stream,
        q.data_ptr(),
        k.data_ptr(),
        v.data_ptr(),
        *(tensor.data_ptr() for tensor in made),
        *runtime.q_strides,
        *runtime.k_strides,
        *runtime.v_strides,
        batch,
        len_q,
        len_kv,
        heads_q,
        heads_kv,
        0,
    )
    return made
