"""Plans operand preparation: fp32 operands split into fp16 parts, or INT8 and fp16 quantization.

For long queries, fp32 operands are split into fp16 parts: two each (hi and lo), or one in gears 3
and 4. A kernel splits them (cuda_src/jitattn/prepare/split_fp32.cuh), and the attention kernel
multiplies the parts, at twice the rate of TF32. Other calls take TF32 products: short queries,
sequence layouts and pages, score modifications other than positional masks and key padding, head
dims that are no multiple of 16 or above 128, and other alignments than 16 bytes.

One scale per q row and per 64 k/v rows: beside a finite value 2^20 times as large, other values of
these rows keep 18 bits, and values below 2^-38 of it flush to zero, whether or not a query sees it.
The product of the maxima of q and k must be finite in fp32, and v below 1e28. Keys hidden by key
padding become zeros.

The backward kernel reads two parts of q, k, v and dO, with all score modifications but biases and
dense masks, since keys that these hide may hold anything. Scales there are per 64 rows, of q and dO
too: beside a row of dO 2^20 times as large, dq of another row keeps 18 bits.

Gear 4 quantizes q and k to INT8, for long queries, in two kernels
(cuda_src/jitattn/prepare/quantize.cuh). Paged keys are quantized at every call, into a separate
buffer, never in place: a page that several sequences share is quantized for each, by its own mean.
The output accumulates in fp16 over 2048 keys at a time
(cuda_src/jitattn/tile/two_level_accumulator.cuh). For that, v is converted to fp16 with a
power-of-two scale per head, chosen by its largest finite value: values keep 11 bits down to 2^-14
of it, and the smallest that remain are 2^-25 of it. Paged v stays in place, and sums are in fp32,
as where v's head dim differs from that of q and k. Other calls have the numerics of gear 3: short
queries, above all decoding steps, which would have to read K twice; sequences that may share rows
of one tensor; problems without such a kernel (jitattn/kernels/operands.py); and, decided before
(jitattn/plan/forward.py), calls that the wgmma kernels of sm_90 serve.

Memory: two fp16 parts take as much as q, k, v and dO, one part half of it. INT8 takes half the
memory of q and k, all of v's, 8 bytes per row of q, and 12 bytes per channel for every 512 rows and
for every sequence; paged keys count as if all sequences had the longest length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.errors import UnsupportedError
from jitattn.jit.launch import MAX_GRID
from jitattn.kernels.bwd_tiles import backward_problem
from jitattn.kernels.operands import (
    BLOCK_KEYS,
    problem_in_8_bits,
    split_fp32_backward,
    split_fp32_problem,
)
from jitattn.kernels.quantize import CHUNK_ROWS, quantize_specs
from jitattn.kernels.split_fp32 import split_fp32_spec
from jitattn.plan import arguments
from jitattn.plan.step import Buffer, Place, Plan, Step
from jitattn.spec.enums import Dtype, Numerics, RowClass, Switch
from jitattn.values.gears import gear_of

if TYPE_CHECKING:
    from collections.abc import Mapping

    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

#: Least multiply-adds of QK^T per sequence that pay for the split kernel. us on an H200, 16 heads,
#: D=64, parts and TF32: 256 rows on 4096 keys (2^30) 127 and 143, 128 rows (2^29) 91 and 89, 512 on
#: 512 (2^28) 42 and 43.
LEAST_PRODUCTS: Final = 1 << 29
#: The bound for a backward pass, with five products to the forward pass's two. us at 4 x 1024, 8
#: heads, D=64 (2^29): 456, TF32 673.
LEAST_BACKWARD_PRODUCTS: Final = 1 << 28
_OPERANDS: Final = {name: Place(name) for name in ("q", "k", "v")}
_SCALES: Final = ("q_scale", "k_scale", "v_scale")


class Prepared(NamedTuple):
    """Operands for the attention kernel, with the launches and buffers that prepare them."""

    problem: Problem
    runtime: Runtime
    plan: Plan
    inputs: Mapping[str, Place]  #: q, k and v
    scale_numbers: Mapping[str, float]
    scale_places: Mapping[str, Place]
    along_mean: str = ""  #: buffer of q times the mean of K, which is added to the LSE


def operands(problem: Problem, runtime: Runtime, call: Call, arch: str) -> Prepared:
    """Return the operands of the forward kernel, prepared if the call qualifies."""
    chosen = kernel_problem(problem, runtime, call, arch)
    if chosen is None:
        return Prepared(problem, runtime, Plan((), {}), _OPERANDS, {}, {})
    if not chosen.has_scores:  # drops the fixed shift of cosine attention
        runtime = runtime._replace(scores=None)
    return (
        quantized(chosen, runtime, arch)
        if chosen.numerics.is_quantized
        else split(chosen, runtime, arch)
    )


def kernel_problem(problem: Problem, runtime: Runtime, call: Call, arch: str) -> Problem | None:
    """Return the problem of the kernel for prepared operands; None if the call uses its own."""
    rows = runtime.len_q * (runtime.heads_q // max(1, runtime.heads_kv))
    if rows <= RowClass.ROWS64 or call.tile_rows in (16, 64) or runtime.scale < 0:
        return None
    if problem.dtype is Dtype.FP32:
        # Not the batch size: with a fixed split count a sequence's result is the same in any batch.
        is_short = _products(problem, runtime) < LEAST_PRODUCTS
        return None if is_short else split_fp32_problem(problem)
    if gear_of(call.gear, problem.dtype) != 4 or runtime.len_kv == 0 or not runtime.rows_are_apart:
        return None
    return problem_in_8_bits(problem, arch)


def backward_kernel_problem(problem: Problem, runtime: Runtime) -> Problem | None:
    """Return the problem of the backward kernel for fp16 parts; None if the call has none."""
    if _products(problem, runtime) < LEAST_BACKWARD_PRODUCTS:
        return None
    return split_fp32_backward(backward_problem(problem))


def _products(problem: Problem, runtime: Runtime) -> int:
    return runtime.heads_q * runtime.len_q * runtime.len_kv * problem.head_dim


def split(
    problem: Problem, runtime: Runtime, arch: str, d_out_strides: Strides | None = None
) -> Prepared:
    """Plan the split of q, k and v into fp16 parts; with `d_out_strides` of dO too, for backward.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    batch, heads_q, heads_kv = runtime.batch, runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    has_d_out = d_out_strides is not None
    spec = split_fp32_spec(problem, arch, gradients=has_d_out)
    blocks_q, blocks_kv = -(-len_q // BLOCK_KEYS), -(-len_kv // BLOCK_KEYS)
    dim, dim_v = spec.num_parts * problem.head_dim, spec.num_parts * problem.head_dim_v
    scales_of_q = (batch, heads_q, blocks_q if has_d_out else len_q)
    buffers = {
        "q_parts": Buffer((batch, heads_q, len_q, dim), "fp16"),
        "k_parts": Buffer((batch, heads_kv, len_kv, dim), "fp16"),
        "v_parts": Buffer((batch, heads_kv, len_kv, dim_v), "fp16"),
        "q_scale": Buffer(scales_of_q, "fp32"),
        "k_scale": Buffer((batch, heads_kv, blocks_kv), "fp32"),
        "v_scale": Buffer((batch, heads_kv, blocks_kv), "fp32"),
    }
    names = ("q", "k", "v")
    if has_d_out:
        buffers["d_out_parts"] = Buffer((batch, heads_q, len_q, dim_v), "fp16")
        buffers["d_out_part_scale"] = Buffer(scales_of_q, "fp32")
    num_ctas = batch * ((2 if has_d_out else 1) * heads_q * blocks_q + 2 * heads_kv * blocks_kv)
    if num_ctas > MAX_GRID:
        raise UnsupportedError(
            f"q, k and v need {num_ctas} CTAs to be split: a grid has at most 2**31 - 1; split the "
            "batch"
        )
    numbers: dict[str, float] = {
        **arguments.strides("q", runtime.q_strides),
        **arguments.strides("k", runtime.k_strides),
        **arguments.strides("v", runtime.v_strides),
        **arguments.strides("d_out", d_out_strides or (0, 0, 0)),
        "key_padding_stride": 0,
        "batch": batch,
        "len_q": len_q,
        "len_kv": len_kv,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
    }
    places = {
        **_OPERANDS,
        **{f"{name}_out": Place(f"{name}_parts") for name in names},
        **{name: Place(name) for name in _SCALES},
    }
    if has_d_out:
        places |= {
            "d_out": Place("d_out"),
            "d_out_out": Place("d_out_parts"),
            "d_out_scale": Place("d_out_part_scale"),
        }
    else:
        numbers |= dict.fromkeys(("d_out", "d_out_out", "d_out_scale"), 0)
    if problem.key_padding is Switch.ON:
        of_scores, places_of_scores = arguments.scores(runtime)
        numbers["key_padding_stride"] = of_scores["key_padding_stride"]
        if "key_padding" in places_of_scores:
            places["key_padding"] = Place("key_padding")
    if "key_padding" not in places:
        numbers["key_padding"] = 0
    runtime = runtime._replace(
        q_strides=buffers["q_parts"].strides(),
        k_strides=buffers["k_parts"].strides(),
        v_strides=buffers["v_parts"].strides(),
    )
    scale_numbers: dict[str, float] = {"q_scale_stride_batch": 0, "q_scale_stride_head": 0}
    if not has_d_out:
        scale_numbers = _scale_strides(buffers["q_scale"])
    return Prepared(
        problem,
        runtime,
        Plan((Step(spec, num_ctas, numbers, places),), buffers),
        {name: Place(f"{name}_parts") for name in names},
        scale_numbers,
        {name: Place(name) for name in _SCALES},
    )


def quantized(problem: Problem, runtime: Runtime, arch: str) -> Prepared:
    """Plan INT8 quantization of q and k, and of v to fp16 where the kernel accumulates in fp16.

    Raises
    ------
    UnsupportedError
        More CTAs are needed than a grid has.
    """
    batch, dim = runtime.batch, problem.head_dim
    heads_q, heads_kv = runtime.heads_q, runtime.heads_kv
    len_q, len_kv = runtime.len_q, runtime.len_kv
    numbers, places = arguments.sequences(runtime)
    del numbers["bottom_right"]
    rows_q = int(numbers["q_rows"])
    rows_kv = len_kv if problem.kv_layout.page_group else int(numbers["kv_rows"])  # unpaged copy
    flat = (runtime.q_is_flat, runtime.k_is_flat)
    rows_of_q = (1 if flat[0] else batch, heads_q, rows_q)
    rows_of_k = (1 if flat[1] else batch, heads_kv, rows_kv)
    has_v = problem.numerics is Numerics.INT8_F16
    sides = ((heads_q, len_q), (heads_kv, len_kv))
    chunks = sum(batch * heads * -(-length // CHUNK_ROWS) for heads, length in sides)
    slots = [
        heads * (rows // CHUNK_ROWS + batch if is_flat else batch * -(-length // CHUNK_ROWS))
        for (heads, length), rows, is_flat in zip(sides, (rows_q, rows_kv), flat, strict=True)
    ]  # as ChunkSlots in quantize.cuh has them
    blocks = sum(batch * heads * -(-length // BLOCK_KEYS) for heads, length in sides)
    if max(chunks, blocks) > MAX_GRID:
        raise UnsupportedError(
            f"gear=4 needs {blocks} CTAs to bring q and k to 8 bits: a grid has at most 2**31 - 1; "
            "split the batch"
        )
    buffers = {
        "q_8": Buffer((*rows_of_q, dim), "int8"),
        "k_8": Buffer((*rows_of_k, dim), "int8"),
        "q_scale": Buffer(rows_of_q, "fp32"),
        "k_scale": Buffer((batch, heads_kv, -(-len_kv // BLOCK_KEYS)), "fp32"),
        # Rows that belong to no sequence are read as well.
        "along_mean": Buffer(rows_of_q, "fp32", is_zeroed=runtime.indices is not None),
        "channels": Buffer((batch, heads_kv, 2, dim), "fp32"),
        "partials": Buffer((sum(slots) * 3 * dim + slots[1],), "fp32"),
    }
    numbers |= {
        **arguments.strides("q", runtime.q_strides),
        **arguments.strides("k", runtime.k_strides),
        **arguments.strides("v", runtime.v_strides),
        "batch": batch,
        "len_q": len_q,
        "len_kv": len_kv,
        "heads_q": heads_q,
        "heads_kv": heads_kv,
        "q_is_flat": flat[0],
        "k_is_flat": flat[1],
    }
    places |= {"q": Place("q"), "k": Place("k"), "q_out": Place("q_8"), "k_out": Place("k_8")}
    names = ("q_scale", "k_scale", "along_mean", "channels", "partials")
    places |= {name: Place(name) for name in names}
    places["arrivals"] = Place("counters")
    inputs = {"q": Place("q_8"), "k": Place("k_8"), "v": Place("v")}
    scale_numbers, scale_places = _scale_strides(buffers["q_scale"]), {}
    scale_places = {name: Place(name) for name in ("q_scale", "k_scale")}
    runtime = runtime._replace(
        q_strides=buffers["q_8"].strides(), k_strides=buffers["k_8"].strides()
    )
    if has_v:
        buffers["v_16"] = Buffer((*rows_of_k, dim), "fp16")
        buffers["v_scale"] = Buffer((batch, heads_kv), "fp32")
        places |= {"v": Place("v"), "v_out": Place("v_16"), "v_scale": Place("v_scale")}
        inputs["v"], scale_places["v_scale"] = Place("v_16"), Place("v_scale")
        runtime = runtime._replace(v_strides=buffers["v_16"].strides())
    else:
        numbers |= dict.fromkeys(("v", "v_out", "v_scale"), 0)
        scale_numbers["v_scale"] = 0
    steps = tuple(
        Step(spec, num_ctas, numbers, places)
        for spec, num_ctas in zip(quantize_specs(problem, arch), (chunks, blocks), strict=True)
    )
    return Prepared(
        problem,
        runtime,
        Plan(steps, buffers, batch * heads_kv),
        inputs,
        scale_numbers,
        scale_places,
        "along_mean",
    )


def _scale_strides(q_scale: Buffer) -> dict[str, float]:
    batch, _, head = q_scale.strides()
    return {"q_scale_stride_batch": batch, "q_scale_stride_head": head}
