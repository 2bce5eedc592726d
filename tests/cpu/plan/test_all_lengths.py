"""Tests that `warmup` and prebuild list the kernels of plans, no more and no fewer.

Plans here are those of calls with tensors of many lengths, as a call makes them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn.api.attention import bind
from jitattn.api.warmup import specs_of_call
from jitattn.kernels.fwd import FwdSpec
from jitattn.plan.backward import backward, without_block_lists
from jitattn.plan.backward_pass import BackwardOperands
from jitattn.plan.choices import specs_of
from jitattn.plan.forward import forward
from jitattn.plan.kv_parts import KvGradient
from jitattn.plan.score_gradients import target_of
from jitattn.request.layouts import Parsed, parse_any
from jitattn.request.problem import Call
from jitattn.request.scores import ADDED
from jitattn.spec.enums import ScoreTarget, SeqLayout
from jitattn.spec.kernel_spec import KernelSpec, Problem
from jitattn.values.gears import FAST_FP16_ACC_ARCHS, gear_of, resolve_numerics
from tests.cpu.plan.test_plan import Device

BF16, FP32 = torch.bfloat16, torch.float32
#: Few and many queries, on few and many keys, of which some do not end at 16 bytes.
LENGTHS = [
    (len_q, len_kv)
    for len_q in (1, 2, 5, 16, 17, 33, 64, 65, 100, 300)
    for len_kv in (0, 1, 24, 300, 320, 333)
]
LENGTHS += [(1, 70_000), (60, 70_000), (4096, 1), (4096, 4096), (300_000, 24)]
PATTERN = torch.ones(1, 40, 40, dtype=torch.bool)


def matrix(dtype: torch.dtype, *, heads: int = 4, row: bool = False) -> Any:
    """A matrix of scores for any lengths, with rows that may end at 16 bytes or not."""
    return lambda len_q, len_kv: torch.empty(1, heads, 1 if row else len_q, len_kv, dtype=dtype)


def keys(_: int, len_kv: int) -> jitattn.KeyPadding:
    return jitattn.KeyPadding(torch.empty(2, len_kv, dtype=torch.bool))


def dense(len_q: int, len_kv: int) -> jitattn.Dense:
    return jitattn.Dense(torch.empty(1, 1, len_q, len_kv, dtype=torch.bool))


def ragged(length: int) -> jitattn.Ragged:
    ends = torch.tensor([0, length, 2 * length], dtype=torch.int32)
    return jitattn.Ragged.from_cu_seqlens(ends, length)


def spans(length: int) -> jitattn.Ragged:
    """Sequences that may share rows."""
    return jitattn.Ragged(torch.tensor([0, length]), torch.full((2,), length), length)


def pages(_: int, len_kv: int) -> jitattn.Paged:
    count = -(-len_kv // 16)
    return jitattn.Paged(torch.zeros(2, count, dtype=torch.int32), torch.full((2,), len_kv))


def rows_by_index(_: int, len_kv: int) -> jitattn.Padded:
    return jitattn.Padded(torch.full((2,), len_kv), batch_idx=torch.tensor([1, 0]))


#: Arguments of calls; those that depend on lengths are functions of them.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "bf16, other head dims": {"dtype": BF16, "dim": 72, "dim_v": 40},
    "unaligned": {"dim": 33},
    "gear 0": {"dtype": BF16, "gear": 0},
    "gear 3": {"gear": 3},
    "negative scale": {"scale": -1.0, "dtype": FP32},
    "large group": {"heads": 64},
    "window": {"mask": jitattn.Window(30, 0, 4)},
    "stride": {"mask": jitattn.LocalStride(64, 2, 3)},
    "fine stride": {"mask": jitattn.LocalStride(16, 2, 3)},
    "lists": {"mask": jitattn.BlockSparse(PATTERN, 128)},
    "lists by head": {"mask": jitattn.PerHead([jitattn.Window(n) for n in (1, 2, 3, 4)])},
    "padding": {"mask": keys},
    "padding in fp32": {"mask": keys, "dtype": FP32},
    "dense": {"mask": dense},
    "bias": {"bias": matrix(torch.float16)},
    "bias of all heads": {"bias": matrix(torch.float16, heads=1)},
    "bias in fp32": {"bias": matrix(FP32), "dtype": FP32},
    "bias of wide rows": {"bias": matrix(FP32), "dtype": FP32, "dim": 192},
    "row of biases": {"bias": matrix(torch.float16, heads=1, row=True)},
    "row of biases by head": {"bias": matrix(torch.float16, row=True)},
    "distance": {"relative_bias": torch.zeros(4, 9), "alibi_slopes": torch.zeros(4)},
    "sinks": {"sinks": torch.zeros(4), "softcap": 3.0},
    "dropout": {"dropout_p": 0.5},
    "bound": {"qk_norm": jitattn.L2Norm(normalize=False)},
    "cosine": {"qk_norm": jitattn.L2Norm()},
    "8 bits": {"gear": 4, "dim": 128},
    "8 bits, ragged": {"gear": 4, "dim": 128, "q_seqs": ragged, "kv_seqs": ragged},
    "8 bits, rows shared": {"gear": 4, "dim": 128, "q_seqs": spans, "kv_seqs": spans},
    "8 bits in pages": {"gear": 4, "dim": 128, "kv_seqs": pages},
    "8 bits in pages of rows": {"gear": 4, "q_seqs": ragged, "kv_seqs": pages},
    "fp32": {"dtype": FP32},
    "fp32 in gear 3": {"dtype": FP32, "gear": 3, "mask": jitattn.Causal()},
    "fp32, dims without parts": {"dtype": FP32, "dim": 72},
    "ragged": {"q_seqs": ragged, "kv_seqs": ragged, "mask": jitattn.Causal()},
    "rows by index": {"kv_seqs": rows_by_index},
    "pages": {"kv_seqs": pages},
    "wide output": {"out_dtype": FP32},
}  # fmt: skip
ARCHS = ["sm_80", "sm_89", "sm_90"]
#: Calls whose numerics depend on the GPU of an architecture.
GEARS = [name for name, given in CALLS.items() if given.get("gear", 0) > 2]


def call_at(
    given: dict[str, Any], len_q: int, len_kv: int, group: int = 2
) -> tuple[Tensor, Tensor, Tensor, Call]:
    """q, k, v and the call with these lengths. No memory is touched."""
    given = dict(given)
    dim, dtype = given.pop("dim", 64), given.pop("dtype", torch.float16)
    dim_v, heads = given.pop("dim_v", dim), given.pop("heads", 4)
    lengths = {"q_seqs": (len_q,), "kv_seqs": (len_kv,)}
    for name, value in given.items():
        if value in (ragged, spans):
            given[name] = value(*lengths[name])
        elif callable(value):
            given[name] = value(len_q, len_kv)
    shape_kv: tuple[int, ...] = (2, len_kv, heads // group)
    if isinstance(given.get("kv_seqs"), jitattn.Paged):
        shape_kv = (2 * -(-len_kv // 16), 16, heads // group)
    q = torch.empty(2, len_q, heads, dim, dtype=dtype)
    k, v = (torch.empty(*shape_kv, width, dtype=dtype) for width in (dim, dim_v))
    if isinstance(given.get("q_seqs"), jitattn.Ragged):
        q = q.flatten(0, 1)
    if isinstance(given.get("kv_seqs"), jitattn.Ragged):
        k, v = k.flatten(0, 1), v.flatten(0, 1)
    _, call = bind(q, k, v, given)
    norm = call.scores.qk_norm
    if norm is not None and norm.normalize:  # as the call of the normalized ones
        norm = replace(norm, normalize=False)
        call = call._replace(scores=call.scores._replace(qk_norm=norm))
    return q, k, v, call


def calls_of(given: dict[str, Any]) -> Iterator[tuple[Parsed, Call, tuple[Tensor, ...]]]:
    """Calls of all lengths, and of head counts with and without groups."""
    group = given.get("heads", 4)
    for len_q, len_kv in LENGTHS:
        if len_q * len_kv > 2**24 and "bias" in given:
            continue
        for size in (1, 2, group):
            q, k, v, call = call_at(given, len_q, len_kv, size)
            yield parse_any(q, k, v, call), call, (q, k, v)


def operands_of(
    parsed: Parsed, call: Call, qkv: tuple[Tensor, ...], *, aligned: bool, deterministic: bool
) -> BackwardOperands:
    _, k, v = qkv
    steps = (1, 2, 3)
    is_flat = isinstance(call.kv_seqs, jitattn.Ragged)
    row = parsed.runtime.heads_q * v.shape[-1]
    bias = call.scores.bias
    return BackwardOperands(
        batch=2, length=parsed.runtime.len_q, is_flat=parsed.runtime.q_is_flat, out_strides=steps,
        d_out_strides=steps, main_d_out_strides=(0, row, v.shape[-1]), lse_strides=steps,
        d_lse_strides=steps, is_aligned=aligned, has_scale=True, dq_strides=steps,
        dk=KvGradient("dk", tuple(k.shape), 0 if is_flat else 1, is_flat),
        dv=KvGradient("dv", tuple(v.shape), 0 if is_flat else 1, is_flat),
        wanted=tuple(name for name in ADDED if getattr(call.scores, name) is not None),
        bias_shape=None if bias is None else tuple(bias.shape), bias_dtype="fp32",
        dropout_scale=2.0, num_splits=call.num_splits, deterministic=deterministic,
    )  # fmt: skip


class Uses(NamedTuple):
    """What the calls of one problem use."""

    specs: set[KernelSpec]
    targets: set[ScoreTarget]


#: Uses by problem and gear; in backward passes the problem of dq, dk and dv as well.
Found: TypeAlias = dict[tuple[Problem, Problem, int], Uses]


@functools.cache
def forward_plans(name: str, arch: str) -> Found:
    found: Found = {}
    for parsed, call, _ in calls_of(CALLS[name]):
        gear = gear_of(call.gear, parsed.problem.dtype)
        uses = found.setdefault((parsed.problem, parsed.problem, gear), Uses(set(), set()))
        problems = {parsed.problem}
        if arch in FAST_FP16_ACC_ARCHS and name in GEARS:
            # The numerics of its GPUs that are faster in fp16, which a CPU is not.
            numerics = resolve_numerics(gear, parsed.problem.dtype, has_fast_fp16_acc=True)
            problems.add(replace(parsed.problem, numerics=numerics))
        for problem in problems:
            plan = forward(problem, parsed.runtime, call, (1, 2, 3), (4, 5), Device(arch)).plan
            uses.specs.update(step.spec for step in plan.steps)
    return found


@functools.cache
def backward_plans(name: str, arch: str, *, deterministic: bool) -> Found:
    found: Found = {}
    for parsed, call, qkv in calls_of(CALLS[name]):
        problem, runtime = parsed.problem, parsed.runtime
        if runtime.len_kv == 0:
            continue  # no backward pass
        own = without_block_lists(problem, runtime.listed, arch)
        key = (problem, own, gear_of(call.gear, problem.dtype))
        uses = found.setdefault(key, Uses(set(), set()))
        runtime = runtime._replace(scale=abs(runtime.scale))
        width = qkv[2].shape[-1] * problem.out_dtype.bytes
        for aligned in (False, True) if width % 16 == 0 else (False,):
            operands = operands_of(parsed, call, qkv, aligned=aligned, deterministic=deterministic)
            plan = backward(problem, runtime, operands, Device(arch)).plan
            uses.specs.update(step.spec for step in plan.steps)
        if call.scores.bias is not None:
            uses.targets.add(target_of(tuple(call.scores.bias.shape)))
        if call.scores.relative_bias is not None or call.scores.alibi_slopes is not None:
            uses.targets.add(ScoreTarget.DISTANCE)
    return found


def specs_in(found: Found) -> set[KernelSpec]:
    return set().union(*(uses.specs for uses in found.values()))


def merged(parts: Iterable[Found]) -> Found:
    """The uses of all calls: a choice stands for its problem, whichever call it is of."""
    result: Found = {}
    for part in parts:
        for key, uses in part.items():
            known = result.setdefault(key, Uses(set(), set()))
            known.specs.update(uses.specs)
            known.targets.update(uses.targets)
    return result


def warmed(name: str, arch: str, *, gradients: bool, deterministic: bool = False) -> set[Any]:
    q, k, v, call = call_at(CALLS[name], 300, 320)
    call = call._replace(deterministic=deterministic)
    has_wgmma = Device(arch).has_wgmma
    return {*specs_of_call(q, k, v, call, arch, has_wgmma=has_wgmma, gradients=gradients)}


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_warmup_has_the_kernels_of_forward_plans(name: str, arch: str) -> None:
    assert warmed(name, arch, gradients=False) == specs_in(forward_plans(name, arch))


@pytest.mark.parametrize("len_kv", [1, 320])
def test_warmup_with_one_query_has_the_kernels_of_many(len_kv: int) -> None:
    """One row has no stride, which says nothing of others."""
    found = []
    for len_q in (1, 300):
        q, k, v, call = call_at({"mask": jitattn.Causal()}, len_q, len_kv)
        found.append(specs_of_call(q, k, v, call, "sm_90", has_wgmma=True, gradients=False))
    assert set(found[0]) == set(found[1])
    assert any(spec.family == "fwd_sm90" for spec in found[0])


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_warmup_has_the_kernels_of_backward_plans(
    name: str, arch: str, deterministic: bool
) -> None:
    planned = specs_in(backward_plans(name, arch, deterministic=deterministic))
    both = warmed(name, arch, gradients=True, deterministic=deterministic)
    assert both == planned | specs_in(forward_plans(name, arch))


def test_two_matrices_are_staged_each_on_its_own() -> None:
    """With contiguous tensors of equal rows one of them decides, but strides may differ."""
    given = {"bias": matrix(torch.float16), "mask": dense}
    q, k, v, call = call_at(given, 300, 320)
    found = {*specs_of_call(q, k, v, call, "sm_90", has_wgmma=True, gradients=False)}
    planned = set()
    for len_q, len_kv in LENGTHS[:-5]:
        for wide in (0, 320):
            q, k, v, call = call_at(given, len_q, len_kv)
            room = torch.empty(1, 4, len_q, wide + len_kv, dtype=torch.float16)
            call = call._replace(scores=call.scores._replace(bias=room[..., wide:]))
            room = torch.empty(1, 1, len_q, 336, dtype=torch.bool)
            for mask in (call.mask, jitattn.Dense(room[..., :len_kv])):
                one = call._replace(mask=mask)
                parsed = parse_any(q, k, v, one)
                plan = forward(
                    parsed.problem, parsed.runtime, one, (1, 2, 3), None, Device("sm_90")
                )
                planned |= {step.spec for step in plan.plan.steps}
    assert planned <= found
    assert stagings_in(planned) == stagings_in(found)


def stagings_in(specs: Iterable[KernelSpec]) -> set[tuple[Any, Any]]:
    problems = [spec.problem for spec in specs if isinstance(spec, FwdSpec)]
    return {(problem.bias_staged, problem.dense_staged) for problem in problems}


def prebuilt(problem: Problem, gear: int, arch: str, **more: Any) -> set[KernelSpec]:
    """The kernels of the choice that a problem and a gear are."""
    fields = {field.name: getattr(problem, field.name) for field in dataclasses.fields(problem)}
    del fields["numerics"]
    return {*specs_of([{**fields, "arch": arch, "gear": gear, **more}])}


@pytest.mark.parametrize("arch", ARCHS)
def test_prebuild_has_the_kernels_of_forward_plans(arch: str) -> None:
    for (problem, _, gear), uses in merged(forward_plans(name, arch) for name in CALLS).items():
        chosen = prebuilt(problem, gear, arch)
        assert uses.specs <= chosen, problem
        # Of fp32 parts, wgmma kernels serve all these calls.
        more = [spec for spec in chosen - uses.specs if isinstance(spec, FwdSpec)]
        assert len(more) == len(chosen - uses.specs)
        assert all(arch == "sm_90" and spec.problem.numerics.num_parts for spec in more)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_prebuild_has_the_kernels_of_backward_plans(arch: str, deterministic: bool) -> None:
    switch = "on" if deterministic else "off"
    parts = (backward_plans(name, arch, deterministic=deterministic) for name in CALLS)
    for (problem, own, gear), uses in merged(parts).items():
        chosen = prebuilt(own, gear, arch, family="bwd", deterministic=switch)
        for target in uses.targets:
            chosen |= prebuilt(problem, gear, arch, family="bwd_scores", target=target)
        assert uses.specs <= chosen
        # Whether sequences share rows of k and v, whose gradients are scattered on mma.sync, a
        # ragged layout does not say; nor a problem whether TMA can copy a gradient of out.
        may = {"sum_parts", "kv_scatter"} if problem.kv_layout is SeqLayout.RAGGED else set()
        if any(spec.family == "bwd_sm90" for spec in chosen):
            may |= {"bwd", "bwd_postprocess"}
            may |= {"bwd_sm90"} if problem.kv_layout is SeqLayout.RAGGED else set()
        assert {spec.family for spec in chosen - uses.specs} <= may
