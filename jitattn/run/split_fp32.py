"""fp32 operands as fp16 parts, for long queries on a GPU: two each, or one in gears 3 and 4.

A kernel makes the parts (cuda_src/jitattn/split_halves.cuh), then the forward kernel multiplies
these, at twice the rate of TF32. Calls that this does not serve take TF32 products: short
queries, sequences of their own and pages, whatever is done with scores but masks of positions and
key padding, head dims that are no multiple of 16 or above 128, other alignments than 16 bytes.

A scale is of one row of q, and of 64 rows of a head of k or v: beside a finite number that is 2^20
times as large, others of these rows keep 18 bits, and 2^-38 of it is the least that is left,
whether or not a query sees that number. The product of the largest of q and of k must be a number
of fp32, and v below 1e28.

Keys that key padding hides become zeros, whatever they hold.

The backward kernel has two parts of q, k, v and dO, whatever is done with scores but biases and
dense masks, which may hide keys that hold anything. All scales are of 64 rows there, of q and dO
too: beside a row of dO that is 2^20 times as large, dq of another keeps 18 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit import backend, launch
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.bwd_tiles import backward_problem
from jitattn.kernels.prepare_specs import (
    BLOCK_KEYS,
    backward_in_halves,
    problem_in_halves,
    split_spec,
)
from jitattn.spec.enums import RowClass, Switch
from jitattn.spec.params import FWD_SCORE_FIELDS

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

#: Products of a sequence's q and k, of two numbers each, that make up for a kernel more. us on an
#: H200, 16 heads, D=64, parts and TF32: 256 rows on 4096 keys (2^30) 127 and 143, 128 rows (2^29)
#: 91 and 89, 512 on 512 (2^28) 42 and 43.
LEAST_PRODUCTS: Final = 1 << 29
#: The same of a backward pass, which has five products to the forward pass's two. us at 4 x 1024, 8
#: heads, D=64 (2^29): 456, TF32 673.
LEAST_BACKWARD_PRODUCTS: Final = 1 << 28
_KEY_PADDING: Final = [name for name, _ in FWD_SCORE_FIELDS].index("key_padding")
_PADDING_STRIDE: Final = [name for name, _ in FWD_SCORE_FIELDS].index("key_padding_stride")


class Halves(NamedTuple):
    """q, k and v as fp16 parts, for a backward kernel dO too, and what undoes their scales."""

    q: Tensor  #: [B, Hq, Lq, parts * D]
    k: Tensor  #: [B, Hkv, Lkv, parts * D]
    v: Tensor  #: [B, Hkv, Lkv, parts * Dv]
    q_scale: Tensor  #: [B, Hq, Lq]; with dO [B, Hq, ceil(Lq / 64)]
    k_scale: Tensor  #: [B, Hkv, ceil(Lkv / 64)]
    v_scale: Tensor  #: as k_scale
    d_out: Tensor | None = None  #: [B, Hq, Lq, parts * Dv]
    d_out_scale: Tensor | None = None  #: as q_scale


def problem_of(problem: Problem, runtime: Runtime, call: Call) -> Problem | None:
    """Return the problem of the kernel for fp16 parts, if that serves the call."""
    rows = runtime.len_q * (runtime.heads_q // max(1, runtime.heads_kv))
    if rows <= RowClass.ROWS64 or call.tile_rows in (16, 64):
        return None
    # Not the batch: a sequence has the same bits in any, with a fixed number of splits.
    if _products(problem, runtime) < LEAST_PRODUCTS or runtime.scale < 0:
        return None
    return problem_in_halves(problem)


def backward_problem_of(problem: Problem, runtime: Runtime) -> Problem | None:
    """Return the problem of the backward kernel for fp16 parts, if that serves the call."""
    if _products(problem, runtime) < LEAST_BACKWARD_PRODUCTS:
        return None
    return backward_in_halves(backward_problem(problem))


def _products(problem: Problem, runtime: Runtime) -> int:
    return runtime.heads_q * runtime.len_q * runtime.len_kv * problem.head_dim


def split(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    runtime: Runtime,
    d_out: Tensor | None = None,
    d_out_strides: Strides = (0, 0, 0),
) -> Halves:
    """Make the parts on the device of q, in the current stream; with d_out, for a backward kernel.

    They take as much memory as q, k, v and d_out; one part of each half of it. A tensor that is
    expanded counts as if it were not.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    index = q.get_device()
    stream = backend.active.stream(index)
    batch, heads_q, heads_kv = runtime.batch, runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    spec = split_spec(problem, device(index).arch, gradients=d_out is not None)
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
        scales(batch, heads_q, len_q if d_out is None else blocks_q),
        scales(batch, heads_kv, blocks_kv),
        scales(batch, heads_kv, blocks_kv),
    )
    if d_out is not None:
        made = made._replace(
            d_out=halves(heads_q, len_q, problem.head_dim_v),
            d_out_scale=scales(batch, heads_q, blocks_q),
        )
    padding, padding_stride = 0, 0
    if problem.key_padding is Switch.ON:
        padding = int(runtime.score_params[_KEY_PADDING])
        padding_stride = int(runtime.score_params[_PADDING_STRIDE])
    per_q = 1 if d_out is None else 2
    num_ctas = batch * (per_q * heads_q * blocks_q + 2 * heads_kv * blocks_kv)
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
        0 if d_out is None else d_out.data_ptr(),
        padding,
        *_addresses(made.q, made.k, made.v, made.d_out),
        *_addresses(made.q_scale, made.k_scale, made.v_scale, made.d_out_scale),
        *runtime.q_strides,
        *runtime.k_strides,
        *runtime.v_strides,
        *d_out_strides,
        padding_stride,
        batch,
        len_q,
        len_kv,
        heads_q,
        heads_kv,
        0,
    )
    return made


def _addresses(*tensors: Tensor | None) -> tuple[int, ...]:
    return tuple(0 if tensor is None else tensor.data_ptr() for tensor in tensors)
