"""`explain`: reports the kernel of a call and the reasons for the choice."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch

from jitattn.api.attention import bind
from jitattn.errors import JitAttnError
from jitattn.jit import backend
from jitattn.jit.build import key_of
from jitattn.jit.device import device
from jitattn.jit.functions import render_function
from jitattn.jit.load_kernel import load_kernel
from jitattn.kernels.bwd import bwd_spec
from jitattn.plan import wgmma_backward
from jitattn.plan.all_lengths import AnyDevice
from jitattn.plan.backward import kernel_problem
from jitattn.plan.forward import Forward, forward
from jitattn.request.layouts import parse_any
from jitattn.request.norm import call_of_normalized
from jitattn.request.problem import is_deterministic
from jitattn.request.scores import tensors_of
from jitattn.run.execute import LoadedDevice
from jitattn.run.forward import is_followed
from jitattn.run.normalize import like_normalized
from jitattn.spec.enums import Access, RowClass
from jitattn.spec.kernel_spec import arch_number
from jitattn.spec.program import parse
from jitattn.values.gears import gear_of

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Explanation:
    """Plan of a call of `attention`. Numbers are 0 and texts empty where they do not apply."""

    path: str  #: "cuda", "cpu", or "none" for a result without elements
    device: str  #: name of the GPU
    gear: int
    problem: dict[str, str | int]  #: properties of the call that change code
    kernel: dict[str, str | int]  #: all fields of the kernel's spec, including the tile's
    key: str  #: cache key
    origin: str  #: source of the cubin: "disk", "read-only" (directory) or "compiled"
    row_class: str
    heads_per_tile: int  #: query heads packed into the rows of a tile
    num_splits: int  #: 0: determined on the device from the lengths
    num_ctas: int
    blocks_per_sm: int
    registers: int  #: per thread
    spill_bytes: int  #: per thread
    smem_bytes: int  #: per CTA
    steps: tuple[str, ...]  #: launches in order: family and CTAs
    #: Fields of the backward kernel's spec, if autograd follows the call; it is not compiled here.
    backward: dict[str, str | int]
    why: tuple[str, ...]
    #: C++ of the functions of the call, as kernels have it. Of such a call the key is shown on
    #: every path; where no kernel runs, that of the kernel for sm_80.
    function: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return the record as plain values for JSON."""
        return {**asdict(self), "steps": list(self.steps), "why": list(self.why)}

    def __str__(self) -> str:
        """Format the record for reading."""
        lines = [f"path         {self.path}" + (f" ({self.device})" if self.device else "")]
        lines.append("problem      " + ", ".join(f"{k}={v}" for k, v in self.problem.items()))
        if self.kernel:
            tile = self.kernel
            lines += [
                f"kernel       {tile['family']} for {tile['arch']}, key {self.key[:16]}, "
                f"from {self.origin}",
                f"tile         {tile['block_q']} rows x {tile['block_kv']} keys, "
                f"{tile['warps_q']} x {tile['warps_kv']} warps, stages {tile['stages']}",
                f"work         {self.num_ctas} CTAs ({self.blocks_per_sm} a multiprocessor), "
                f"{self.num_splits} splits, {self.heads_per_tile} heads a tile",
                f"resources    {self.registers} registers, {self.spill_bytes} B spilled, "
                f"{self.smem_bytes} B shared",
                f"launches     {', '.join(self.steps)}",
            ]
        if self.backward:
            tile = self.backward
            lines.append(
                f"backward     {tile['family']}, {tile['block_q']} rows x {tile['block_kv']} keys, "
                f"deterministic {tile['deterministic']}"
            )
        lines += [f"because      {reason}" for reason in self.why]
        if self.function:
            lines += [f"function     of the kernel {self.key[:16]}:", self.function]
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    **arguments: Any,  # noqa: ANN401 - those of attention
) -> Explanation:
    """Report the kernel that `attention` would use for these arguments, and why.

    Takes the arguments of `attention` and raises what it would raise. The kernel is compiled if
    need be, but nothing is launched.

    Returns
    -------
    Explanation
        A frozen record with ``to_dict()`` and a readable ``str``.
    """
    tensors, call = bind(q, k, v, arguments)
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    inputs = (q, k, v, *tensors_of(call).values())
    problem, runtime, _ = parse_any(q, k, v, call)
    if q.is_cuda and call.scores.qk_norm is not None and call.scores.qk_norm.normalize:
        call = call_of_normalized(call, runtime.scale)
        problem, runtime, _ = parse_any(*like_normalized(q, k), v, call)
    gear = gear_of(call.gear, problem.dtype)
    asked: dict[str, str | int] = {
        "batch": runtime.batch,
        "len_q": runtime.len_q,
        "len_kv": runtime.len_kv,
        "heads_q": runtime.heads_q,
        "heads_kv": runtime.heads_kv,
        "head_dim": problem.head_dim,
        "head_dim_v": problem.head_dim_v,
        "dtype": "fp64" if q.dtype is torch.float64 else problem.dtype.value,
        "mask": problem.mask.value,
        "q_layout": problem.q_layout.value,
        "kv_layout": problem.kv_layout.value,
    }
    if not q.is_cuda or math.prod((runtime.batch, runtime.len_q, runtime.heads_q)) == 0:
        path, why = "none", "the result has no elements"
        if q.is_meta:
            why = "q is on the meta device: it has a shape, and no GPU to choose a kernel for"
        elif not q.is_cuda:
            path, why = "cpu", "q is on the CPU"
        return Explanation(
            path=path,
            device="",
            gear=gear,
            problem=asked,
            kernel={},
            key=_key_anywhere(problem, runtime, call),
            origin="",
            row_class="",
            heads_per_tile=0,
            num_splits=0,
            num_ctas=0,
            blocks_per_sm=0,
            registers=0,
            spill_bytes=0,
            smem_bytes=0,
            steps=(),
            backward={},
            why=(why,),
            function=_rendered(call),
        )
    with backend.active.on_device(q.device):
        here = LoadedDevice(q.device.index)
        planned = forward(problem, runtime, call, (0, 0, 0), None, here)
        kernel = load_kernel(planned.tiling.spec, q.device.index)
    chosen, built = planned.tiling, kernel.built
    backward: dict[str, str | int] = {}
    reasons = _reasons(planned, call)
    if is_followed(*inputs):
        own = kernel_problem(problem, runtime, here.arch)
        deterministic = is_deterministic(call)
        positive = runtime._replace(scale=abs(runtime.scale))
        on_wgmma = wgmma_backward.choice(own, positive, here, deterministic=deterministic)
        spec = on_wgmma.spec or bwd_spec(own, here.arch, deterministic=deterministic)
        backward = spec.to_dict()
        if here.arch == "sm_90":
            reasons += (
                (f"gradients by mma.sync: {on_wgmma.refusal}",)
                if on_wgmma.refusal
                else ("gradients by wgmma",)
            )
    return Explanation(
        path="cuda",
        device=device(q.device.index).name,
        gear=gear,
        problem=asked,
        kernel=built.spec.to_dict(),
        key=built.key,
        origin=built.origin,
        row_class=chosen.rows.name,
        heads_per_tile=chosen.heads_per_tile,
        num_splits=chosen.num_splits,
        num_ctas=chosen.num_ctas,
        blocks_per_sm=kernel.blocks_per_sm,
        registers=built.metadata.registers,
        spill_bytes=built.metadata.spill_bytes,
        smem_bytes=built.metadata.smem_bytes,
        steps=tuple(f"{step.spec.family} ({step.grid} CTAs)" for step in planned.plan.steps),
        backward=backward,
        why=reasons,
        function=_rendered(call),
    )


