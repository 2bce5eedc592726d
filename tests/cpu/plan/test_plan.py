"""Tests that every step of a plan names exactly the arguments of its kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.errors import LaunchError
from jitattn.plan.backward import Backward, backward
from jitattn.plan.backward_pass import BackwardOperands
from jitattn.plan.forward import Forward, deciding_facts, forward, keys_per_block
from jitattn.plan.kv_parts import KvGradient
from jitattn.plan.step import Place, Plan
from jitattn.request.layouts import parse_any
from jitattn.spec.kernel_spec import KernelSpec

ENDS = jitattn.Ragged.from_cu_seqlens(torch.tensor([0, 300, 500], dtype=torch.int32), 300)
PAGES = jitattn.Paged(torch.zeros(2, 20, dtype=torch.int32), torch.tensor([300, 300]))
PATTERN = torch.ones(1, 40, 40, dtype=torch.bool)
KEEP = torch.ones(2, 300, dtype=torch.bool)
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "splits": {"len_q": 4, "num_splits": 3},
    "causal": {"mask": jitattn.Causal()},
    "window": {"mask": jitattn.Window(30, 0, 4)},
    "stride": {"mask": jitattn.LocalStride(64, 2, 3)},
    "small stride": {"mask": jitattn.LocalStride(16, 2, 3)},
    "lists": {"mask": jitattn.BlockSparse(PATTERN, 16, causal=True)},
    "lists and bias": {
        "mask": jitattn.BlockSparse(PATTERN, 16), "bias": torch.zeros(1, 4, 300, 300).half()
    },
    "padding": {"mask": jitattn.KeyPadding(KEEP)},
    "dense": {"mask": jitattn.Dense(KEEP[:, None, None])},
    "bias": {"bias": torch.zeros(1, 4, 300, 300)},
    "distance": {"relative_bias": torch.zeros(4, 9), "alibi_slopes": torch.zeros(4)},
    "sinks": {"sinks": torch.zeros(4), "softcap": 3.0},
    "dropout": {"dropout_p": 0.5},
    "bound": {"qk_norm": jitattn.L2Norm(normalize=False)},
    "8 bits": {"gear": 4, "dim": 128},
    "8 bits, ragged": {"gear": 4, "dim": 128, "q_seqs": ENDS, "kv_seqs": ENDS},
    "8 bits in pages": {"gear": 4, "dim": 128, "kv_seqs": PAGES},
    "fp32": {"dtype": torch.float32},
    "fp32 parts": {"dtype": torch.float32, "len_q": 4096, "len_kv": 4096},
    "fp32 parts with padding": {
        "dtype": torch.float32, "len_q": 4096, "len_kv": 4096,
        "mask": jitattn.KeyPadding(torch.ones(2, 4096, dtype=torch.bool)),
    },
    "ragged": {"q_seqs": ENDS, "kv_seqs": ENDS, "mask": jitattn.Causal()},
    "padded": {"kv_seqs": jitattn.Padded(torch.tensor([9, 300]))},
    "rows by index": {
        "kv_seqs": jitattn.Padded(torch.tensor([9, 300]), batch_idx=torch.tensor([1, 0]))
    },
    "pages": {"kv_seqs": PAGES},
    "few keys": {"len_q": 100_000, "len_kv": 16},
    "few keys in fp32": {"len_q": 300_000, "len_kv": 16, "dtype": torch.float32},
}  # fmt: skip


class Device:
    """A GPU of many multiprocessors."""

    def __init__(self, arch: str) -> None:
        self.arch, self.has_wgmma = arch, arch == "sm_90"

    def slots(self, spec: KernelSpec) -> int:
        return 264


def call_of(given: dict[str, Any]) -> Any:
    """q, k, v on the meta device, or with indices on the CPU; and the call."""
    given = dict(given)
    dim, dtype = given.pop("dim", 64), given.pop("dtype", torch.float16)
    len_q, len_kv = given.pop("len_q", 300), given.pop("len_kv", 300)
    q = torch.empty(2, len_q, 4, dim, dtype=dtype)
    k = torch.empty(2, len_kv, 2, dim, dtype=dtype)
    if given.get("q_seqs") is not None:
        q, k = q.flatten(0, 1), k.flatten(0, 1)
    if isinstance(given.get("kv_seqs"), jitattn.Paged):
        k = torch.empty(20, 16, 2, dim, dtype=dtype)
    _, call = bind(q, k, k, given)
    return q, k, call


def forward_of(given: dict[str, Any], arch: str) -> Forward:
    q, k, call = call_of(given)
    parsed = parse_any(q, k, k, call)
    return forward(parsed.problem, parsed.runtime, call, (1, 2, 3), (4, 5), Device(arch))


def backward_of(given: dict[str, Any], arch: str, *, deterministic: bool = False) -> Backward:
    q, k, call = call_of(given)
    parsed = parse_any(q, k, k, call)
    scores = call.scores
    names = ("bias", "relative_bias", "alibi_slopes", "sinks")
    steps = (1, 2, 3)
    operands = BackwardOperands(
        batch=2, length=q.shape[-3], is_flat=q.dim() == 3, out_strides=steps, d_out_strides=steps,
        main_d_out_strides=(0, *q.stride()[:2]) if q.dim() == 3 else q.stride()[:3],
        lse_strides=steps, d_lse_strides=steps, is_aligned=True,
        has_scale=True, dq_strides=steps,
        dk=KvGradient("dk", tuple(k.shape), 1, k.dim() == 3),
        dv=KvGradient("dv", tuple(k.shape), 1, k.dim() == 3),
        wanted=tuple(name for name in names if getattr(scores, name) is not None),
        bias_shape=None if scores.bias is None else tuple(scores.bias.shape),
        bias_dtype="fp32", dropout_scale=2.0, num_splits=None, deterministic=deterministic,
    )  # fmt: skip
    return backward(parsed.problem, parsed.runtime, operands, Device(arch))


def check(plan: Plan) -> None:
    operands = {
        "q", "k", "v", "out", "lse", "d_out", "d_out_of_rows", "d_lse", "d_out_scale", "dq", "dk",
        "dv", "entries", "bounds", "counters", "bias", "relative_bias", "alibi_slopes", "sinks",
        "key_padding", "dense", "dropout_state", "q_start", "q_stop", "kv_start", "kv_stop",
        "block_table", "len_kv", "diagonal",
    }  # fmt: skip
    used = set()
    for step in plan.steps:
        layout = step.spec.arguments.layout(step.numbers, tuple(step.places))
        order = [part for part in layout.parts if isinstance(part, int)]
        assert sorted(order) == list(range(len(step.places)))
        assert 0 < step.grid < 2**31
        for place in step.places.values():
            name = place.name
            assert name in operands or name in plan.buffers or name.startswith("list_")
            used.add(name)
    assert plan.buffers.keys() <= used | {"stats"}
    assert ("counters" in used) == (plan.num_counters > 0)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", CALLS)
def test_every_argument_of_a_forward_pass_is_named(name: str, arch: str) -> None:
    check(forward_of(CALLS[name], arch).plan)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "splits"])
def test_every_argument_of_a_backward_pass_is_named(
    name: str, arch: str, deterministic: bool
) -> None:
    check(backward_of(CALLS[name], arch, deterministic=deterministic).plan)


def families(plan: Plan) -> list[str]:
    return [step.spec.family for step in plan.steps]


def test_steps_of_plans() -> None:
    assert families(forward_of(CALLS["plain"], "sm_90").plan) == ["fwd_sm90"]
    assert families(forward_of(CALLS["plain"], "sm_80").plan) == ["fwd"]
    parts = forward_of(CALLS["fp32 parts"], "sm_90").plan
    assert families(parts) == ["split_fp32", "fwd_sm90"]
    assert families(forward_of(CALLS["fp32 parts"], "sm_80").plan) == ["split_fp32", "fwd"]
    assert len(forward_of(CALLS["8 bits"], "sm_80").plan.steps) == 3
    assert families(forward_of(CALLS["8 bits"], "sm_90").plan) == ["fwd_sm90"]
    assert len(backward_of(CALLS["plain"], "sm_90").plan.steps) == 3
    # Splits of the queries, whose parts of dk and dv a kernel each adds up.
    assert len(backward_of(CALLS["few keys"], "sm_90").plan.steps) == 5
    assert len(backward_of(CALLS["distance"], "sm_90").plan.steps) == 4


def test_plans_depend_on_no_address() -> None:
    """Tensors made anew lie elsewhere."""
    first, second = (forward_of(CALLS["sinks"], "sm_90").plan for _ in range(2))
    assert [step.numbers for step in first.steps] == [step.numbers for step in second.steps]
    assert first == second


@pytest.mark.parametrize("name", ["plain", "splits", "causal", "fp32"])
def test_calls_with_the_same_deciding_facts_have_one_plan(name: str) -> None:
    """But for their numbers of keys, which come at run time: decoding steps share plans."""
    q, _, call = call_of({"len_q": 16, **CALLS[name]})
    cache = torch.empty(2, 5000, 2, 64, dtype=q.dtype)
    found: dict[Any, list[Forward]] = {}
    for length in (*range(257, 321), 5000):
        k = cache[:, :length]
        parsed = parse_any(q, k, k, call)
        given = (parsed.problem, parsed.runtime, call, (1, 2, 3), (4, 5), Device("sm_90"))
        facts = deciding_facts(*given)
        assert facts is not None
        found.setdefault(facts, []).append(forward(*given))
    assert len(found) < 10
    assert all(one == plans[0] for plans in found.values() for one in plans)


@pytest.mark.parametrize("name", ["plain", "splits", "causal"])
@pytest.mark.parametrize("len_q", [1, 20, 300])
def test_calls_of_as_many_key_blocks_have_one_plan(name: str, len_q: int) -> None:
    q, _, call = call_of({**CALLS[name], "len_q": len_q})
    cache = torch.empty(2, 5000, 2, 64, dtype=q.dtype)
    found: dict[int, list[Forward]] = {}
    for length in (*range(5, 5000, 61), 5000):
        k = cache[:, :length]
        parsed = parse_any(q, k, k, call)
        step = keys_per_block(parsed.problem, parsed.runtime, call, Device("sm_86"))
        assert step is not None
        planned = forward(parsed.problem, parsed.runtime, call, (1, 2, 3), (4, 5), Device("sm_86"))
        found.setdefault(-(-length // step), []).append(planned)
    assert len(found) > 1
    assert all(one == plans[0] for plans in found.values() for one in plans)


@pytest.mark.parametrize("name", ["window", "bias", "ragged", "lists", "fp32", "8 bits"])
def test_key_blocks_decide_no_plan_that_lengths_are_in(name: str) -> None:
    q, k, call = call_of(CALLS[name])
    parsed = parse_any(q, k, k, call)
    assert keys_per_block(parsed.problem, parsed.runtime, call, Device("sm_80")) is None


@pytest.mark.parametrize("name", ["window", "bias", "ragged", "lists", "fp32 parts", "8 bits"])
def test_plans_are_not_shared_where_lengths_are_in_more(name: str) -> None:
    q, k, call = call_of(CALLS[name])
    parsed = parse_any(q, k, k, call)
    steps = (1, 2, 3), (4, 5)
    assert deciding_facts(parsed.problem, parsed.runtime, call, *steps, Device("sm_80")) is None


@pytest.mark.parametrize(("len_q", "most"), [(1, 4 * 64), (16, 12 * 64), (300, 45 * 64)])
def test_short_sequences_are_not_balanced(len_q: int, most: int) -> None:
    """Where even the longest one has fewer key blocks than a merge takes time."""

    def planned(longest: int) -> Forward:
        ends = torch.tensor([0, 1, longest], dtype=torch.int32)
        of_k = jitattn.Ragged.from_cu_seqlens(ends, longest)
        of_q = jitattn.Ragged.from_cu_seqlens(ends, len_q)
        return forward_of({"q_seqs": of_q, "kv_seqs": of_k, "len_kv": longest}, "sm_86")

    short, long = planned(most), planned(most + 1)
    assert (short.tiling.num_splits, short.plan.buffers, short.plan.num_counters) == (1, {}, 0)
    assert long.tiling.num_splits == 0
    assert long.plan.buffers
    assert long.plan.num_counters == long.tiling.num_ctas > short.tiling.num_ctas


@pytest.mark.parametrize("fault", ["missing", "unknown", "doubled"])
def test_faulty_arguments_are_refused(fault: str) -> None:
    step = forward_of(CALLS["sinks"], "sm_90").plan.steps[-1]
    numbers, places = dict(step.numbers), dict(step.places)
    if fault == "missing":
        del numbers["len_q"]
    elif fault == "unknown":
        numbers["length_q"] = 1
    else:
        places["len_q"] = Place("q")
    with pytest.raises(LaunchError, match="len"):
        step.spec.arguments.layout(numbers, tuple(places))


def test_dynamic_arguments_go_where_their_names_are() -> None:
    step = forward_of(CALLS["ragged"], "sm_90").plan.steps[-1]
    names = tuple(step.places)
    layout = step.spec.arguments.layout(step.numbers, names)
    values = {name: 1000 + idx for idx, name in enumerate(names)}
    filled = bytearray(layout.size)
    given = [part if isinstance(part, bytes) else values[names[part]] for part in layout.parts]
    layout.pack_into(filled, 0, *given)
    assert bytes(filled) == step.spec.arguments.pack({**step.numbers, **values})
