"""Tests gear 4 on a GPU: INT8 q and k of ragged and padded sequences and paged keys."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.spec.enums import Numerics
from tests.support.compare import rel_l2
from tests.support.gears import MASKS, check, tensors

# On wgmma, gear 4 is computed as gear 3.
pytestmark = pytest.mark.usefixtures("mma_family")


def index(*numbers: int) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.int32, device="cuda")


def in_sequences(layout: str, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Four sequences, one without queries and one without keys; NaN in all rows of none."""
    of_q, of_kv = (130, 1, 0, 69), (700, 65, 300, 0)
    generator = torch.Generator().manual_seed(7)
    given: dict[str, Any] = {}
    found = []
    for name, lengths, heads in (("q", of_q, 6), ("k", of_kv, 2), ("v", of_kv, 2)):
        flat = torch.randn(sum(lengths) + 9, heads, 128, generator=generator)
        if name == "k":
            flat += torch.linspace(-3, 3, 128)
        flat[sum(lengths) :] = float("nan")
        if layout == "flat":
            found.append(flat.to("cuda", dtype))
            stops = [0, *torch.tensor(lengths).cumsum(0).tolist()]
            seqs: Any = jitattn.Ragged.from_cu_seqlens(index(*stops), max_length=max(lengths))
        else:
            # Left padding of 3, 0, 5 and 1 tokens.
            starts, room = (3, 0, 5, 1), max(lengths) + 5
            padded = torch.full((4, room, heads, 128), float("nan"))
            for b, (start, own) in enumerate(
                zip(starts, flat[: sum(lengths)].split(lengths), strict=True)
            ):
                padded[b, start : start + len(own)] = own
            found.append(padded.to("cuda", dtype))
            seqs = jitattn.Padded(index(*lengths), start=index(*starts))
        given["q_seqs" if name == "q" else "kv_seqs"] = seqs
    if layout == "batched q":
        found[0] = torch.randn(4, 200, 6, 128, generator=generator).to("cuda", dtype)
        del given["q_seqs"]
    return found, given