def _key_anywhere(problem: Problem, runtime: Runtime, call: Call) -> str:
    """Return the key of the kernel for sm_80 of a call with functions; else nothing."""
    sizes = (runtime.batch, runtime.len_q, runtime.heads_q)
    if call.scores.function is None or 0 in sizes:
        return ""
    try:
        planned = forward(problem, runtime, call, (0, 0, 0), None, AnyDevice("sm_80"))
        return key_of(planned.tiling.spec)
    except JitAttnError:  # no compiler, which is part of the key
        return ""


def _rendered(call: Call) -> str:
    """Return the C++ of a call's functions."""
    function = call.scores.function
    return "" if function is None else "\n".join(render_function(parse(function.program)))


def _reasons(planned: Forward, call: Call) -> tuple[str, ...]:
    problem, tiling = planned.problem, planned.tiling
    rows, packed, num_splits = tiling.rows, tiling.heads_per_tile, tiling.num_splits
    reasons = []
    if call.tile_rows is not None:
        reasons.append(f"tile_rows={call.tile_rows} was asked for")
    elif rows is RowClass.MANY:
        reasons.append("more than 64 rows a kv head: the tile for long queries")
    else:
        reasons.append(f"at most {rows.value} rows a kv head: the tile for short queries")
    if packed > 1:
        reasons.append(f"the {packed} query heads of a kv head share its tile, and so its reads")
    if call.num_splits is not None:
        reasons.append(f"num_splits={call.num_splits} was asked for")
    elif num_splits > 1:
        reasons.append("too few tiles to fill the GPU: the keys are split")
    elif num_splits == 0:
        reasons.append("lengths differ: every CTA counts them, and long sequences are split")
    if problem.access is Access.ELEMENT:
        reasons.append(
            "a head_dim, stride or address is not a multiple of 16 bytes: one element at a time"
        )
    if not tiling.refusal:
        reasons.append("products by wgmma, copies by TMA")
        if gear_of(call.gear, problem.dtype) == 4:
            reasons.append("gear 4 is computed as gear 3: in 8 bits on mma.sync it is slower")
    elif arch_number(tiling.spec.arch) == 90:
        reasons.append(f"products by mma.sync: {tiling.refusal}")
    reasons.append(f"numerics {problem.numerics.value}")
    return tuple(reasons)
