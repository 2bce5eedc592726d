"""Gear 4: Q and K in 8 bits, for long queries on a GPU.

Two kernels bring Q and K to 8 bits (cuda_src/jitattn/quantize.cuh), then the forward kernel reads
these. Keys in pages come to 8 bits at every call, and outside the pages, which nothing writes to: a
page that several sequences share comes once for each, as each has a mean of its own.

The output is summed in fp16, of 2048 keys at a time (cuda_src/jitattn/tile/parked_sums.cuh). For
that, v comes to fp16 with a power of two for each head, which its largest finite number decides:
beside that, numbers keep 11 bits down to 2^-14 of it, and 2^-25 is the least that is left. In pages
v stays where it is, and sums are in fp32, as where v is not as wide as q and k.

Calls that this does not serve have the numerics of gear 3: short queries, a decoding step above
all, which would wait for K to be read twice; sequences that may share rows of one tensor; and
problems without a kernel for it (jitattn/kernels/prepare_specs.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit import backend, launch
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.kernels.prepare_specs import (
    BLOCK_KEYS,
    CHUNK_ROWS,
    problem_in_8_bits,
    specs_of_rounding,
)
from jitattn.run.workspace import arrivals
from jitattn.spec.enums import Numerics, RowClass
from jitattn.spec.params import divisor
from jitattn.values.sequences import Padded, Paged, Ragged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import Problem


#: Starts, stops and block table of sequences that fill a batch.
_NOWHERE: Final = (0,) * 6


class Quantized(NamedTuple):
    """Q and K in 8 bits, and their scales. A flat tensor is a batch of one."""

    q: Tensor  #: [B, Hq, Lq, D]
    k: Tensor  #: [B, Hkv, Lkv, D]; of pages too, where Lkv is the bound on the lengths
    q_scale: Tensor  #: [B, Hq, Lq]
    k_scale: Tensor  #: [B, Hkv, ceil(Lkv / 64)], of sequences
    along_mean: Tensor  #: [B, Hq, Lq]: q times the mean of K, which the LSE gets back
    v: Tensor | None  #: as k, fp16; None: v stays as it is
    v_scale: Tensor | None  #: [B, Hkv], undoes that of v


def problem_of(problem: Problem, runtime: Runtime, call: Call, arch: str) -> Problem | None:
    """Return the problem of the kernel for 8 bits, if that serves the call."""
    rows = runtime.len_q * (runtime.heads_q // max(1, runtime.heads_kv))
    is_short = rows <= RowClass.ROWS64 or call.tile_rows in (16, 64)
    if is_short or runtime.len_kv == 0 or runtime.scale < 0:
        return None
    if not (_are_apart(call.q_seqs) and _are_apart(call.kv_seqs)):
        return None
    return problem_in_8_bits(problem, arch)


def _are_apart(seqs: object) -> bool:
    """Whether no row is of two sequences, or each has 8 bits of its own of such a row."""
    if isinstance(seqs, Ragged):
        return not seqs.stop_is_length  # cumulative lengths
    if isinstance(seqs, Padded):
        return seqs.batch_idx is None
    return seqs is None or isinstance(seqs, Paged)


def quantize(q: Tensor, k: Tensor, v: Tensor, problem: Problem, runtime: Runtime) -> Quantized:
    """Bring q and k to 8 bits, and v to fp16, on their device, in the current stream.

    Beside the results, which take half the memory of q and k, all that v takes, and 8 bytes a row
    of q, this takes 12 bytes a channel for every 512 rows and for every sequence. Of keys in pages,
    whose lengths the device knows, results take what all sequences would have with the longest
    (`Paged` bounds it), and v none.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    index = q.get_device()
    stream = backend.active.stream(index)
    batch, dim = runtime.batch, problem.head_dim
    heads_q, heads_kv = runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    addresses: tuple[int, ...] = _NOWHERE
    counts: tuple[int, ...] = (1, 1, 1, 1, 1, len_q, len_kv, 0, 1, *divisor(1))
    is_sparse = runtime.indices is not None
    if runtime.indices is not None:
        addresses, counts = runtime.indices.addresses, runtime.indices.counts
    rows_q, rows_kv = counts[5:7]
    if problem.kv_layout.page_group:
        rows_kv = len_kv  # out of their pages

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    flat = (q.dim() == 3, k.dim() == 3)
    rows_of_q = (1 if flat[0] else batch, heads_q, rows_q)
    rows_of_k = (1 if flat[1] else batch, heads_kv, rows_kv)
    has_v = problem.numerics is Numerics.INT8_F16
    made = Quantized(
        new(*rows_of_q, dim, dtype=torch.int8),
        new(*rows_of_k, dim, dtype=torch.int8),
        new(*rows_of_q),
        new(batch, heads_kv, -(-len_kv // BLOCK_KEYS)),
        new(*rows_of_q),
        new(*rows_of_k, dim, dtype=torch.float16) if has_v else None,
        new(batch, heads_kv) if has_v else None,
    )
    if is_sparse:
        made.along_mean.zero_()  # it is added to the LSE of rows of no sequence too
    sides = ((heads_q, len_q), (heads_kv, len_kv))
    channels = new(batch, heads_kv, 2, dim)
    chunks = sum(batch * heads * -(-length // CHUNK_ROWS) for heads, length in sides)
    slots = [
        heads * (rows // CHUNK_ROWS + batch if is_flat else batch * -(-length // CHUNK_ROWS))
        for (heads, length), rows, is_flat in zip(sides, (rows_q, rows_kv), flat, strict=True)
    ]  # as ChunkSlots in quantize.cuh has them
    partials = new(sum(slots) * 3 * dim + slots[1])
    blocks = sum(batch * heads * -(-length // BLOCK_KEYS) for heads, length in sides)
    if max(chunks, blocks) > launch.MAX_GRID:
        raise UnsupportedError(
            f"gear=4 needs {blocks} CTAs to bring q and k to 8 bits: a grid has at most 2**31 - 1; "
            "split the batch"
        )
    stats, rounding = specs_of_rounding(problem, device(index).arch)
    counters = arrivals(batch * heads_kv, index, stream)  # of the first
    for spec, num_ctas in ((stats, chunks), (rounding, blocks)):
        loaded_kernel(spec, index).launch(
            num_ctas,
            stream,
            q.data_ptr(),
            k.data_ptr(),
            v.data_ptr() if has_v else 0,
            made.q.data_ptr(),
            made.k.data_ptr(),
            0 if made.v is None else made.v.data_ptr(),
            made.q_scale.data_ptr(),
            made.k_scale.data_ptr(),
            made.along_mean.data_ptr(),
            channels.data_ptr(),
            0 if made.v_scale is None else made.v_scale.data_ptr(),
            partials.data_ptr(),
            counters,
            *addresses,
            *runtime.q_strides,
            *runtime.k_strides,
            *runtime.v_strides,
            batch,
            len_q,
            len_kv,
            heads_q,
            heads_kv,
            *flat,
            *counts,
        )
    return made
