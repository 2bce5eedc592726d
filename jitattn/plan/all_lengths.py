"""Lists the kernels of a call at all lengths: those in the steps of its plans at deciding lengths.

What a plan takes from lengths is a row class, whether operands are worth preparing, and whether
dK and dV come in parts. The lengths here cover every combination. Batch and split count are 1, for
they decide grids only; head counts are the call's, and one query head a kv head.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.kernels.bwd_preprocess import bwd_preprocess_specs
from jitattn.plan.backward import backward
from jitattn.plan.backward_pass import BackwardOperands
from jitattn.plan.forward import forward
from jitattn.plan.kv_parts import KvGradient
from jitattn.spec.enums import Access, RowClass, ScoreTarget, Switch

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Iterator

    from jitattn.request.problem import Call, Runtime
    from jitattn.spec.kernel_spec import KernelSpec, Problem

#: Many enough that one head of 16 columns is worth preparing, forward and backward.
_MANY: Final = 1 << 14
#: More rows than a CTA of a backward kernel accumulates, by which dK and dV come in parts.
_MANY_ROWS: Final = 1 << 19
#: Every length of the smaller row classes, that of one tile, and a long one.
_QUERIES: Final = (*range(1, RowClass.ROWS64 + 1), 128, _MANY)
_KEYS: Final = (0, 1, _MANY)
#: Row stride of a query tensor in elements: aligned, and no less than the largest head dim.
_ROW_STRIDE: Final = 256
_NO_STRIDES: Final = (0, 0, 0)


class AnyDevice(NamedTuple):
    """A device of an architecture. Its size decides grids and splits, which are no matter here."""

    arch: str
    has_wgmma: bool = False

    def slots(self, spec: KernelSpec) -> int:
        """Return 1, with which nothing is split for the sake of idle multiprocessors."""
        del spec
        return 1


def forward_specs(
    problems_at: Callable[[int], Iterable[Problem]],
    runtime: Runtime,
    call: Call,
    arch: str,
    *,
    has_wgmma: bool,
) -> list[KernelSpec]:
    """Return the kernels of the forward pass of a call, at all lengths.

    Parameters
    ----------
    problems_at : callable
        The problems of calls like this with so many queries: they differ in staging.
    runtime : Runtime
        As the call was parsed.
    call : Call
    arch : str
    has_wgmma : bool
        Whether calls may take the wgmma kernels of sm_90.
    """
    here = AnyDevice(arch, has_wgmma)
    call = call._replace(num_splits=1)
    specs: dict[KernelSpec, None] = {}
    for sized in _sizes(runtime, _QUERIES, _KEYS):
        for problem in problems_at(sized.len_q):
            planned = forward(problem, sized, call, _NO_STRIDES, None, here)
            specs.update(dict.fromkeys(step.spec for step in planned.plan.steps))
    return list(specs)


def backward_specs(
    problem: Problem,
    runtime: Runtime,
    targets: Collection[ScoreTarget],
    arch: str,
    *,
    has_wgmma: bool,
    deterministic: bool,
    captured: tuple[str, ...] = (),
) -> list[KernelSpec]:
    """Return the kernels of the backward pass of a call, at all lengths and alignments of dO.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        As the call was parsed.
    targets : collection of ScoreTarget
        The score gradients that are needed.
    arch : str
    has_wgmma : bool
        Whether calls may take the wgmma kernels of sm_90.
    deterministic : bool
    captured : tuple of str
        Names of the captured tensors that may need gradients.
    """
    runtime = runtime._replace(scale=abs(runtime.scale))
    stats = bwd_preprocess_specs(problem.out_dtype, problem.head_dim_v, arch)
    group = runtime.heads_q // max(1, runtime.heads_kv)
    queries = (1, _MANY, -(-_MANY_ROWS // max(1, group)))
    devices = {AnyDevice(arch, has_wgmma)}
    if problem.sinks is Switch.ON:  # a gradient of the LSE decides
        devices.add(AnyDevice(arch))
    specs: dict[KernelSpec, None] = {}
    for sized in _sizes(runtime, queries, _KEYS[1:]):
        if sized.len_q * sized.len_kv > _MANY * _MANY:
            continue  # needs no kernel that the other lengths do not, but large grids
        for spec in stats:
            is_aligned = spec.access is Access.VEC16
            operands = _operands(
                problem, sized, targets, is_aligned=is_aligned, deterministic=deterministic
            )
            operands = operands._replace(wanted=operands.wanted + captured)
            for here in devices:
                planned = backward(problem, sized, operands, here)
                specs.update(dict.fromkeys(step.spec for step in planned.plan.steps))
    return list(specs)


def _sizes(runtime: Runtime, queries: Iterable[int], keys: Iterable[int]) -> Iterator[Runtime]:
    """Yield a call's facts at other lengths and head counts, for one sequence."""
    keys = tuple(keys)
    by_batch, by_row, by_head = runtime.q_strides
    if by_row == 0 and runtime.len_q <= 1:  # of one row, which has no stride
        runtime = runtime._replace(q_strides=(by_batch, _ROW_STRIDE, by_head))
    heads_kv = max(1, runtime.heads_kv)
    heads = dict.fromkeys(((max(1, runtime.heads_q), heads_kv), (heads_kv, heads_kv)))
    for len_q in queries:
        for len_kv in keys:
            for heads_q, heads_kv in heads:
                yield runtime._replace(
                    batch=1, len_q=len_q, len_kv=len_kv, heads_q=heads_q, heads_kv=heads_kv
                )


def _operands(
    problem: Problem,
    runtime: Runtime,
    targets: Collection[ScoreTarget],
    *,
    is_aligned: bool,
    deterministic: bool,
) -> BackwardOperands:
    """Return operands of a backward pass with these properties; strides select no kernel."""
    shape = (runtime.len_kv, runtime.heads_kv)
    row = runtime.heads_q * problem.head_dim_v
    wanted = ["relative_bias"] if ScoreTarget.DISTANCE in targets else []
    bias_shape = None
    if ScoreTarget.ROW in targets or ScoreTarget.MATRIX in targets:
        rows = runtime.len_q if ScoreTarget.MATRIX in targets else 1
        wanted.append("bias")
        bias_shape = (1, 1, rows, runtime.len_kv)
    return BackwardOperands(
        batch=1,
        length=runtime.len_q,
        is_flat=runtime.q_is_flat,
        out_strides=_NO_STRIDES,
        d_out_strides=_NO_STRIDES,
        main_d_out_strides=(0, row, problem.head_dim_v),
        lse_strides=_NO_STRIDES,
        d_lse_strides=None,
        is_aligned=is_aligned,
        has_scale=False,
        dq_strides=_NO_STRIDES,
        dk=KvGradient("dk", (1, *shape, problem.head_dim), 1, is_flat=False),
        dv=KvGradient("dv", (1, *shape, problem.head_dim_v), 1, is_flat=False),
        wanted=tuple(wanted),
        bias_shape=bias_shape,
        bias_dtype="fp32",
        dropout_scale=1.0,
        num_splits=1,
        deterministic=deterministic,
    )
