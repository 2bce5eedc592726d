"""Tests which calls take the wgmma kernels, and how TMA is told where their operands lie."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import jitattn
from jitattn.jit.tensor_maps import BoxedTensor
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.fwd_sm90 import FwdSm90Spec
from jitattn.plan import wgmma
from jitattn.plan.forward import Forward, deciding_facts, forward, keys_per_block
from jitattn.plan.step import Place, Step
from jitattn.request.layouts import parse_any
from tests.cpu.plan.test_plan import CALLS, Device, call_of, check, forward_of

BATCH, LEN_Q, LEN_KV, HEADS_Q, HEADS_KV, DIM = 2, 300, 320, 4, 2, 64
GROUP = HEADS_Q // HEADS_KV
TAKEN = {
    "plain", "causal", "window", "stride", "padding", "sinks", "dropout", "bound", "ragged",
    "padded", "rows by index", "few keys", "pages", "lists", "small stride", "8 bits", "distance",
    "8 bits, ragged", "8 bits in pages", "fp32 parts", "fp32 parts with padding",
    "few keys in fp32",
}  # fmt: skip


def plan_of(q: Any, k: Any, v: Any, **given: Any) -> Forward:
    _, call = jitattn.api.attention.bind(q, k, v, given)
    parsed = parse_any(q, k, v, call)
    return forward(parsed.problem, parsed.runtime, call, (1, 2, 3), (4, 5), Device("sm_90"))


def step_of(*qkv: torch.Tensor, **given: Any) -> Step:
    step = plan_of(*qkv, **given).plan.steps[-1]
    assert isinstance(step.spec, FwdSm90Spec)
    return step


def batched(dim: int = DIM) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q = torch.empty(BATCH, LEN_Q, HEADS_Q, dim, dtype=torch.bfloat16)
    return q, *(q.new_empty(BATCH, LEN_KV, HEADS_KV, dim) for _ in range(2))


@pytest.mark.parametrize("name", CALLS)
def test_calls_that_are_served(name: str) -> None:
    planned = forward_of(CALLS[name], "sm_90")
    step = planned.plan.steps[-1]
    assert isinstance(step.spec, FwdSm90Spec) == (name in TAKEN)
    assert isinstance(step.spec, FwdSm90Spec) == (planned.tiling.refusal == "")
    check(planned.plan)
    if name in TAKEN:
        assert [name for name, _ in step.maps] == list(step.spec.tensor_maps)
        assert step.grid == min(planned.tiling.num_ctas, planned.tiling.num_slots)
        assert step.numbers["num_items"] == planned.tiling.num_ctas


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"scale": -1.0}, "scale is negative"),
    "gear": ({"gear": 0}, "numerics split_p"),
    "unaligned": ({"dim": 33}, "multiples of 16 bytes"),
    "ALiBi and lists": (
        {"alibi_slopes": torch.zeros(4), **CALLS["lists"]},
        "a term by distance",
    ),
    "bias": ({"bias": torch.zeros(1, 4, 300, 300)}, "biases"),
    "short": ({"len_q": 8}, "short"),
}


@pytest.mark.parametrize(("given", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_calls_say_why(given: dict[str, Any], reason: str) -> None:
    planned = forward_of(given, "sm_90")
    assert isinstance(planned.tiling.spec, FwdSpec)
    assert reason in planned.tiling.refusal


def test_pages_of_other_sizes_are_refused() -> None:
    q, k, _ = batched()
    pages = k.new_empty(40, 24, HEADS_KV, DIM)
    seqs = jitattn.Paged(torch.zeros(BATCH, 20, dtype=torch.int32), torch.tensor([300, 20]))
    assert "pages" in plan_of(q, pages, pages, kv_seqs=seqs).tiling.refusal


def test_tiles_that_mma_fills_better() -> None:
    """It packs three heads, which make no tile of 64 rows."""
    q, k, v = batched(128)
    planned = plan_of(torch.cat([q, q[:, :, :2]], 2)[:, :150], k, v)
    assert "filled better" in planned.tiling.refusal


@pytest.mark.parametrize(
    ("len_q", "heads_q", "expected"),
    [(4096, 2, (192, 1)), (4096, 64, (192, 1)), (128, 2, (128, 1)), (33, 4, (128, 2)),
     (70, 64, (192, 32)), (48, 8, (192, 4))],
)  # fmt: skip
def test_tiles_and_packed_heads(len_q: int, heads_q: int, expected: tuple[int, int]) -> None:
    """Rows of several heads fill tiles of 128 or 192 rows."""
    q, k, v = batched()
    planned = plan_of(q.new_empty(BATCH, len_q, heads_q, DIM), k, v).tiling
    assert (planned.spec.tile.block_q, planned.heads_per_tile) == expected


def test_rows_at_one_address_are_refused() -> None:
    q, k, v = batched()
    planned = plan_of(q, k[:, :1].expand(-1, LEN_KV, -1, -1), v)
    assert "overlap" in planned.tiling.refusal


def test_overlapping_rows_are_refused() -> None:
    q, _, v = batched()
    room = torch.empty(2, 40 * LEN_KV + DIM, dtype=q.dtype)
    windows = room.as_strided((2, LEN_KV, 1, DIM), (room.stride(0), 40, DIM, 1))
    planned = plan_of(q[:, :, :1], windows, v[:, :, :1])
    assert "overlap" in planned.tiling.refusal


def test_overlapping_heads_are_refused() -> None:
    _, k, v = batched()
    room = torch.empty(2, LEN_Q * 256, dtype=k.dtype)
    q = room.as_strided((2, LEN_Q, 4, DIM), (room.stride(0), 256, 32, 1))
    assert "overlap" in plan_of(q, k, v).tiling.refusal


def test_flat_rows_at_one_address_are_refused() -> None:
    """Even if no sequence has two of them."""
    row = torch.empty(1, HEADS_KV, DIM, dtype=torch.bfloat16)
    q = row.repeat(500, 1, 1)
    starts = torch.tensor([3, 7])
    of_q = jitattn.Ragged.from_cu_seqlens(torch.tensor([0, 300, 500], dtype=torch.int32), 300)
    of_k = jitattn.Ragged(starts, torch.tensor([1, 1]), 1)
    planned = plan_of(q, row.expand(20, -1, -1), row.expand(20, -1, -1), q_seqs=of_q, kv_seqs=of_k)
    assert "overlap" in planned.tiling.refusal


def test_no_keys_are_refused() -> None:
    q, k, v = batched()
    assert plan_of(q, k[:, :0], v[:, :0]).tiling.refusal


def test_another_architecture_has_none() -> None:
    assert all("device" in forward_of({}, arch).tiling.refusal for arch in ("sm_80", "sm_89"))


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("dim", [40, 128, 256])
def test_maps_of_a_batch(dim: int, layout: str) -> None:
    qkv = batched(dim)
    if layout == "bhsd":
        qkv = tuple(x.transpose(1, 2) for x in qkv)
    step = step_of(*qkv, layout=layout)
    block_kv, packed = step.spec.tile.block_kv, int(step.numbers["heads_per_tile"])
    assert dict(step.maps) == {
        "q": BoxedTensor(
            "bf16", (dim, GROUP, LEN_Q, HEADS_KV, BATCH),
            (dim * 2, HEADS_Q * dim * 2, GROUP * dim * 2, LEN_Q * HEADS_Q * dim * 2),
            (64, packed, 64 // packed, 1, 1),
        ),
        **{
            name: BoxedTensor(
                "bf16", (dim, LEN_KV, HEADS_KV, BATCH),
                (HEADS_KV * dim * 2, dim * 2, LEN_KV * HEADS_KV * dim * 2), (64, block_kv, 1, 1),
            )
            for name in ("k", "v")
        },
    }  # fmt: skip


def test_a_dimension_without_stride_has_no_extent() -> None:
    q, k, v = batched()
    alike = k[:1].expand(BATCH, -1, -1, -1)
    boxed = dict(step_of(q, alike, v[:, :, :1].expand(-1, -1, HEADS_KV, -1)).maps)
    assert boxed["k"].shape == (DIM, LEN_KV, HEADS_KV, 1)
    assert boxed["v"].shape == (DIM, LEN_KV, 1, BATCH)
    assert all(step > 0 and step % 16 == 0 for one in boxed.values() for step in one.strides)


def test_maps_of_sequences() -> None:
    """Flat tensors have all rows in one dimension; rows by index are those of the cache."""
    ends = torch.tensor([0, 300, 500], dtype=torch.int32)
    seqs = jitattn.Ragged.from_cu_seqlens(ends, 300)
    flat = torch.empty(500, HEADS_KV, DIM, dtype=torch.bfloat16)
    boxed = dict(step_of(flat, flat, flat, q_seqs=seqs, kv_seqs=seqs).maps)
    assert boxed["q"].shape == (DIM, 1, 500, HEADS_KV, 1)
    assert boxed["k"].shape == boxed["v"].shape == (DIM, 500, HEADS_KV, 1)
    q, k, _ = batched()
    cache = k.new_empty(7, LEN_KV, HEADS_KV, DIM)
    where = jitattn.Padded(torch.tensor([9, 300]), batch_idx=torch.tensor([6, 0]))
    boxed = dict(step_of(q, cache, cache, kv_seqs=where).maps)
    assert boxed["q"].shape == (DIM, GROUP, LEN_Q, HEADS_KV, BATCH)
    assert boxed["k"].shape == (DIM, LEN_KV, HEADS_KV, 7)


def test_the_counter_of_tiles_follows_the_arrivals() -> None:
    q, k, v = batched()
    step = step_of(q, k, v, num_splits=1)
    assert step.places["tile_counter"] == Place("counters", 0)
    planned = plan_of(q, k, v, num_splits=2)
    items = planned.tiling.num_ctas
    assert planned.plan.steps[-1].places["tile_counter"] == Place("counters", 4 * items)
    assert planned.plan.num_counters == items + 1


@pytest.mark.parametrize("mask", [jitattn.Full(), jitattn.Causal()], ids=str)
def test_sections_fit_the_cache(mask: Any) -> None:
    """As many heads as share 24 MB of K and V; at least those of one kv head, at most all."""
    found = {}
    for length in (64, 4096, 1 << 16):
        q = torch.empty(1, 65, 32, 128, dtype=torch.float16, device="meta")
        k = torch.empty(1, length, 8, 128, dtype=torch.float16, device="meta")
        _, call = jitattn.api.attention.bind(q, k, k, {"mask": mask})
        parsed = parse_any(q, k, k, call)
        found[length] = wgmma.section_heads(parsed.problem, parsed.runtime, 2)
    if mask == jitattn.Full():
        assert set(found.values()) == {2}  # packed in pairs
    else:
        assert found == {64: 16, 4096: 16, 1 << 16: 2}


def test_sections_of_many_sequences_have_no_more_heads_than_there_are() -> None:
    """Their items, times a section, must not pass 32 bits."""
    lengths = torch.arange(0, 3 * 400_001, 3, dtype=torch.int32)
    seqs = jitattn.Ragged.from_cu_seqlens(lengths, 96)
    q = torch.empty(1, 32, 8, dtype=torch.float16).expand(1_200_000, -1, -1)
    given = {"q_seqs": seqs, "kv_seqs": seqs, "mask": jitattn.Causal()}
    _, call = jitattn.api.attention.bind(q, q, q, given)
    parsed = parse_any(q, q, q, call)
    assert wgmma.section_heads(parsed.problem, parsed.runtime, 1) == 32


@pytest.mark.parametrize(("page_size", "rows"), [(16, 16), (48, 16), (64, 64), (256, 128)])
def test_pages_are_copied_in_pieces(page_size: int, rows: int) -> None:
    q, k, _ = batched(128)
    pages = k.new_empty(40, page_size, HEADS_KV, 128)
    seqs = jitattn.Paged(torch.zeros(BATCH, 20, dtype=torch.int32), torch.tensor([300, 20]))
    step = step_of(q, pages, pages, kv_seqs=seqs)
    assert step.numbers["piece_rows"] == rows
    boxed = dict(step.maps)["k"]
    assert boxed.shape == (128, page_size, HEADS_KV, 40)
    assert boxed.box == (64, rows, 1, 1)


def test_plans_with_maps_are_not_those_of_other_lengths() -> None:
    q, k, call = call_of({})
    parsed = parse_any(q, k, k, call)
    given = (parsed.problem, parsed.runtime, call)
    assert deciding_facts(*given, (1, 2, 3), (4, 5), Device("sm_90")) is None
    assert keys_per_block(*given, Device("sm_90")) is None
    assert deciding_facts(*given, (1, 2, 3), (4, 5), Device("sm_80")) is not None


@pytest.mark.parametrize("dim", range(8, 257, 8))
@pytest.mark.parametrize("dim_v", [8, 128, 256])
def test_tiles_fit_the_multiprocessor(dim: int, dim_v: int) -> None:
    for more in ({}, {"mask": jitattn.LocalStride(64, 2, 3)}, {"dropout_p": 0.5}):
        q = torch.empty(1, LEN_Q, 2, dim, dtype=torch.float16)
        v = torch.empty(1, LEN_Q, 2, dim_v, dtype=torch.float16)
        spec = step_of(q, q, v, **more).spec
        assert spec.smem_bytes <= 227 * 1024
        consumers = spec.tile.warps_q // 4
        registers = (32, 160) if consumers == 3 else (40, 232)  # fwd/sm90/traits.cuh
        assert 128 * (registers[0] + consumers * registers[1]) <= 65536
        assert spec.tile.block_q == 64 * consumers
        assert spec.tile.block_kv % 16 == 0
        sums = math.ceil(dim_v / 16) * 8 + spec.tile.block_kv * 3 // 4  # of output, scores, weights
        assert sums < registers[1]


def test_the_family_of_another_key_count_may_be_another() -> None:
    """Causal tiles are filled otherwise: such calls share no plan by their number of blocks."""
    found = set()
    for len_kv in (200, 255):
        q = torch.empty(1, 100, 5, 128, dtype=torch.bfloat16)
        k = torch.empty(1, len_kv, 1, 128, dtype=torch.bfloat16)
        _, call = jitattn.api.attention.bind(q, k, k, {"mask": jitattn.Causal()})
        parsed = parse_any(q, k, k, call)
        given = (parsed.problem, parsed.runtime, call)
        assert keys_per_block(*given, Device("sm_90")) is None
        assert keys_per_block(*given, Device("sm_86")) == 32
        found.add(forward(*given, (1, 2, 3), None, Device("sm_90")).tiling.spec.family)
    assert found == {"fwd", "fwd_sm90"}
