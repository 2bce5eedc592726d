"""Tests jitattn under SDPA on the CPU: there, aten's CUDA operators get our implementations."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from jitattn.errors import UnsupportedError
from jitattn.integrations import sdpa
from tests.support.compare import rel_l2

aten = torch.ops.aten
needs_registry = pytest.mark.skipif(
    not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="needs torch 2.11"
)
pytestmark = needs_registry


@pytest.fixture
def _on_cpu() -> Iterator[None]:
    overrides = sdpa._Overrides("CPU")
    try:
        yield
    finally:
        overrides.remove()


def inputs(len_q: int = 9, len_kv: int = 9, *, in_heads: bool = False) -> list[Tensor]:
    """q, k, v as [B, H, L, D], of memory as models have it, or by head."""
    generator = torch.Generator().manual_seed(4)
    found = []
    for length in (len_q, len_kv, len_kv):
        shape = (2, 3, length, 16) if in_heads else (2, length, 3, 16)
        x = torch.randn(shape, generator=generator)
        found.append(x if in_heads else x.transpose(1, 2))
    return found


def truth(qkv: list[Tensor], **given: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Out, and the gradients of the sum of its squares; of an added mask too."""
    leaves = [x.detach().requires_grad_() for x in qkv]
    mask = given.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        given["attn_mask"] = mask.detach().requires_grad_()
        leaves.append(given["attn_mask"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = torch.nn.functional.scaled_dot_product_attention(*leaves[:3], **given)
    return out.detach(), torch.autograd.grad(out.square().sum(), leaves)


def check_like_meta(found: Any, op: Any, *args: Any, **kwargs: Any) -> None:
    """Shapes, dtypes and strides are those that torch's fake kernels say, which graphs rely on."""
    to_meta = [x.to("meta") if isinstance(x, Tensor) else x for x in args]
    for one, other in zip(found, op(*to_meta, **kwargs), strict=True):
        if isinstance(one, Tensor) and isinstance(other, Tensor):
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
            assert one.stride() == other.stride()


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("in_heads", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
def test_flash(is_causal: bool, in_heads: bool) -> None:
    qkv = inputs(in_heads=in_heads)
    expected, gradients = truth(qkv, is_causal=is_causal)
    op = aten._scaled_dot_product_flash_attention
    found = op(*qkv, 0.0, is_causal, scale=0.25)
    assert rel_l2(found[0], expected) < 1e-6
    check_like_meta(found, op, *qkv, 0.0, is_causal, scale=0.25)
    back = aten._scaled_dot_product_flash_attention_backward
    given = (2 * found[0], *qkv, *found[:6], 0.0, is_causal, *found[6:8])
    results = back(*given, scale=0.25)
    check_like_meta(results, back, *given, scale=0.25)
    for one, other in zip(results, gradients, strict=True):
        assert rel_l2(one, other) < 1e-5


BIASES = {
    "none": None,
    "full": (2, 3, 9, 13),
    "by head": (1, 3, 9, 13),
    "of keys": (2, 1, 1, 13),
    "of rows": (2, 1, 9, 1),
}


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("shape", BIASES.values(), ids=BIASES)
def test_memory_efficient(shape: tuple[int, ...] | None, is_causal: bool) -> None:
    """With a bias as torch hands it on, expanded, and its gradient."""
    qkv = inputs(9, 13)
    bias = None if shape is None else torch.randn(shape, generator=torch.Generator()).contiguous()
    whole = None if bias is None else bias.expand(2, 3, 9, 13)
    mask = whole
    if is_causal:  # torch refuses both together
        seen = torch.ones(9, 13, dtype=torch.bool).tril()
        mask = torch.where(seen, 0.0 if whole is None else whole, float("-inf"))
        mask = mask.expand(2, 3, 9, 13)
    expected, gradients = truth(qkv, attn_mask=mask)
    op = aten._scaled_dot_product_efficient_attention
    found = op(*qkv, whole, True, 0.0, is_causal)
    assert rel_l2(found[0], expected) < 1e-6
    check_like_meta(found, op, *qkv, whole, True, 0.0, is_causal)
    back = aten._scaled_dot_product_efficient_attention_backward
    wants = [True, True, True, whole is not None]
    given = (2 * found[0], *qkv, whole, *found[:2], *found[2:4], 0.0, wants, is_causal)
    results = back(*given)
    for one, other in zip(results[:3], gradients, strict=False):
        assert rel_l2(one, other) < 1e-5
    if whole is not None:
        assert rel_l2(results[3], gradients[3]) < 1e-5
        check_like_meta(results, back, *given)
    assert sdpa.counts()["jitattn"] > 0


@pytest.mark.usefixtures("_on_cpu")
def test_inner_memory_efficient() -> None:
    """[B, L, H, D], causal by either corner."""
    q, k, v = (x.transpose(1, 2) for x in inputs(9, 13))
    for kind, offset in ((0, None), (1, 0), (2, 4)):
        seen = torch.ones(9, 13, dtype=torch.bool)
        seen = seen if offset is None else seen.tril(offset)
        turned = [x.transpose(1, 2) for x in (q, k, v)]
        expected, gradients = truth(turned, attn_mask=seen)
        given = (q, k, v, None, None, None, None, None, 0.0, kind)
        found = aten._efficient_attention_forward(*given, True)
        assert rel_l2(found[0].transpose(1, 2), expected) < 1e-6
        check_like_meta(
            found[:4], lambda *a: aten._efficient_attention_forward(*a)[:4], *given, True
        )
        results = aten._efficient_attention_backward(
            2 * found[0], q, k, v, None, found[0], None, None, 9, 13, found[1], 0.0, *found[2:4],
            kind, False,
        )  # fmt: skip
        for one, other in zip(results[:3], gradients, strict=True):
            assert rel_l2(one.transpose(1, 2), other) < 1e-5


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("window", [(None, None), (-1, -1), (3, 0), (2, 1)], ids=str)
def test_varlen(window: tuple[int | None, int | None]) -> None:
    lengths, is_causal = (5, 0, 7), window[1] == 0
    stops = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    generator = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(12, 3, 16, generator=generator) for _ in range(3))
    given = (q, k, v, stops, stops, 7, 7, 0.0, is_causal, False)
    sizes = {"window_size_left": window[0], "window_size_right": window[1]}
    found = aten._flash_attention_forward(*given, **sizes)
    check_like_meta(found, aten._flash_attention_forward, *given, **sizes)
    results = aten._flash_attention_backward(
        2 * found[0],
        q,
        k,
        v,
        found[0],
        found[1],
        stops,
        stops,
        7,
        7,
        0.0,
        is_causal,
        *found[2:4],
        **sizes,
    )
    left = 12 if window[0] is None or window[0] < 0 else window[0]
    right = 12 if window[1] is None or window[1] < 0 else window[1]
    distance = torch.arange(7) - torch.arange(7)[:, None]
    seen = (distance >= -left) & (distance <= right)
    for start, stop in itertools.pairwise(stops.tolist()):
        size = stop - start
        if size == 0:
            continue
        turned = [x[None, start:stop].transpose(1, 2) for x in (q, k, v)]
        expected, gradients = truth(turned, attn_mask=seen[:size, :size])
        assert rel_l2(found[0][None, start:stop].transpose(1, 2), expected) < 1e-6
        for one, other in zip(results, gradients, strict=True):
            assert rel_l2(one[None, start:stop].transpose(1, 2), other) < 1e-5


@pytest.mark.usefixtures("_on_cpu")
@pytest.mark.parametrize("name", ["flash", "efficient"])
def test_dropout_follows_the_seed(name: str) -> None:
    """Its mean is right, and backward draws what forward drew."""
    q, k, _ = inputs(64, 64)
    v = torch.eye(64)[:, :16].expand(2, 3, 64, 16).contiguous()

    def run() -> tuple[Any, ...]:
        torch.manual_seed(3)
        if name == "flash":
            return aten._scaled_dot_product_flash_attention(q, k, v, 0.5)
        return aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.5)

    first, second = run(), run()
    assert torch.equal(first[0], second[0])
    plain, _ = truth([q, k, v])
    assert (first[0] == 0).float().mean() == pytest.approx(0.5, abs=0.05)
    assert first[0].mean() == pytest.approx(float(plain.mean()), rel=0.1)
    ones = torch.ones_like(first[0])
    if name == "flash":
        given = (ones, q, k, v, *first[:6], 0.5, False, *first[6:8])
        dv = aten._scaled_dot_product_flash_attention_backward(*given)[2]
    else:
        given = (ones, q, k, v, None, *first[:4], 0.5, [True] * 3 + [False])
        dv = aten._scaled_dot_product_efficient_attention_backward(*given)[2]
    weights = first[0].sum(2)  # of the first 16 keys, kept and scaled
    assert torch.allclose(dv[:, :, :16].mean(-1), weights, atol=1e-4)


@pytest.mark.usefixtures("_on_cpu")
def test_calls_that_ours_refuses_without_a_kernel_of_torchs() -> None:
    q, k, v = inputs()
    with pytest.raises(UnsupportedError, match="return_debug_mask"):
        aten._scaled_dot_product_flash_attention(q, k, v, 0.0, False, True)
    with pytest.raises(UnsupportedError, match="float64"):
        aten._scaled_dot_product_flash_attention(q.double(), k.double(), v.double())


def test_calls_are_handed_on_and_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the kernel that was there; its inner calls are not ours either. It says so once."""
    name = "_scaled_dot_product_flash_attention"
    fallback = torch.library.Library("aten", "IMPL")

    def theirs(q: Tensor, *more: Any, **named: Any) -> tuple[Any, ...]:
        inner = aten._flash_attention_forward(q, q, q, None, None, 9, 9, 0.0, False, False)
        return (q + 1, inner[1], None, None, 9, 9, *inner[2:])

    def inner(q: Tensor, *more: Any, **named: Any) -> tuple[Any, ...]:
        empty = torch.empty(0)
        return q, empty, empty.view(torch.uint8), empty.view(torch.uint8), empty

    fallback.impl(name, theirs, "CPU")
    fallback.impl("_flash_attention_forward", inner, "CPU")
    monkeypatch.setattr(sdpa, "_warned", set())
    overrides = sdpa._Overrides("CPU")
    try:
        sdpa.counts(reset=True)
        q, k, v = (x.double() for x in inputs())
        with pytest.warns(UserWarning, match=f"{name}: handed on to torch's kernel: torch.float64"):
            found = aten._scaled_dot_product_flash_attention(q, k, v)
        assert torch.equal(found[0], q + 1)
        aten._scaled_dot_product_flash_attention(q, k, v)  # without a warning
        aten._scaled_dot_product_flash_attention(q.float(), k.float(), v.float())
        assert sdpa.counts(reset=True) == {
            "jitattn": 1, "torch": 2, "jitattn_backward": 0, "torch_backward": 0
        }  # fmt: skip
        assert sdpa.counts()["torch"] == 0
    finally:
        overrides.remove()
    found = aten._scaled_dot_product_flash_attention(q.float(), k.float(), v.float())
    assert torch.equal(found[0], q.float() + 1)  # theirs is back
    fallback._destroy()


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, it changes something")
def test_without_cuda_nothing_changes() -> None:
    """Ours is registered; activate and restore may be called in any order and number."""
    from torch.nn import attention

    qkv = inputs()
    expected = torch.nn.functional.scaled_dot_product_attention(*qkv)
    sdpa.restore()
    sdpa.activate()
    sdpa.activate()
    with sdpa.activated(), sdpa.activated():
        assert torch.equal(torch.nn.functional.scaled_dot_product_attention(*qkv), expected)
    sdpa.restore()
    sdpa.restore()
    assert "JITATTN" in attention.list_flash_attention_impls()
    assert attention.current_flash_attention_impl() is None
    assert not sdpa._is_active()


def test_the_outermost_context_ends_it() -> None:
    def fail() -> None:
        with sdpa.activated():
            with sdpa.activated():
                pass
            assert sdpa._is_active()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert not sdpa._is_active()


def test_older_torch_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.attention, "register_flash_attention_impl")
    for start in (sdpa.activate, sdpa.activated().__enter__):
        with pytest.raises(UnsupportedError, match=r"torch 2\.11"):
            start()
    assert not sdpa._is_active()
