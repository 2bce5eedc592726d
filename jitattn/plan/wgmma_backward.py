"""Decides which backward passes take the wgmma kernel of sm_90, and describes its operands to TMA.

Every other call takes the mma.sync kernel, which serves all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.kernels.bwd_sm90 import bwd_sm90_spec, refusal_of_backward
from jitattn.plan import arguments, wgmma
from jitattn.spec.enums import MaskKind, Switch

if TYPE_CHECKING:
    from jitattn.jit.tensor_maps import BoxedTensor
    from jitattn.kernels.bwd_sm90 import BwdSm90Spec
    from jitattn.plan.step import Device
    from jitattn.request.problem import Runtime, Strides
    from jitattn.spec.kernel_spec import Problem

#: Heads whose causal key blocks are visited together, so that the L2 holds their Q and dO. TFLOP/s
#: with 1, 2, 4, 8: D=128 4k 485, 466, 488, 490, 16k 590, 583, 573, 571; D=64 4k 454, 452, 458, 448.
_CAUSAL_HEADS: Final = 2


class BackwardChoice(NamedTuple):
    """A wgmma kernel for a backward pass, or why there is none."""

    spec: BwdSm90Spec | None
    refusal: str = ""


def choice(
    problem: Problem,
    runtime: Runtime,
    device: Device,
    d_out_strides: Strides | None = None,
    *,
    deterministic: bool,
    has_d_lse: bool = False,
) -> BackwardChoice:
    """Choose the wgmma kernel of a backward pass with at least one row and one key.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        Of the kernel that computes dq, dk and dv, with a scale that is not negative.
    device : Device
    d_out_strides : (int, int, int), optional
        Of dO as the kernel reads it, as (batch, row, head); None: like a contiguous one.
    deterministic : bool
        Key blocks add to dQ in fixed order.
    has_d_lse : bool
        The LSE has a gradient.
    """
    reason = _refusal(problem, runtime, device, d_out_strides, deterministic)
    if reason is None and has_d_lse and problem.sinks is Switch.ON:
        reason = "with sinks, a gradient of the LSE needs the weights without them"
    if reason is not None:
        return BackwardChoice(None, reason)
    return BackwardChoice(bwd_sm90_spec(problem, deterministic=deterministic))


def _refusal(
    problem: Problem,
    runtime: Runtime,
    device: Device,
    d_out_strides: Strides | None,
    deterministic: bool,
) -> str | None:
    if not device.has_wgmma:
        return "the device or its driver has no wgmma, or JITATTN_FAMILY is sm80"
    reason = refusal_of_backward(problem, deterministic=deterministic)
    if reason is not None:
        return reason
    if 0 < runtime.scale < arguments.TINY_SCALE:
        return "the LSE over a scale this small leaves the range of bf16"
    if runtime.shares_rows:
        return "sequences share rows of k and v"
    rows_q, (rows_kv, _, _) = wgmma.rows_of_q(runtime), wgmma.sizes_of_keys(problem, runtime)
    dim, dim_v = problem.head_dim, problem.head_dim_v
    operands = [
        (rows_q, runtime.q_strides, dim),
        (rows_kv, runtime.k_strides, dim),
        (rows_kv, runtime.v_strides, dim_v),
    ]
    if d_out_strides is not None:
        operands.append((rows_q, d_out_strides, dim_v))
    for rows, (_, step, _), width in operands:
        if rows > 1 and step < width:
            return "rows of q, k, v or of the gradient of out overlap"
    boxed = [tensor for _, tensor in maps_of(problem, runtime, d_out_strides or (0, 0, 0), 1, 1)]
    if not all(map(wgmma.is_encodable, boxed)):
        return "q, k, v or the gradient of out has no rows, or too distant ones"
    return None


def maps_of(
    problem: Problem, runtime: Runtime, d_out_strides: Strides, block_q: int, block_kv: int
) -> tuple[tuple[str, BoxedTensor], ...]:
    """Return the tensors that TMA copies, with boxes of a query tile or a key block."""
    of_q = (wgmma.rows_of_q(runtime), runtime.heads_q, runtime.batch)
    of_keys = wgmma.sizes_of_keys(problem, runtime)
    dim, dim_v = problem.head_dim, problem.head_dim_v
    tensors = {
        "q": (dim, of_q, runtime.q_strides, block_q),
        "k": (dim, of_keys, runtime.k_strides, block_kv),
        "v": (dim_v, of_keys, runtime.v_strides, block_kv),
        "d_out": (dim_v, of_q, d_out_strides, block_q),
    }
    return tuple(
        (name, wgmma.make_box(problem, width, sizes, (by_row, by_head, by_batch), (rows,)))
        for name, (width, sizes, (by_batch, by_row, by_head), rows) in tensors.items()
    )


def section_heads(problem: Problem, runtime: Runtime, *, deterministic: bool) -> int:
    """Return the number of kv heads, of all sequences, that are visited together.

    In fixed order, key blocks of a head wait for those before: these are then the longest launched.
    """
    every = runtime.batch * runtime.heads_kv
    if deterministic:
        return every
    return min(every, 1 if problem.mask is MaskKind.FULL else _CAUSAL_HEADS)
