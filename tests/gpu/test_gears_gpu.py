"""Gears on a GPU: the errors that they promise, on every path, and tiles that are asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import jitattn
from jitattn.jit.device import device
from jitattn.plan import prepare
from jitattn.request import problem, request
from jitattn.spec.enums import Dtype, Numerics
from jitattn.spec.kernel_spec import arch_number
from jitattn.values.gears import GEARS
from jitattn.values.tensors import DTYPES
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv

#: What rounding a result to its dtype adds.
ROUNDING = {torch.float16: 3e-4, torch.bfloat16: 2.5e-3, torch.float32: 0.0}


@pytest.fixture
def geforce(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let calls believe that this GPU is faster with fp16 accumulators."""
    own = replace(device(0), name="NVIDIA GeForce RTX 3090", arch="sm_86")
    monkeypatch.setattr(problem, "device", lambda _: own)
    monkeypatch.setattr(problem, "_problems", {})
    monkeypatch.setattr(request, "_requests", {})


def tensors(
    dtype: torch.dtype, len_q: int, len_kv: int, heads: tuple[int, int], dim: int, seed: int = 3
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, len_q, heads[0], dim), (2, len_kv, heads[1], dim), (2, len_kv, heads[1], dim))
    return [torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes]


def check(
    qkv: list[torch.Tensor], gear: int, factor: float = 2.0, **arguments: Any
) -> torch.Tensor:
    """Within a factor of the gear's promise: few keys average less."""
    out, lse = jitattn.attention(
        *qkv, gear=gear, out_dtype=torch.float32, return_lse=True, **arguments
    )
    for name in ("tile_rows", "num_splits"):
        arguments.pop(name, None)
    truth, true_lse = jitattn.reference.reference(*qkv, return_lse=True, **arguments)
    assert rel_l2(out, truth) < factor * GEARS[gear].rel_l2[DTYPES[qkv[0].dtype]]
    limit = {3: 2e-3, 4: 3e-2}.get(gear, 2e-5)
    assert (lse - true_lse).nan_to_num(0.0).abs().max() < limit
    return out


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("gear", list(GEARS))
@pytest.mark.parametrize("len_q", [256, 16, 40])
def test_the_promise(dtype: torch.dtype, gear: int, len_q: int) -> None:
    q, k, v = random_qkv(1, len_q, 4096, 4, head_dim=128, device="cuda", seed=1)
    check([x.to(dtype) for x in (q, k, v)], gear, factor=1.0)


@pytest.mark.usefixtures("geforce")
@pytest.mark.parametrize("len_q", [256, 16, 40])
def test_the_promise_of_fp16_accumulators(len_q: int) -> None:
    q, k, v = random_qkv(1, len_q, 4096, 4, head_dim=128, device="cuda", seed=1)
    qkv = [x.half() for x in (q, k, v)]
    assert jitattn.explain(*qkv, gear=3).kernel["numerics"] == Numerics.F16_ACC
    check(qkv, 3, factor=1.0)


MASKS = {
    "full": {},
    "causal": {"mask": jitattn.Causal()},
    "window": {"mask": jitattn.Window(50, 0, keep_first=3)},
    "stride": {"mask": jitattn.LocalStride(64, 1, 3)},
    "lists": {"mask": jitattn.LocalStride(16, 2, 3)},
    "softcap": {"softcap": 2.0},
    "splits": {"num_splits": 3},
}


