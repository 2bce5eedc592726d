"""Tests gradients by the wgmma kernels of sm_90."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

import jitattn
from jitattn import Causal, Full, KeyPadding, LocalStride, Padded, Ragged, Window
from jitattn.kernels.bwd_sm90 import BwdSm90Spec
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.wgmma import BF16, FP16, drawn

pytestmark = pytest.mark.usefixtures("wgmma_family")

LIMIT = {FP16: 1e-3, BF16: 6e-3}
WINDOW = Window(100, 0, keep_first=70)
MASKS = (Full(), Causal(), Causal("top_left"), WINDOW, Window(20, 30), LocalStride(64, 2, 3))


def gradients(
    qkv: tuple[torch.Tensor, ...], d_out: torch.Tensor, *, d_lse: Any = None, **given: Any
) -> tuple[torch.Tensor, ...]:
    own = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out, lse = jitattn.attention(*own, return_lse=True, **given)
    ends = [out] if d_lse is None else [out, lse]
    return torch.autograd.grad(ends, own, [d_out] if d_lse is None else [d_out, d_lse])


def check(q: Any, k: Any, v: Any, *, family: str = "bwd_sm90", **given: Any) -> Any:
    """The gradients are those of a kernel family, and the reference's."""
    d_out = drawn(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    own = [x.detach().requires_grad_() for x in (q, k, v)]
    d_lse = given.pop("d_lse", None)
    with torch.enable_grad():
        assert jitattn.explain(*own, **given).backward["family"] == family
    found = gradients((q, k, v), d_out, d_lse=d_lse, **given)
    given = {name: given[name] for name in given.keys() - {"deterministic", "num_splits"}}
    true = [x.detach().nan_to_num(0.0).double().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out, lse = jitattn.reference.reference(*true, return_lse=True, **given)
        loss = (out * d_out.double()).sum()
        if d_lse is not None:
            loss = loss + (lse.masked_fill(lse.isneginf(), 0.0) * d_lse).sum()
    for got, wanted in zip(found, torch.autograd.grad(loss, true), strict=True):
        assert rel_l2(got, wanted) < LIMIT[q.dtype]
    return found


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", MASKS, ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
def test_masks(dtype: torch.dtype, mask: Any, dim: int) -> None:
    """More tiles than stages, groups of heads, and lengths that fill no tile."""
    q = drawn(2, 530, 4, dim, dtype=dtype)
    k, v = (drawn(2, 470, 2, dim, dtype=dtype) for _ in range(2))
    check(q, k, v, mask=mask)


@pytest.mark.parametrize("dim", [8, 16, 40, 64, 72, 96, 112, 128])
@pytest.mark.parametrize("dim_v", [8, 48, 64, 128])
def test_head_dims(dim: int, dim_v: int) -> None:
    q, k, v = drawn(1, 200, 2, dim), drawn(1, 150, 2, dim), drawn(1, 150, 2, dim_v)
    check(q, k, v, mask=Causal())


@pytest.mark.parametrize(("len_q", "len_kv"), [(1, 1), (1, 300), (300, 1), (64, 128), (129, 65)])
@pytest.mark.parametrize("dim", [64, 128])
def test_lengths(dim: int, len_q: int, len_kv: int) -> None:
    q, k, v = drawn(2, len_q, 2, dim), drawn(2, len_kv, 1, dim), drawn(2, len_kv, 1, dim)
    for mask in (Full(), Causal(), WINDOW):
        check(q, k, v, mask=mask)


@pytest.mark.parametrize("dim", [64, 128])
def test_rows_that_see_no_key(dim: int) -> None:
    """They have gradients of 0, and so do keys that no row sees."""
    q, k, v = drawn(1, 400, 2, dim), drawn(1, 100, 2, dim), drawn(1, 100, 2, dim)
    dq, _, _ = check(q, k, v, mask=Causal())
    assert not dq[:, :300].any()
    _, dk, dv = check(k, q, q, mask=Causal("top_left"))
    assert not dk[:, 100:].any()
    assert not dv[:, 100:].any()


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", [Full(), Causal(), WINDOW], ids=str)
@pytest.mark.parametrize("deterministic", [False, True])
def test_sequences(mask: Any, dim: int, deterministic: bool) -> None:
    """One without queries, one without keys; what follows a sequence is not a number."""
    q_ends = torch.tensor([0, 130, 130, 200, 421], device="cuda", dtype=torch.int32)
    kv_ends = torch.tensor([0, 77, 277, 277, 500], device="cuda", dtype=torch.int32)
    q, k, v = drawn(441, 4, dim), drawn(520, 2, dim), drawn(520, 2, dim)
    for x in (q[421:], k[500:], v[500:]):
        x.fill_(math.nan)
    given = {
        "q_seqs": Ragged.from_cu_seqlens(q_ends, 230),
        "kv_seqs": Ragged.from_cu_seqlens(kv_ends, 230),
    }
    dq, dk, dv = check(q, k, v, mask=mask, deterministic=deterministic, **given)
    assert not dq[421:].any()
    assert not dk[500:].any()
    assert not dv[500:].any()


@pytest.mark.parametrize("dim", [64, 128])
def test_padded(dim: int) -> None:
    q, k, v = drawn(3, 200, 2, dim), drawn(3, 300, 2, dim), drawn(3, 300, 2, dim)
    of_q, of_kv = (torch.tensor(x, device="cuda") for x in ([200, 0, 131], [300, 64, 7]))
    for row, (rows, keys) in enumerate(zip(of_q.tolist(), of_kv.tolist(), strict=True)):
        q[row, rows:] = k[row, keys:] = v[row, keys:] = math.nan
    for mask in (Full(), Causal()):
        check(q, k, v, mask=mask, q_seqs=Padded(of_q), kv_seqs=Padded(of_kv))
        check(q.nan_to_num(0.0), k, v, mask=mask, kv_seqs=Padded(of_kv))


@pytest.mark.parametrize("dim", [64, 128])
def test_hidden_keys_and_sinks(dim: int) -> None:
    q, k, v = drawn(2, 300, 4, dim), drawn(2, 300, 2, dim), drawn(2, 300, 2, dim)
    keep = torch.rand(2, 300, device="cuda") > 0.5
    keep[1, :200] = False
    sinks = torch.tensor([3.0, -2.0, 0.0, -math.inf], device="cuda")
    for mask in (KeyPadding(keep), Causal() & KeyPadding(keep), WINDOW & KeyPadding(keep)):
        check(q, k, v, mask=mask)
    check(q, k, v, mask=WINDOW, sinks=sinks)


def test_gradient_of_the_lse() -> None:
    q, k, v = (drawn(2, 200, 2, 64) for _ in range(3))
    check(q, k, v, mask=Causal(), d_lse=torch.randn(2, 2, 200, device="cuda"))


@pytest.mark.parametrize("has_d_lse", [False, True])
def test_gradients_of_sinks(has_d_lse: bool) -> None:
    """With a gradient of the LSE, which leaves them out, another family is taken."""
    inputs = [*(drawn(2, 200, 2, 64) for _ in range(3)), torch.randn(2, device="cuda")]
    d_out, d_lse = drawn(2, 200, 2, 64), torch.randn(2, 2, 200, device="cuda") * has_d_lse
    own = [x.clone().requires_grad_() for x in inputs]
    true = [x.double().requires_grad_() for x in inputs]
    with torch.enable_grad():
        out, lse = jitattn.attention(*own[:3], sinks=own[3], return_lse=True)
        exact, true_lse = jitattn.reference.reference(*true[:3], sinks=true[3], return_lse=True)
    ends = ([out, lse], [d_out, d_lse]) if has_d_lse else ([out], [d_out])
    got = torch.autograd.grad(ends[0], own, ends[1])
    wanted = torch.autograd.grad([exact, true_lse], true, [d_out.double(), d_lse.double()])
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < LIMIT[BF16]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_layouts_and_strides(layout: str) -> None:
    """Heads next to each other or apart, and a gradient of out that is a view."""
    room = drawn(2, 200, 3, 4, 128)
    q, k, v = room.unbind(2)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    check(q, k, v, mask=Causal(), layout=layout)
    own = [x.detach().requires_grad_() for x in (q, k, v)]
    with torch.enable_grad():
        out = jitattn.attention(*own, layout=layout)
    wide = drawn(*out.shape[:-1], 256)[..., 128:]
    for d_out in (wide, torch.ones((), device="cuda", dtype=BF16).expand(out.shape)):
        got = torch.autograd.grad(out, own, d_out, retain_graph=True)
        plain = torch.autograd.grad(out, own, d_out.clone(), retain_graph=True)
        assert all(map(torch.equal, got[1:], plain[1:]))
        assert rel_l2(got[0], plain[0]) < 1e-3


def test_few_keys_and_many_queries() -> None:
    """Queries of a key block are split over CTAs, whose parts a kernel adds up."""
    q, k, v = drawn(1, 3000, 2, 64), drawn(1, 100, 1, 64), drawn(1, 100, 1, 64)
    for given in ({}, {"num_splits": 1}):
        check(q, k, v, mask=Full(), **given)


@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_scales(scale: float) -> None:
    q, k, v = (drawn(1, 300, 2, 64) / 4 for _ in range(3))
    check(q, k, v, scale=scale)


def test_large_scores() -> None:
    """LSE and delta of any size come through the products unharmed."""
    for dtype, size in itertools.product((FP16, BF16), (0.1, 10.0)):
        q, k, v = (drawn(1, 300, 2, 64, dtype=dtype) for _ in range(3))
        check(q * size, k, v * size, mask=Causal())


@pytest.mark.real_gpu
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("mask", [Full(), Causal(), WINDOW], ids=str)
def test_deterministic_means_the_same_bits(mask: Any, dim: int) -> None:
    q, k, v = drawn(2, 1500, 8, dim), drawn(2, 1500, 2, dim), drawn(2, 1500, 2, dim)
    d_out = torch.randn_like(q)
    first = check(q, k, v, mask=mask, deterministic=True)
    first = gradients((q, k, v), d_out, mask=mask, deterministic=True)
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(200):
        again = gradients((q, k, v), d_out, mask=mask, deterministic=True)
        differ += sum((one != other).sum() for one, other in zip(first, again, strict=True))
    plain = gradients((q, k, v), d_out, mask=mask)
    differ += sum((one != other).sum() for one, other in zip(first[1:], plain[1:], strict=True))
    assert differ.item() == 0


@pytest.mark.real_gpu
def test_a_captured_step_takes_new_contents() -> None:
    q, k, v = (drawn(1, 400, 4, 128).requires_grad_() for _ in range(3))
    d_out = drawn(1, 400, 4, 128)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = jitattn.attention(q, k, v, mask=Causal(), deterministic=True)
        return torch.autograd.grad(out, (q, k, v), d_out)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=side):
            captured = step()
        for _ in range(3):
            d_out.normal_()
            graph.replay()
            assert all(map(torch.equal, captured, step()))
    torch.cuda.synchronize()


def test_other_calls_say_why() -> None:
    q, k, v = (drawn(1, 200, 2, 64).requires_grad_() for _ in range(3))
    with torch.enable_grad():
        for given, reason in (
            ({"softcap": 3.0}, "changes scores"),
            ({"mask": LocalStride(16, 2, 3)}, "gathered"),
            ({"scale": 1e-33}, "scale"),
        ):
            record = jitattn.explain(q, k, v, **given)
            assert record.backward["family"] == "bwd"
            assert any(reason in why for why in record.why)
        record = jitattn.explain(q, k, v)
        assert record.backward["family"] == BwdSm90Spec.family
        assert "gradients by wgmma" in record.why
