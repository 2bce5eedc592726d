"""Tests attention_with_kvcache on a GPU: random calls, graphs, full caches."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn import Rotary
from jitattn.jit import build
from jitattn.plan.choices import specs_of
from jitattn.spec.enums import Access, SeqLayout
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.kvcache import KINDS, CacheCase, cache_cases, check_kvcache
from tests.support.precompile import CompileOnce, forward_specs
from tests.support.random_cases import cases, check_part, in_parts

BF16 = torch.bfloat16
LAYOUTS = tuple(
    itertools.product((SeqLayout.BATCHED, SeqLayout.RAGGED), (SeqLayout.RAGGED, SeqLayout.PAGED))
)


@pytest.fixture(scope="module", autouse=True)
def _compiled(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel all kernels that the random cases can need."""
    specs = specs_of(
        [{"family": "append", "dtype": ["bf16", "fp16"], "table_dtype": ["bf16", "fp16", "fp32"]}],
        [arch],
    )
    specs += forward_specs(KINDS, LAYOUTS, arch)
    assert len(specs) <= 150
    assert compile_once(specs) == []


@cases(100)
@given(cache_cases())
def test_random_calls(case: CacheCase) -> None:
    check_kvcache(case, "cuda")


@pytest.mark.usefixtures("full_grid")
@in_parts
def test_many_random_calls(part: int) -> None:
    check_part(part, 1000, cache_cases(), lambda case: check_kvcache(case, "cuda"))


def step_inputs(batch: int, room: int) -> dict[str, torch.Tensor]:
    """One new token a sequence, pages of 16 with room for `room` rows each."""
    width = -(-room // 16)
    pages = torch.zeros(2, batch * width, 16, 2, 64, device="cuda", dtype=BF16)
    q = torch.randn(batch, 1, 8, 64, device="cuda", dtype=BF16)
    k, v = torch.randn(2, batch, 1, 2, 64, device="cuda", dtype=BF16)
    table = torch.randperm(batch * width, device="cuda").reshape(batch, width).int()
    return {"q": q, "k_cache": pages[0], "v_cache": pages[1], "k": k, "v": v, "block_table": table}


@pytest.mark.real_gpu
def test_a_graph_decodes_while_lengths_grow() -> None:
    """One graph a step: append, attend; the lengths are counted up between replays."""
    inputs = step_inputs(3, 200)
    length = torch.zeros(3, dtype=torch.int32, device="cuda")
    angle = torch.rand(208, 32, device="cuda")
    rotary = Rotary(angle.cos(), angle.sin(), interleaved=False)
    own = {name: x.clone() for name, x in inputs.items()}
    jitattn.attention_with_kvcache(**inputs, length=length, rotary=rotary)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention_with_kvcache(**inputs, length=length, rotary=rotary)
    compiled = build.stats().compiled
    for step in range(150):
        for name in ("q", "k", "v"):
            inputs[name].copy_(torch.randn_like(inputs[name]))
            own[name].copy_(inputs[name])
        length.fill_(step)
        graph.replay()
        again = jitattn.attention_with_kvcache(**own, length=step, rotary=rotary)
        assert rel_l2(out, again) < 4e-3  # another number of splits
    assert torch.equal(own["k_cache"], inputs["k_cache"])
    assert torch.equal(own["v_cache"], inputs["v_cache"])
    assert build.stats().compiled == compiled


@pytest.mark.parametrize("is_paged", [False, True])
def test_tokens_without_room_are_dropped(is_paged: bool) -> None:
    """Lengths on the device are not looked at; nothing is ever written elsewhere."""
    batch, room, new = 5, 32, 4
    around = torch.zeros(2, batch * 2 + 2, 16, 2, 64, device="cuda", dtype=BF16)
    caches = around[:, 1:-1]
    length = torch.tensor([0, 29, 32, 2**31 - 1, -7], dtype=torch.int32, device="cuda")
    k = torch.ones(batch, new, 2, 64, device="cuda", dtype=BF16)
    q = torch.randn(batch, new, 8, 64, device="cuda", dtype=BF16)
    where = {}
    if is_paged:
        table = torch.arange(batch * 2, device="cuda").reshape(batch, 2)
        table[0, 0] = 2**31 - 1  # a page that does not exist
        where["block_table"] = table
        k_cache, v_cache = caches
    else:
        k_cache, v_cache = (one.view(batch, room, 2, 64) for one in caches)
    jitattn.attention_with_kvcache(q, k_cache, v_cache, k, k, length=length, **where)
    rows = torch.stack([one.view(batch, room, -1)[..., 0] for one in caches])
    expected = torch.zeros_like(rows)
    if not is_paged:
        expected[:, 0, :4] = 1
    expected[:, 1, 29:] = 1
    expected[:, 4, :4] = 1  # a negative length counts as 0
    assert torch.equal(rows, expected)
    assert not around[:, 0].any()
    assert not around[:, -1].any()


def test_rows_of_the_cache_that_do_not_exist_are_not_touched() -> None:
    k_cache, v_cache = torch.zeros(2, 3, 32, 2, 64, device="cuda", dtype=BF16)
    rows = torch.tensor([3, -1, 1], device="cuda")
    k = torch.ones(3, 1, 2, 64, device="cuda", dtype=BF16)
    q = torch.randn(3, 1, 4, 64, device="cuda", dtype=BF16)
    out = jitattn.attention_with_kvcache(q, k_cache, v_cache, k, k, length=0, batch_idx=rows)
    assert k_cache.count_nonzero() == v_cache.count_nonzero() == 2 * 64
    assert torch.equal(out[:2], torch.zeros_like(out[:2]))
    assert torch.equal(out[2], torch.ones_like(out[2]))


@pytest.mark.real_gpu
def test_warmup_loads_the_kernel_that_appends() -> None:
    from jitattn.jit import backend
    from jitattn.jit.device import device
    from jitattn.run.append import append_spec
    from jitattn.run.forward import forget_kernels

    forget_kernels()
    q, k, v = torch.randn(3, 1, 8, 2, 24, device="cuda", dtype=torch.float16)
    tables = torch.rand(2, 64, 8, device="cuda")
    rotary = Rotary(tables[0], tables[1], interleaved=True)
    jitattn.warmup(q, k, v, mask=jitattn.Causal(), append=True, rotary=rotary)
    for access in Access:
        spec = append_spec(torch.float16, rotary, access, device(0).arch)
        assert backend.active.is_loaded(spec, 0)