@pytest.mark.parametrize("name", list(MASKS))
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.float16), (1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_masks(
    gear: int, dtype: torch.dtype, heads: tuple[int, int], name: str, request: Any
) -> None:
    if gear == 3 and dtype is torch.float16:
        request.getfixturevalue("geforce")
    for len_q, len_kv in ((200, 333), (5, 300)):
        check(tensors(dtype, len_q, len_kv, heads, 64), gear, **MASKS[name])


@pytest.mark.parametrize("dim", [7, 40, 80, 192, 256])
@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.float16), (1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_head_dims(gear: int, dtype: torch.dtype, dim: int, request: Any) -> None:
    if gear == 3 and dtype is torch.float16:
        request.getfixturevalue("geforce")
    check(tensors(dtype, 150, 200, (2, 1), dim), gear, mask=jitattn.Causal())


@pytest.mark.parametrize(
    ("gear", "dtype"),
    [(1, torch.bfloat16), (3, torch.float32), (3, torch.float16)],
    ids=str,
)
def test_sequences_and_pages(gear: int, dtype: torch.dtype, request: Any) -> None:
    if dtype is torch.float16:
        request.getfixturevalue("geforce")
    lengths = torch.tensor([130, 1, 0, 69], dtype=torch.int32, device="cuda")
    start = lengths.cumsum(0, dtype=torch.int32) - lengths
    seqs = jitattn.Ragged(start, lengths)
    q, k, v = (x[0] for x in tensors(dtype, 200, 200, (4, 2), 64))
    out = check([q, k, v], gear, mask=jitattn.Causal(), q_seqs=seqs, kv_seqs=seqs)
    pages = torch.full((40, 16, 2, 64), float("nan"), device="cuda", dtype=dtype)
    k_pages, v_pages = pages.clone(), pages.clone()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(1)).view(4, 10).int()
    for b, (first, count) in enumerate(zip(start.tolist(), lengths.tolist(), strict=True)):
        for t in range(count):
            page, row = int(order[b, t // 16]), t % 16
            k_pages[page, row], v_pages[page, row] = k[first + t], v[first + t]
    paged = jitattn.attention(
        q, k_pages, v_pages, gear=gear, out_dtype=torch.float32, mask=jitattn.Causal(),
        q_seqs=seqs, kv_seqs=jitattn.Paged(order.cuda(), lengths),
    )  # fmt: skip
    assert rel_l2(paged, out) < GEARS[gear].rel_l2[DTYPES[dtype]]


@pytest.mark.parametrize("name", ["full", "causal", "window", "stride", "splits"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits(dtype: torch.dtype, dim: int, heads: tuple[int, int], name: str) -> None:
    """With a mean in every channel of K, which the softmax does not see and the LSE does."""
    given = MASKS[name]
    for len_q, len_kv in ((200, 333), (70, 1100)):
        q, k, v = tensors(dtype, len_q, len_kv, heads, dim)
        k = k + torch.linspace(-3, 3, dim, device="cuda", dtype=dtype)
        kernel = jitattn.explain(q, k, v, gear=4, **given).kernel
        assert kernel["numerics"] == Numerics.INT8_F16
        check([q, k, v], 4, factor=1.0, **given)
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        again = jitattn.attention(*turned, gear=4, layout="bhsd", **given)
        one = jitattn.attention(q, k, v, gear=4, **given)
        assert torch.equal(again.transpose(1, 2), one)


@pytest.mark.parametrize("name", ["full", "causal", "splits", "long window"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_of_sums_that_are_parked(dtype: torch.dtype, name: str) -> None:
    """Maxima that rise late, and values that do not cancel: sums that outgrow what is added."""
    masks = {**MASKS, "long window": {"mask": jitattn.Window(2500, 0, keep_first=1100)}}
    q, k, v = tensors(dtype, 150, 5000, (1, 1), 128)
    k[:, 700:720] *= 2.0
    for values in (v, v / 8 + 1.0):
        check([q, k, values], 4, factor=1.0, **masks[name])


SIZES = {torch.float16: (1e-6, 1e-4, 100.0, 14000.0), torch.bfloat16: (1e-35, 1e-20, 1e20, 7e37)}


@pytest.mark.parametrize(
    ("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes], ids=str
)
def test_8_bits_with_values_of_any_size(dtype: torch.dtype, size: float) -> None:
    q, k, v = tensors(dtype, 200, 1500, (2, 2), 128)
    v = (v.clamp(-4.5, 4.5).float() * size).to(dtype)
    check([q, k, v], 4, factor=1.0)
    check([q, k, v.abs()], 4, factor=1.0)  # all that can add up does


@pytest.mark.parametrize("size", [4.5, 13500.0])
@pytest.mark.parametrize("nats", [9.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_a_key_that_outweighs_others(
    dtype: torch.dtype, nats: float, size: float
) -> None:
    """And has nothing to give: what is left of the weights of all others decides."""
    q, k, v = tensors(dtype, 130, 1500, (1, 1), 128)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 0, :, 0] = nats * 128**0.5 / 8.0
    v = (v.clamp(-4.5, 4.5).float() * (size / 4.5)).to(dtype)
    v[:, 0] = 0.0
    out = jitattn.attention(q, k, v, gear=4, out_dtype=torch.float32)
    # 8 bits of k are for that key, too: with sums in fp32, the error is 0.03 to 0.04.
    assert rel_l2(out, jitattn.reference.reference(q, k, v)) < 0.05


@pytest.mark.parametrize("scale", [1e3, 1e4, 3e4, 1e5, 1e6])
@pytest.mark.parametrize("size", [1e-5, 1.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_scores_of_any_size(dtype: torch.dtype, size: float, scale: float) -> None:
    """Whatever 8 bits make of them, weights are weights, and add up to 1."""
    q, k, v = tensors(dtype, 130, 300, (2, 2), 128)
    v = (v.abs() + 0.5).float() * size
    out, lse = jitattn.attention(q, k, v.to(dtype), gear=4, scale=scale, return_lse=True)
    assert (out <= v.max() * 1.01).all()
    assert (out >= v.min() * 0.99).all()
    _, truth = jitattn.reference.reference(q, k, v, scale=scale, return_lse=True)
    assert ((lse - truth).abs() <= 0.6 * scale).all()  # 8 bits put q k off by 0.1, mostly


def test_8_bits_with_values_at_the_end_of_bf16() -> None:
    """Where the scale of values and the sum of weights together are no number of fp32."""
    q, k, v = tensors(torch.bfloat16, 3000, 3000, (1, 1), 128)
    v = torch.full_like(v, 1.2 * 2.0**126)
    v[..., 1] = 0.0
    for scale in (2.0, 10.0):
        out = jitattn.attention(q, k, v, gear=4, mask=jitattn.Window(0, 0), scale=scale)
        assert rel_l2(out.float() / 2.0**126, v.float() / 2.0**126) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_values_that_stand_out(dtype: torch.dtype) -> None:
    """Beside them, others keep their bits; infinities and NaN count for nothing."""
    q, k, v = tensors(dtype, 200, 1500, (2, 2), 128)
    v[..., ::32] *= 300.0
    out = check([q, k, v], 4, factor=1.0)
    truth = jitattn.reference.reference(q, k, v)
    quiet = torch.arange(128, device="cuda") % 32 != 0
    assert rel_l2(out[..., quiet], truth[..., quiet]) < GEARS[4].rel_l2[DTYPES[dtype]]
    q, k, v = (x[:, :200] for x in (q, k, v.clone()))
    one = jitattn.attention(q, k, v, mask=jitattn.Causal(), gear=4)
    v[:, 198, 0], v[:, 199, 1] = torch.inf, torch.nan
    other = jitattn.attention(q, k, v, mask=jitattn.Causal(), gear=4)
    assert torch.equal(one[:, :128], other[:, :128])  # rows of a tile that does not see these keys
    assert not other[:, 199].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gear", [0, 1])
def test_weights_far_below_the_largest_keep_their_bits(
    gear: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last key outweighs each other one by 10 nats, and has nothing to give."""
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)
    q, k, v = (x / 2 for x in tensors(dtype, 200, 512, (2, 2), 64))
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, -1, :, 0], v[:, -1] = 10.0, 0.0
    check([q, k, v], gear)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("gear", [0, 1, 3])
@pytest.mark.parametrize("scale", [1e5, 1e6, 1e7])
def test_scores_of_any_size(
    dtype: torch.dtype, gear: int, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where scores have no fractions, weights are still weights."""
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)
    q, k, v = tensors(dtype, 130, 128, (2, 2), 64)
    out, lse = jitattn.attention(q, k, v, gear=gear, scale=scale, return_lse=True)
    assert (out.abs() <= v.abs().max() * 1.001).all()
    _, truth = jitattn.reference.reference(q, k, v, scale=scale, return_lse=True)
    assert ((lse - truth).abs() <= 1e-3 * truth.abs()).all()


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


def test_8_bits_with_channels_that_stand_out() -> None:
    q, k, v = tensors(torch.float16, 300, 2000, (2, 2), 128)
    k[..., ::32] *= 20.0
    q[..., ::32] /= 20.0
    q[..., 5], k[..., 7] = 0.0, 0.0
    check([q, k, v], 4, factor=1.0)
    rows = torch.zeros_like(q)
    check([rows, k, v], 4, factor=1.0)
    blind = jitattn.attention(q, k[:, :100], v[:, :100], mask=jitattn.Causal(), gear=4)
    assert not blind[:, :200].any()


@pytest.mark.parametrize("scale", [None, 0.0])
def test_8_bits_of_nothing(scale: float | None) -> None:
    """Rows of zeros, and keys that are their mean: scales whose product is below every float."""
    q, k, v = tensors(torch.float16, 200, 200, (2, 2), 128)
    k = torch.ones_like(k)
    for own_q in (q, torch.zeros_like(q)):
        check([own_q, k, v], 4, factor=1.0, mask=jitattn.Causal(), scale=scale)


@pytest.mark.parametrize(
    ("given", "dim", "len_q"),
    [
        ({"softcap": 2.0}, 128, 200),
        ({"sinks": torch.zeros(2)}, 128, 200),
        ({"scale": -0.1}, 128, 200),
        ({"mask": jitattn.LocalStride(16, 2, 3)}, 128, 200),
        ({}, 128, 64),
        ({}, 80, 200),
    ],
    ids=str,
)
def test_what_8_bits_do_not_serve_is_as_with_gear_3(
    given: dict[str, Any], dim: int, len_q: int
) -> None:
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    qkv = tensors(torch.bfloat16, len_q, 300, (2, 2), dim)
    assert jitattn.explain(*qkv, gear=4, **given).kernel["numerics"] == Numerics.F32_ACC
    one, other = (jitattn.attention(*qkv, gear=gear, **given) for gear in (3, 4))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("dim", "least_arch"), [(32, 90), (64, 999)])
def test_small_head_dims_have_8_bits_where_that_pays(arch: str, dim: int, least_arch: int) -> None:
    """`least_arch`: from there on, it does not."""
    qkv = tensors(torch.bfloat16, 200, 300, (2, 2), dim)
    expected = Numerics.F32_ACC if arch_number(arch) >= least_arch else Numerics.INT8_F16
    assert jitattn.explain(*qkv, gear=4).kernel["numerics"] == expected
    check(qkv, 4, factor=1.0)


@pytest.mark.real_gpu
def test_8_bits_can_be_captured() -> None:
    qkv = tensors(torch.float16, 200, 300, (4, 2), 128)
    jitattn.warmup(*qkv, gear=4)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = jitattn.attention(*qkv, gear=4)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=side):
            captured = jitattn.attention(*qkv, gear=4)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
def test_all_gears_train_with_the_numerics_of_gear_2(dtype: torch.dtype) -> None:
    qkv = tensors(dtype, 100, 130, (4, 2), 128)
    own = [x.double().requires_grad_() for x in qkv]
    with torch.enable_grad():
        truth = jitattn.reference.reference(*own)
    d_out = torch.randn(truth.shape, generator=torch.Generator().manual_seed(2)).to(qkv[0])
    wanted = torch.autograd.grad(truth, own, d_out.double())
    for gear in GEARS:
        leaves = [x.detach().requires_grad_() for x in qkv]
        with torch.enable_grad():
            out = jitattn.attention(*leaves, gear=gear)
        limit = ROUNDING[dtype] + GEARS[gear].rel_l2[DTYPES[dtype]]
        assert rel_l2(out, truth) < 2 * limit
        for one, other in zip(torch.autograd.grad(out, leaves, d_out), wanted, strict=True):
            assert rel_l2(one, other) < 4 * limit + 4 * ROUNDING[dtype]


@pytest.mark.parametrize("tile_rows", [16, 64, 128])
@pytest.mark.parametrize(("len_q", "heads"), [(300, (2, 2)), (7, (4, 1))], ids=str)
@pytest.mark.parametrize("mask", [jitattn.Causal(), jitattn.LocalStride(16, 2, 3)], ids=str)
def test_a_tile_that_is_asked_for(
    tile_rows: int, len_q: int, heads: tuple[int, int], mask: Any
) -> None:
    qkv = tensors(torch.float16, len_q, 500, heads, 64)
    block_q = jitattn.explain(*qkv, mask=mask, tile_rows=tile_rows).kernel["block_q"]
    assert block_q in (tile_rows, 64)
    check(qkv, 2, mask=mask, tile_rows=tile_rows)


def test_the_default_of_the_process() -> None:
    qkv = tensors(torch.bfloat16, 100, 100, (2, 2), 64)
    expected = jitattn.attention(*qkv, gear=1, out_dtype=torch.float32)
    with jitattn.set_default_gear(1):
        assert torch.equal(jitattn.attention(*qkv, out_dtype=torch.float32), expected)
    assert not torch.equal(jitattn.attention(*qkv, out_dtype=torch.float32), expected)
    assert Dtype.BF16 in GEARS[1].rel_l2
