"""Operands that kernels make for the forward kernel: fp16 parts of fp32, or Q and K in 8 bits.

`halves.py` and `quantized.py` say which calls have them, and launch these kernels;
`prepared_specs.py` lists the kernels.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from jitattn.jit.device import device
from jitattn.run import quantize as quantized
from jitattn.run import split_fp32 as halves
from jitattn.spec.enums import Dtype
from jitattn.values.gears import gear_of

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import Problem


class Prepared(NamedTuple):
    """What the forward kernel is launched with instead of a call's own."""

    q: Tensor
    k: Tensor
    v: Tensor
    problem: Problem
    runtime: Runtime
    scales: tuple[Tensor, Tensor, Tensor | None]  #: of q, k and v
    along_mean: Tensor | None  #: what the LSE lacks, unscaled: [B, Hq, Lq] or [1, Hq, total]

    @property
    def scale_params(self) -> tuple[int, ...]:
        """Fields of `ScaledParams`."""
        q_scale, k_scale, v_scale = self.scales
        batch, _, head = strides_of(q_scale)
        of_v = 0 if v_scale is None else v_scale.data_ptr()
        return q_scale.data_ptr(), k_scale.data_ptr(), of_v, batch, head


def problem_of(problem: Problem, runtime: Runtime, call: Call, device_index: int) -> Problem | None:
    """Return the problem of the kernel that reads prepared operands, if the call has one."""
    if problem.dtype is Dtype.FP32:
        return halves.problem_of(problem, runtime, call)
    if gear_of(call.gear, problem.dtype) == 4:
        return quantized.problem_of(problem, runtime, call, device(device_index).arch)
    return None


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    problem: Problem,
    runtime: Runtime,
    call: Call,
    device_index: int,
) -> Prepared | None:
    """Make the operands in the current stream, if the call has a kernel for them."""
    chosen = problem_of(problem, runtime, call, device_index)
    if chosen is None:
        return None
    if not chosen.has_scores:  # the bound of cosine attention is not needed
        runtime = runtime._replace(score_params=())
    if chosen.numerics.is_quantized:
        rounded = quantized.quantize(q, k, v, chosen, runtime)
        q, k, along_mean = rounded.q, rounded.k, rounded.along_mean
        runtime = runtime._replace(q_strides=strides_of(q), k_strides=strides_of(k))
        if rounded.v is not None:
            v = rounded.v
            runtime = runtime._replace(v_strides=strides_of(v))
        scales = (rounded.q_scale, rounded.k_scale, rounded.v_scale)
        return Prepared(q, k, v, chosen, runtime, scales, along_mean)
    parts = halves.split(q, k, v, chosen, runtime)
    q, k, v = parts.q, parts.k, parts.v
    strides = [strides_of(x) for x in (q, k, v)]
    runtime = runtime._replace(q_strides=strides[0], k_strides=strides[1], v_strides=strides[2])
    return Prepared(q, k, v, chosen, runtime, (parts.q_scale, parts.k_scale, parts.v_scale), None)


def strides_of(x: Tensor) -> tuple[int, int, int]:
    """Return (batch, row, head) of a tensor [B, H, L, ...]; 0 where no index passes."""
    batch, head, row = x.stride()[:3]
    sizes = x.shape
    return (
        batch if sizes[0] > 1 else 0,
        row if sizes[2] > 1 else 0,
        head if sizes[1] > 1 else 0,
    )
