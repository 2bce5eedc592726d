"""Tests gradients of fp32 inputs split into fp16 parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.plan import prepare
from jitattn.request import request
from jitattn.run.backward import run_backward
from tests.support.compare import rel_l2


@pytest.fixture(autouse=True)
def _small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)
    monkeypatch.setattr(prepare, "LEAST_BACKWARD_PRODUCTS", 1)


def tensors(
    dims: tuple[int, int] = (64, 64),
    lengths: tuple[int, int] = (200, 333),
    heads: tuple[int, int] = (2, 2),
    batch: int = 1,
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = (
        (lengths[0], heads[0], dims[0]),
        (lengths[1], heads[1], dims[0]),
        (lengths[1], heads[1], dims[1]),
    )
    return [torch.randn(batch, *size, generator=generator).to("cuda") for size in sizes]


def gradients(
    attend: Any, qkv: list[torch.Tensor], dtype: torch.dtype, **given: Any
) -> tuple[torch.Tensor, ...]:
    own = [x.detach().to(dtype).requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = attend(*own, **given)
    generator = torch.Generator().manual_seed(6)
    d_out = torch.randn(out.shape, generator=generator).to(out)
    return torch.autograd.grad(out, own, d_out)


def check(qkv: list[torch.Tensor], limit: float = 1.5e-6, **given: Any) -> None:
    """Compare with fp64, and see that parts were taken."""
    with torch.enable_grad():
        own = [x.detach().requires_grad_() for x in qkv]
        assert jitattn.explain(*own, **given).backward["numerics"] == "f16x3"
    found = gradients(jitattn.attention, qkv, torch.float32, **given)
    given.pop("deterministic", None)
    true = gradients(jitattn.reference.reference, qkv, torch.float64, **given)
    for name, got, wanted in zip(("dq", "dk", "dv"), found, true, strict=True):
        assert rel_l2(got, wanted) <= limit, (name, rel_l2(got, wanted))


MASKS = {
    "full": jitattn.Full(),
    "causal": jitattn.Causal(),
    "window": jitattn.Window(50, 0, keep_first=3),
    "stride": jitattn.LocalStride(64, 1, 3),
}


@pytest.mark.parametrize("name", list(MASKS))
def test_gradients_by_fp16_parts_of_masks(name: str) -> None:
    check(tensors(heads=(3, 1) if name in ("causal", "stride") else (2, 2)), mask=MASKS[name])


@pytest.mark.parametrize("dims", [(16, 16), (48, 80), (96, 32), (128, 64), (128, 128)], ids=str)
def test_gradients_by_fp16_parts_of_head_dims(dims: tuple[int, int]) -> None:
    check(tensors(dims, (150, 100), batch=2), mask=jitattn.Causal())


@pytest.mark.parametrize("name", ["softcap", "alibi", "dropout", "cosine", "layout"])
def test_gradients_by_fp16_parts_of_changed_scores(name: str) -> None:
    qkv = tensors((64, 64), (130, 190))
    if name == "layout":
        qkv = [x.transpose(1, 2).contiguous() for x in qkv]
    norm = jitattn.L2Norm()
    given: dict[str, dict[str, Any]] = {
        "softcap": {"softcap": 3.0},
        "alibi": {"alibi_slopes": torch.tensor([0.3, 0.02], device="cuda")},
        "dropout": {"dropout_p": 0.25, "dropout_state": torch.tensor([3, 4], device="cuda")},
        "cosine": {"qk_norm": norm, "scale": 8.0},
        "layout": {"layout": "bhsd", "scale": 0.3},
    }
    # Errors of scores grow with the scores.
    check(qkv, 4e-6 if name in ("cosine", "layout") else 1.5e-6, **given[name])


@pytest.mark.parametrize("garbage", [1e38, float("nan")])
@pytest.mark.parametrize("causal", [False, True])
def test_gradients_by_fp16_parts_of_padded_keys(causal: bool, garbage: float) -> None:
    """What hidden keys hold is nothing to the others; they have gradients of 0."""
    q, k, v = tensors((64, 64), (150, 200), (4, 2), batch=2)
    keep = torch.arange(200, device="cuda") < torch.tensor([[137], [70]], device="cuda")
    keep[0, 20:29] = False
    hidden = (~keep)[..., None, None]
    mask: Any = jitattn.KeyPadding(keep)
    if causal:
        mask = jitattn.Causal() & mask
    _, call = bind(q, k, v, {"mask": mask})
    out, lse = jitattn.attention(q, k, v, mask=mask, return_lse=True)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    bad = k.masked_fill(hidden, garbage), v.masked_fill(hidden, -garbage)
    found = run_backward(q, *bad, out, lse, d_out, None, call)[:3]
    true = gradients(jitattn.reference.reference, [q, k, v], torch.float64, mask=mask)
    for name, got, wanted in zip(("dq", "dk", "dv"), found, true, strict=True):
        assert rel_l2(got, wanted) <= 1.5e-6, name
    assert not found[1].masked_select(hidden).any()
    assert not found[2].masked_select(hidden).any()


@pytest.mark.parametrize("name", ["causal", "stride"])
def test_deterministic_gradients_by_fp16_parts_of_masks(name: str) -> None:
    qkv = tensors((64, 64), (300, 300), (4, 2))
    given = {"mask": MASKS[name], "deterministic": True}
    check(qkv, **given)
    first = gradients(jitattn.attention, qkv, torch.float32, **given)
    again = gradients(jitattn.attention, qkv, torch.float32, **given)
    assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_batch_does_not_change_gradients_by_fp16_parts_of_a_sequence() -> None:
    qkv = tensors((64, 64), (130, 200), batch=2)
    d_out = torch.ones_like(qkv[0])
    made = []
    for rows in (slice(0, 2), slice(0, 1), slice(1, 2)):
        own = [x[rows].clone().requires_grad_() for x in qkv]
        with torch.enable_grad():
            out = jitattn.attention(*own, num_splits=1, deterministic=True)
        made.append(torch.autograd.grad(out, own, d_out[rows]))
    for both, first, second in zip(*made, strict=True):
        assert torch.equal(both, torch.cat((first, second)))


@pytest.mark.parametrize("factor", [1e-30, 1e15])
def test_gradients_by_fp16_parts_of_numbers_of_any_size(factor: float) -> None:
    q, k, v = tensors((64, 64), (130, 200))
    true = gradients(jitattn.reference.reference, [q, k, v], torch.float64)
    dq, dk, dv = gradients(jitattn.attention, [q * factor, k / factor, v * 100], torch.float32)
    assert rel_l2(dq.double() * factor / 100, true[0]) <= 2e-6
    assert rel_l2(dk.double() / factor / 100, true[1]) <= 2e-6
    assert rel_l2(dv, true[2]) <= 2e-6


def test_gradients_by_fp16_parts_of_a_block_of_zeros() -> None:
    q, k, v = tensors((64, 64), (200, 200))
    q[:, :70], k[:, 64:128], v[:, :64] = 0.0, 0.0, 0.0
    check([q, k, v], mask=jitattn.Causal())
    nothing = gradients(jitattn.attention, [q, k, torch.zeros_like(v)], torch.float32)
    assert not nothing[0].any()
    assert not nothing[1].any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_by_fp16_parts_of_what_is_no_number(bad: float) -> None:
    """Rows that do not see it are as they were; those that do are no numbers."""
    q, k, v = tensors((64, 64), (200, 200))
    mask = jitattn.Causal()
    clean = gradients(jitattn.attention, [q, k, v], torch.float32, mask=mask)
    worse = v.clone()
    worse[:, 150] = bad
    dq, _, _ = gradients(jitattn.attention, [q, k, worse], torch.float32, mask=mask)
    assert rel_l2(dq[:, :128], clean[0][:, :128]) <= 1.5e-6
    assert not torch.isfinite(dq[:, 150:]).any()


def test_gradients_by_fp16_parts_of_rows_of_huge_scores() -> None:
    """Scores and LSE of 1e8 are rounded by more than 2: what is no weight must not spoil dv."""
    q, k, v = tensors((64, 64), (128, 128))
    q[:, 100:] *= 1e7
    own = [x.requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = jitattn.attention(*own)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    d_out[:, 100:] = 0.0
    dv = torch.autograd.grad(out, own[2], d_out)[0]
    first = [x.detach()[:, :100] if x is q else x.detach() for x in own]
    leaves = [x.double().requires_grad_() for x in first]
    with torch.enable_grad():
        true = jitattn.reference.reference(*leaves)
    wanted = torch.autograd.grad(true, leaves[2], d_out[:, :100].double())[0]
    assert rel_l2(dv, wanted) <= 1e-4


@pytest.mark.parametrize("name", ["dense", "bias"])
@pytest.mark.parametrize("which", [1, 2])
def test_gradients_where_hidden_keys_hold_huge_numbers(name: str, which: int) -> None:
    """No scale is shared with what a matrix may hide."""
    qkv = tensors((64, 64), (128, 128))
    keep = torch.ones(1, 1, 128, 128, dtype=torch.bool, device="cuda")
    keep[..., 100:] = False
    given: dict[str, dict[str, Any]] = {
        "dense": {"mask": jitattn.Dense(keep)},
        "bias": {"bias": torch.zeros(keep.shape, device="cuda").masked_fill(~keep, -torch.inf)},
    }
    true = gradients(jitattn.reference.reference, qkv, torch.float64, **given[name])
    qkv[which] = qkv[which].clone()
    qkv[which][:, 100:] = 1e13
    found = gradients(jitattn.attention, qkv, torch.float32, **given[name])
    for got, wanted in zip(found, true, strict=True):
        assert rel_l2(got, wanted) <= 2e-6
