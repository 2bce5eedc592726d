"""Tests gradients of few keys seen by many queries, which are split over CTAs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.plan import kv_parts
from jitattn.reference import reference
from jitattn.request import request
from tests.support.compare import rel_l2

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LIMIT = {FP16: 1e-3, BF16: 8e-3, FP32: 5e-6}


def tensors(
    dtype: torch.dtype, len_q: int, len_kv: int, heads: tuple[int, int] = (4, 2), batch: int = 1
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    sizes = ((len_q, heads[0]), (len_kv, heads[1]), (len_kv, heads[1]))
    return [torch.randn(batch, *x, 64, generator=generator).to("cuda", dtype) for x in sizes]


def gradients(qkv: list[torch.Tensor], is_true: bool = False, **arguments: Any) -> Any:
    own = [x.detach().to(torch.float64 if is_true else x.dtype).requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = (reference if is_true else jitattn.attention)(*own, **arguments)
    generator = torch.Generator().manual_seed(6)
    d_out = torch.randn(out.shape, generator=generator).to(qkv[0])
    return torch.autograd.grad(out, own, d_out.to(out.dtype))


@pytest.fixture
def splits(monkeypatch: pytest.MonkeyPatch) -> list[kv_parts.Split]:
    """Splits that calls take, which are as those of a chip of many multiprocessors."""
    found: list[kv_parts.Split] = []
    choose = kv_parts.choose_split

    def noted(spec: Any, num_slots: int, *rest: Any, **more: Any) -> kv_parts.Split:
        found.append(choose(spec, 264, *rest, **more))
        return found[-1]

    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(kv_parts, "choose_split", noted)
    return found


MASKS = {
    "full": jitattn.Full(),
    "causal": jitattn.Causal(),
    "window": jitattn.Window(200, 40, keep_first=3),
    "stride": jitattn.LocalStride(16, 2, 3),
    "coarse stride": jitattn.LocalStride(64, 2, 3),
    "lists": jitattn.PerHead([jitattn.Full(), jitattn.Window(50)]),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("deterministic", [False, True], ids=["any order", "deterministic"])
@pytest.mark.parametrize("has_launches", [False, True], ids=["one launch", "launches"])
def test_split_queries(
    name: str,
    deterministic: bool,
    has_launches: bool,
    splits: list[kv_parts.Split],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_launches:
        monkeypatch.setattr(kv_parts, "_MOST_ROWS", dict.fromkeys(kv_parts._MOST_ROWS, 128))
    qkv = tensors(FP16, 1100, 150, batch=1)
    arguments = {"mask": MASKS[name]}
    found = gradients(qkv, deterministic=deterministic, **arguments)
    for got, true in zip(found, gradients(qkv, is_true=True, **arguments), strict=True):
        assert rel_l2(got, true) < LIMIT[FP16]
    assert splits[0].num_ctas > 1
    assert (splits[0].num_launches > 1) == has_launches


@pytest.mark.parametrize("layout", ["ragged", "padded", "paged"])
@pytest.mark.parametrize("has_launches", [False, True], ids=["one launch", "launches"])
def test_split_queries_of_sequences(
    layout: str,
    has_launches: bool,
    splits: list[kv_parts.Split],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if has_launches:
        monkeypatch.setattr(kv_parts, "_MOST_ROWS", dict.fromkeys(kv_parts._MOST_ROWS, 128))
    index = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in ([0, 60, 100], [55, 90])]
    q, k, v = tensors(BF16, 900, 100, batch=2)
    kv_seqs: Any = jitattn.Padded(index[1])
    if layout == "ragged":
        k, v = k[0], v[0]
        kv_seqs = jitattn.Ragged.from_cu_seqlens(index[0], max_length=60)
    elif layout == "paged":
        k, v = (x.reshape(10, 20, *x.shape[2:]) for x in (k, v))
        table = torch.tensor([[3, 1, 2, 0, 4], [3, 6, 7, 8, 9]], dtype=torch.int32, device="cuda")
        kv_seqs = jitattn.Paged(table, index[1])
    found = gradients([q, k, v], kv_seqs=kv_seqs)
    for got, true in zip(found, gradients([q, k, v], is_true=True, kv_seqs=kv_seqs), strict=True):
        assert rel_l2(got, true) < LIMIT[BF16]
    assert splits[0].num_ctas > 1


def test_fp32_and_dropout_are_split_too(splits: list[kv_parts.Split]) -> None:
    state = jitattn.dropout_state("cuda")
    for dtype in (FP16, FP32):
        qkv = tensors(dtype, 1100, 40)
        arguments = {"dropout_p": 0.3, "dropout_state": state}
        found = gradients(qkv, **arguments)
        for got, true in zip(found, gradients(qkv, is_true=True, **arguments), strict=True):
            assert rel_l2(got, true) < LIMIT[dtype]
    assert all(split.num_ctas > 1 for split in splits)


@pytest.mark.real_gpu  # whose blocks of keys add to dq in their order
def test_a_fixed_number_of_splits_leaves_sequences_alone(splits: list[kv_parts.Split]) -> None:
    """The gradients of a sequence do not depend on what is beside it."""
    alone = tensors(FP16, 600, 64)
    d_out = torch.randn_like(alone[0])
    found = []
    for others in (0, 3):
        own = [torch.cat([x, *[torch.randn_like(x)] * others]).requires_grad_() for x in alone]
        with torch.enable_grad():
            out = jitattn.attention(*own, num_splits=1, deterministic=True)
        room = torch.zeros_like(out)
        room[:1] = d_out
        found.append(torch.autograd.grad(out, own, room))
    for one, beside in zip(*found, strict=True):
        assert torch.equal(one, beside[:1])
    assert all(split.num_ctas == 1 for split in splits)


@pytest.mark.real_gpu
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
def test_the_error_does_not_grow_with_the_number_of_queries(dtype: torch.dtype) -> None:
    errors = []
    for length in (4096, 4_200_000):
        q, k, v = tensors(dtype, length, 24, heads=(1, 1))
        own = [x.requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            out = jitattn.attention(*own)
        d_out = torch.full_like(out, 2.0**-6)  # dv is a number of fp16 then
        found = torch.autograd.grad(out, own, d_out)
        wide = [x.detach().double().requires_grad_() for x in own]
        with torch.enable_grad():
            scores = wide[0][0, :, 0] @ wide[1][0, :, 0].T * 0.125
            truth = scores.softmax(-1) @ wide[2][0, :, 0]
        true = torch.autograd.grad(truth, wide, d_out[0, :, 0].double())
        errors.append([rel_l2(x, y) for x, y in zip(found[1:], true[1:], strict=True)])
    assert errors[1][1] < max(1.5 * errors[0][1], LIMIT[dtype] / 2)


@pytest.mark.real_gpu
def test_split_gradients_are_reproducible() -> None:
    qkv = tensors(BF16, 100_000, 48)
    first = gradients(qkv, deterministic=True)
    for _ in range(20):
        again = gradients(qkv, deterministic=True)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))
