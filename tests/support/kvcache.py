"""Random calls of attention_with_kvcache: all cache layouts, with poison outside the tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import jitattn
from jitattn import reference
from jitattn.values.masks import Causal, Full
from jitattn.values.rotary import Rotary
from jitattn.values.sequences import Ragged

from .compare import EPS, LSE_NOISE_ULPS, rel_l2

#: (dtype, head_dim): few, so that few kernels serve thousands of cases.
KINDS = ((torch.bfloat16, 64), (torch.float16, 80), (torch.bfloat16, 20))


@dataclass(frozen=True)
class CacheCase:
    """A call; lengths are those of the sequences."""

    dtype: torch.dtype
    head_dim: int
    heads_kv: int
    group: int
    mask: Full | Causal
    cache: str  #: "batched", "rows" (batch_idx), "paged"
    layout: str
    used: tuple[int, ...]
    new: tuple[int, ...]  #: new tokens of each sequence; equal unless ragged
    len_q: int
    is_ragged: bool
    appends: bool
    rotary: str  #: "", "interleaved", "half_split"
    rotary_dim: int
    table_fp32: bool
    pads: bool
    length_is_int: bool
    index_dtype: torch.dtype
    page_size: int
    seed: int


@st.composite
def cache_cases(draw: st.DrawFn, most_rows: int = 150) -> CacheCase:
    """Draw a valid case."""
    dtype, head_dim = draw(st.sampled_from(KINDS))
    batch = draw(st.integers(1, 4))
    appends = draw(st.sampled_from((True, True, True, False)))
    is_ragged = draw(st.booleans()) if appends else False
    length_is_int = draw(st.booleans())
    used = st.sampled_from([n for n in (0, 1, 15, 16, 17, 63, 64, 65, 127, 150) if n <= most_rows])
    one_used, one_new = draw(used), draw(st.integers(0, 5))
    return CacheCase(
        dtype=dtype,
        head_dim=head_dim,
        heads_kv=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 4))),
        mask=draw(st.sampled_from((Full(), Causal(), Causal()))),
        cache=draw(st.sampled_from(("batched", "rows", "paged"))),
        layout=draw(st.sampled_from(("bshd", "bhsd"))),
        used=(one_used,) * batch if length_is_int else tuple(draw(used) for _ in range(batch)),
        new=tuple(draw(st.integers(0, 20)) for _ in range(batch))
        if is_ragged
        else (one_new if appends else 0,) * batch,
        len_q=draw(st.sampled_from((one_new, one_new, 1, 3))),
        is_ragged=is_ragged,
        appends=appends,
        rotary=draw(st.sampled_from(("", "interleaved", "half_split"))) if appends else "",
        rotary_dim=draw(st.sampled_from((2, 10, 16, head_dim))),
        table_fp32=draw(st.booleans()),
        pads=draw(st.booleans()),
        length_is_int=length_is_int,
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        page_size=draw(st.sampled_from((1, 16, 17))),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: CacheCase, device: str) -> dict[str, Any]:
    """Return the arguments of the call; unused rows are NaN."""
    chance = random.Random(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    batch, heads, dim = len(case.used), case.heads_kv, case.head_dim
    room = max(used + new for used, new in zip(case.used, case.new, strict=True))
    room += chance.randrange(3)

    def values(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    def index(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=case.index_dtype, device=device)

    pads = [chance.randrange(used + 1) if case.pads else 0 for used in case.used]
    arguments: dict[str, Any] = {"mask": case.mask, "layout": case.layout}
    if case.cache == "paged":
        width = max(1, -(-room // case.page_size))
        num_pages = batch * width + 2
        pages = list(range(num_pages))
        chance.shuffle(pages)
        table = torch.tensor(pages[: batch * width], dtype=case.index_dtype).reshape(batch, width)
        caches = torch.full((2, num_pages, case.page_size, heads, dim), float("nan"))
        caches = caches.to(case.dtype)
        for b, (used, pad) in enumerate(zip(case.used, pads, strict=True)):
            for row in range(pad, used):
                page = int(table[b, row // case.page_size])
                caches[:, page, row % case.page_size] = values(2, heads, dim)
        arguments["block_table"] = table.to(device)
    else:
        rows = list(range(batch + 2))
        if case.cache == "rows":
            chance.shuffle(rows)
            arguments["batch_idx"] = index(rows[:batch])
        count = batch + 2 if case.cache == "rows" else batch
        caches = torch.full((2, count, room, heads, dim), float("nan")).to(case.dtype)
        for b, (used, pad) in enumerate(zip(case.used, pads, strict=True)):
            caches[:, rows[b], pad:used] = values(2, used - pad, heads, dim)
        if case.layout == "bhsd":
            caches = caches.transpose(2, 3).contiguous()
    arguments["k_cache"], arguments["v_cache"] = caches.to(device)
    if case.is_ragged:
        starts = [sum(case.new[:b]) + 2 * b for b in range(batch)]
        total = sum(case.new) + 2 * batch
        shape_q, shape_new = (total, heads * case.group, dim), (total, heads, dim)
        arguments["q_seqs"] = Ragged(index(starts), index(list(case.new)), max(case.new))
    else:
        shape_q = (batch, case.len_q, heads * case.group, dim)
        shape_new = (batch, case.new[0], heads, dim)
        if case.layout == "bhsd":
            shape_q, shape_new = (
                (shape[0], shape[2], shape[1], shape[3]) for shape in (shape_q, shape_new)
            )
    arguments["q"] = values(*shape_q).to(device)
    if case.appends:
        arguments["k"], arguments["v"] = (
            values(*shape_new).to(device),
            values(*shape_new).to(device),
        )
    arguments["length"] = case.used[0] if case.length_is_int else index(list(case.used))
    if case.pads:
        arguments["left_pad"] = index(pads)
    if case.rotary:
        angle = torch.rand(room + 40, case.rotary_dim // 2, generator=generator) * 7
        table_dtype = torch.float32 if case.table_fp32 else case.dtype
        cos, sin = (f(angle).to(table_dtype).to(device) for f in (torch.cos, torch.sin))
        arguments["rotary"] = Rotary(cos, sin, interleaved=case.rotary == "interleaved")
    return arguments


def check_kvcache(case: CacheCase, device: str) -> None:
    """Compare the result and both caches with the reference's; nothing else may change."""
    arguments = build(case, device)
    # The truth is computed on the CPU: thousands of small operations are slow on a GPU.
    truth, lse_truth, k_truth, v_truth = reference.with_kvcache(**build(case, "cpu"))
    results = jitattn.attention_with_kvcache(**arguments, return_lse=True)
    out, lse, k_cache, v_cache = (
        x.cpu() for x in (*results, arguments["k_cache"], arguments["v_cache"])
    )
    assert torch.equal(v_cache.isnan(), v_truth.isnan()), case
    assert torch.equal(v_cache.nan_to_num(), v_truth.nan_to_num()), case
    assert torch.equal(k_cache.isnan(), k_truth.isnan()), case
    # Rotated in fp32 and rounded: differs from fp64 only at ties.
    error = (k_cache.double() - k_truth.double()).nan_to_num().abs()
    assert (error <= EPS[case.dtype] * k_truth.double().nan_to_num().abs() + 1e-6).all(), case
    assert torch.equal(lse.isneginf(), lse_truth.isneginf()), case
    assert rel_l2(out, truth) <= 2 * EPS[case.dtype], case
    finite = ~lse_truth.isneginf()
    error = (lse.double() - lse_truth)[finite].abs()
    # A score has D products; each rotated value may be off by half an ulp.
    bound = LSE_NOISE_ULPS * EPS[torch.float32] * 10 + (EPS[case.dtype] if case.rotary else 0)
    assert (error <= bound).all(), (case, error.max())
