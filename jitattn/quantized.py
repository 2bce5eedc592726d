"""Gear 4: Q and K in 8 bits, for long queries on a GPU.

Two kernels bring Q and K to 8 bits (cuda_src/jitattn/quantize.cuh), then the forward kernel reads
these. Calls that this does not serve have the numerics of gear 3: short queries, which would wait
for K to be read twice; sequences that may share rows; and problems without a kernel for it
(jitattn/prepared_specs.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from jitattn.errors import UnsupportedError
from jitattn.jit import launch
from jitattn.jit.device import device
from jitattn.jit.enums import RowClass
from jitattn.loaded import loaded_kernel
from jitattn.prepared_specs import BLOCK_KEYS, CHUNK_ROWS, problem_in_8_bits, specs_of_rounding
from jitattn.sequences import Padded, Ragged
from jitattn.workspace import arrivals

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.jit.spec import Problem
    from jitattn.problem import Call, Runtime


class Quantized(NamedTuple):
    """Q and K in 8 bits, and their scales. A flat tensor is a batch of one."""

    q: Tensor  #: [B, Hq, Lq, D]
    k: Tensor  #: [B, Hkv, Lkv, D]
    q_scale: Tensor  #: [B, Hq, Lq]
    k_scale: Tensor  #: [B, Hkv, ceil(Lkv / 64)], of sequences
    along_mean: Tensor  #: [B, Hq, Lq]: q times the mean of K, which the LSE gets back


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
    """Whether no row is of two sequences, which would have its 8 bits twice."""
    if isinstance(seqs, Ragged):
        return not seqs.stop_is_length  # cumulative lengths
    return seqs is None or (isinstance(seqs, Padded) and seqs.batch_idx is None)


def quantize(q: Tensor, k: Tensor, problem: Problem, runtime: Runtime) -> Quantized:
    """Bring q and k to 8 bits, on their device, in the current stream.

    Beside the results, which take half the memory of q and k, and 8 bytes a row of q, this takes
    12 bytes a channel for every 512 rows and for every sequence.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    index = q.get_device()
    stream = torch._C._cuda_getCurrentRawStream(index)
    batch, dim = runtime.batch, problem.head_dim
    heads_q, heads_kv = runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    spans: tuple[int, ...] = (0, 0, 0, 0)
    words: tuple[int, ...] = (1, 1, 1, 1)
    rows_q, rows_kv, is_sparse = len_q, len_kv, runtime.indices is not None
    if runtime.indices is not None:
        counts = runtime.indices.counts
        spans, words = runtime.indices.addresses[:4], (*counts[:2], *counts[3:5])
        rows_q, rows_kv = counts[5:7]

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=q.device)

    flat = (q.dim() == 3, k.dim() == 3)
    rows_of_q = (1 if flat[0] else batch, heads_q, rows_q)
    made = Quantized(
        new(*rows_of_q, dim, dtype=torch.int8),
        new(1 if flat[1] else batch, heads_kv, rows_kv, dim, dtype=torch.int8),
        new(*rows_of_q),
        new(batch, heads_kv, -(-len_kv // BLOCK_KEYS)),
        new(*rows_of_q),
    )
    if is_sparse:
        made.along_mean.zero_()  # it is added to the LSE of rows of no sequence too
    sides = ((heads_q, len_q), (heads_kv, len_kv))
    channels = new(batch, heads_kv, 2, dim)
    chunks = sum(batch * heads * -(-length // CHUNK_ROWS) for heads, length in sides)
    slots = sum(
        heads * (rows // CHUNK_ROWS + batch if is_flat else batch * -(-length // CHUNK_ROWS))
        for (heads, length), rows, is_flat in zip(sides, (rows_q, rows_kv), flat, strict=True)
    )  # as ChunkSlots in quantize.cuh has them
    partials = new(slots, 3, dim)
    blocks = sum(batch * heads * -(-length // BLOCK_KEYS) for heads, length in sides)
    if max(chunks, blocks) > launch.MAX_GRID:
        raise UnsupportedError(
            f"gear=4 needs {blocks} CTAs to bring q and k to 8 bits: a grid has at most 2**31 - 1; "
            "split the batch"
        )
    stats, rounding = specs_of_rounding(problem, device(index).arch)
    for spec, num_ctas in ((stats, chunks), (rounding, blocks)):
        loaded_kernel(spec, index).launch(
            num_ctas,
            stream,
            q.data_ptr(),
            k.data_ptr(),
            *(tensor.data_ptr() for tensor in made),
            channels.data_ptr(),
            partials.data_ptr(),
            arrivals(batch * heads_kv, index, stream),
            *spans,
            *runtime.q_strides,
            *runtime.k_strides,
            batch,
            len_q,
            len_kv,
            heads_q,
            heads_kv,
            *flat,
            *words,
            rows_q,
            rows_kv,
            0,
        )
    return made