@pytest.mark.parametrize("name", ["full", "causal", "window", "splits"])
@pytest.mark.parametrize("layout", ["flat", "padded", "batched q"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_of_sequences(dtype: torch.dtype, layout: str, name: str) -> None:
    qkv, seqs = in_sequences(layout, dtype)
    given = {**MASKS[name], **seqs}
    assert Numerics(jitattn.explain(*qkv, gear=4, **given).kernel["numerics"]).is_quantized
    out = check(qkv, 4, factor=1.0, **given)
    assert out.isfinite().all()


def in_pages(
    k: torch.Tensor, v: torch.Tensor, lengths: tuple[int, ...], size: int, *, left: int = 0
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    """Keys and values of padded sequences, in shuffled pages; NaN in all rows of none.

    `left`: rows before the first key. The table names no page where a sequence has none.
    """
    counts = [-(-(left + length) // size) if length else 0 for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(5)).tolist()
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32)
    pages = []
    for tensor in (k, v):
        # Rows are wider than a page's own, as where k and v are in one tensor.
        wide = torch.full((len(order), size, *tensor.shape[2:-1], 2 * tensor.shape[-1]), torch.nan)
        free, nothing = iter(order), torch.full((left, *tensor.shape[2:]), torch.nan)
        for b, (count, length) in enumerate(zip(counts, lengths, strict=True)):
            for number in range(count):
                table[b, number] = page = next(free)
                rows = torch.cat((nothing, tensor[b, :length].float().cpu()))
                rows = rows[number * size : (number + 1) * size]
                wide[page, : len(rows), :, : tensor.shape[-1]] = rows
        pages.append(wide.to("cuda", tensor.dtype)[..., : tensor.shape[-1]])
    start = torch.full((len(lengths),), left, dtype=torch.int32, device="cuda") if left else None
    max_length = max(lengths) + 3 if left else None
    seqs = jitattn.Paged(table.cuda(), index(*lengths), start=start, max_length=max_length)
    return pages, {"kv_seqs": seqs}


#: Page sizes, and rows before the first key.
PAGES = [
    (torch.float16, 16, 0),
    (torch.bfloat16, 64, 0),
    (torch.float16, 7, 0),
    (torch.bfloat16, 16, 21),
]
KEYS_IN_PAGES = (530, 65, 0, 129)


def for_pages(dtype: torch.dtype) -> list[torch.Tensor]:
    """Padded keys and values, NaN behind each sequence."""
    q, k, v = (torch.cat((x, x + 0.5)) for x in tensors(dtype, 70, 530, (6, 2), 128))
    k = k + torch.linspace(-3, 3, 128, device="cuda", dtype=dtype)
    for b, length in enumerate(KEYS_IN_PAGES):
        k[b, length:] = v[b, length:] = torch.nan
    return [q, k, v]


@pytest.mark.parametrize("name", ["full", "causal", "window", "stride", "splits"])
@pytest.mark.parametrize(("dtype", "size", "left"), PAGES, ids=str)
def test_8_bits_in_pages(dtype: torch.dtype, size: int, left: int, name: str) -> None:
    q, k, v = for_pages(dtype)
    pages, given = in_pages(k, v, KEYS_IN_PAGES, size, left=left)
    given |= MASKS[name]
    assert Numerics(jitattn.explain(q, *pages, gear=4, **given).kernel["numerics"]).is_quantized
    before = [x.clone() for x in pages]
    out = check([q, *pages], 4, factor=1.0, **given)
    assert out.isfinite().all()
    assert not out[2].any()
    for one, other in zip(pages, before, strict=True):
        assert torch.equal(one.view(torch.int16), other.view(torch.int16))


@pytest.mark.parametrize(("dtype", "size", "left"), PAGES, ids=str)
def test_8_bits_in_pages_are_those_outside(dtype: torch.dtype, size: int, left: int) -> None:
    """Where sums alone differ: fp32 in pages."""
    q, k, v = for_pages(dtype)
    pages, in_them = in_pages(k, v, KEYS_IN_PAGES, size, left=left)
    outside = {"kv_seqs": jitattn.Padded(index(*KEYS_IN_PAGES))}
    common = {"mask": jitattn.Causal(), "gear": 4, "return_lse": True, "out_dtype": torch.float32}
    (one, lse), (other, other_lse) = (
        jitattn.attention(q, *kv, num_splits=2, **common, **given)
        for kv, given in ((pages, in_them), ((k, v), outside))
    )
    assert rel_l2(one, other) < (1e-3 if dtype is torch.float16 else 3e-3)
    assert (lse - other_lse).nan_to_num(0.0).abs().max() < 3e-4


@pytest.mark.parametrize("size", [16, 7])
def test_8_bits_in_pages_that_are_shared(size: int) -> None:
    """A prefix of two sequences, which have means of their own; queries one after another."""
    q, k, v = for_pages(torch.float16)
    (k, v), given = in_pages(k, v, KEYS_IN_PAGES, size)
    table = given["kv_seqs"].block_table[:2].clone()
    lengths = (300, 200)
    table[1] = table[0]
    fresh = given["kv_seqs"].block_table[3, :2]  # the last pages of the second one are its own
    table[1, 200 // size - 1 : 200 // size + 1] = fresh
    cu = index(0, 70, 140)
    given = {
        "q_seqs": jitattn.Ragged.from_cu_seqlens(cu, max_length=70),
        "kv_seqs": jitattn.Paged(table, index(*lengths), max_length=400),
        "mask": jitattn.Causal(),
        "num_splits": 1,  # the same as alone: P is rounded by the maxima of a split
    }
    q = q[:2].flatten(0, 1)
    assert Numerics(jitattn.explain(q, k, v, gear=4, **given).kernel["numerics"]).is_quantized
    out = check([q, k, v], 4, factor=1.0, **given)
    for b, length in enumerate(lengths):
        own = jitattn.Paged(table[b : b + 1], index(length), max_length=400)
        alone = jitattn.attention(
            q[None, 70 * b : 70 * b + 70], k, v, gear=4, out_dtype=torch.float32,
            mask=jitattn.Causal(), kv_seqs=own, num_splits=1,
        )  # fmt: skip
        assert rel_l2(alone[0], out[70 * b : 70 * b + 70]) < 1e-5


def test_8_bits_of_a_chunk_that_is_appended() -> None:
    q, k, v = for_pages(torch.float16)
    (k, v), given = in_pages(k, v, KEYS_IN_PAGES, 16)
    seqs = given["kv_seqs"]
    table = seqs.block_table[:2].clone()
    table[1, 5:10] = seqs.block_table[0, 20:25]
    lengths = index(150, 65)
    new = [x[:2, :70].contiguous() for x in for_pages(torch.float16)[1:]]
    for x in new:
        x.nan_to_num_(0.25)
    own = {"mask": jitattn.Causal(), "gear": 4, "num_splits": 2, "return_lse": True}
    found = jitattn.attention_with_kvcache(
        q[:2], k, v, *new, length=lengths, block_table=table, **own
    )
    after = jitattn.attention(q[:2], k, v, kv_seqs=jitattn.Paged(table, lengths + 70), **own)
    for one, other in zip(found, after, strict=True):
        assert torch.equal(one, other)
    check([q[:2], k, v], 4, 1.0, mask=own["mask"], kv_seqs=jitattn.Paged(table, lengths + 70))


def test_short_queries_on_pages_are_as_with_gear_3() -> None:
    q, k, v = for_pages(torch.float16)
    pages, given = in_pages(k, v, KEYS_IN_PAGES, 16)
    one, other = (jitattn.attention(q[:, :21], *pages, gear=gear, **given) for gear in (3, 4))
    assert torch.equal(one, other)


def test_8_bits_of_a_sequence_without_keys() -> None:
    q, k, v = (x[0] for x in tensors(torch.float16, 200, 100, (2, 2), 128))
    q[150] = float("inf")
    given = {
        "q_seqs": jitattn.Ragged.from_cu_seqlens(index(0, 100, 200), max_length=100),
        "kv_seqs": jitattn.Ragged.from_cu_seqlens(index(0, 100, 100), max_length=100),
    }
    assert Numerics(jitattn.explain(q, k, v, gear=4, **given).kernel["numerics"]).is_quantized
    out, lse = jitattn.attention(q, k, v, gear=4, return_lse=True, **given)
    assert not out[100:].any()
    assert torch.equal(lse[:, 100:], torch.full_like(lse[:, 100:], -float("inf")))


def test_rows_of_several_sequences_are_as_with_gear_3() -> None:
    q, k, v = (x[0] for x in tensors(torch.float16, 300, 300, (2, 2), 128))
    for seqs in (
        jitattn.Ragged(index(0, 0), index(300, 200)),
        jitattn.Ragged(index(0, 150), index(150, 150)),
    ):
        given = {"q_seqs": seqs, "kv_seqs": seqs}
        assert jitattn.explain(q, k, v, gear=4, **given).kernel["numerics"] == Numerics.F32_ACC
