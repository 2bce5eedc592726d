"""Tests the FlashAttention 3 door: names, function classes, operators, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat import alias, flash_attn_3, flash_attn_interface
from jitattn.compat.flash_attn_3 import flash_attn_interface as within
from jitattn.compat.flash_attn_interface import (
    FlashAttnFunc,
    FlashAttnQKVPackedFunc,
    FlashAttnVarlenFunc,
    _flash_attn_backward,
    _flash_attn_forward,
    flash_attn_combine,
    flash_attn_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    get_scheduler_metadata,
    maybe_contiguous,
    round_multiple,
    round_up_headdim,
)
from tests.support.inputs import drawn

Q, K, V = drawn(2, 9, 4, 16), drawn(2, 20, 2, 16, seed=1), drawn(2, 20, 2, 24, seed=2)
CU_Q, CU_K = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 20))
FLAT = tuple(x.flatten(0, 1) for x in (Q, K, V))


def test_facts_of_the_original() -> None:
    assert flash_attn_interface.__version__ == flash_attn_3.__version__ == "3.0.0"
    for name in within.__all__:
        assert getattr(within, name) is getattr(flash_attn_interface, name)
    assert [round_up_headdim(x) for x in (1, 64, 65, 100, 192, 256)] == [64, 64, 96, 128, 192, 256]
    assert round_multiple(129, 128) == 256
    assert maybe_contiguous(Q) is Q


def test_with_it_comes_the_package() -> None:
    with alias("flash_attn_interface", distribution=True):
        import importlib.metadata

        import flash_attn_3 as package
        from flash_attn_3.flash_attn_interface import flash_attn_func as theirs
        from flash_attn_interface import flash_attn_func as ours

        assert package is flash_attn_3
        assert theirs is ours is flash_attn_func
        found = importlib.metadata.packages_distributions()
        assert found["flash_attn_interface"] == found["flash_attn_3"] == ["flash-attn-3"]
        assert importlib.metadata.version("flash_attn_3") == "3.0.0"


def test_classes_have_apply() -> None:
    tail: tuple[Any, ...] = (0.3, True, None, None, None, None, (5, 0), 0, 0.0, 1, None, True, 0)
    wanted, lse = flash_attn_func(Q, K, V, *tail, True)
    out, own = FlashAttnFunc.apply(Q, K, V, *tail, True)
    assert torch.equal(out, wanted)
    assert torch.equal(own, lse)
    out = FlashAttnVarlenFunc.apply(*FLAT, CU_Q, CU_K, None, None, 9, 20, *tail, False)
    torch.testing.assert_close(out, wanted.flatten(0, 1))
    packed = torch.stack([Q, Q, Q], 2)
    out = FlashAttnQKVPackedFunc.apply(packed, None, True)
    assert torch.equal(out, flash_attn_func(Q, Q, Q, causal=True))


def test_what_only_steers_speed_has_no_effect() -> None:
    wanted = flash_attn_func(Q, K, V)
    for given in ({"num_splits": 4}, {"pack_gqa": True}, {"sm_margin": 8}):
        assert torch.equal(flash_attn_func(Q, K, V, **given), wanted)
    used = torch.tensor([5, 20], dtype=torch.int32)
    metadata = get_scheduler_metadata(2, 9, 20, 4, 2, 16, used, headdim_v=24)
    assert metadata.dtype is torch.int32
    out = flash_attn_with_kvcache(Q, K, V, cache_seqlens=used)
    given = {"scheduler_metadata": metadata, "num_splits": 3}
    assert torch.equal(flash_attn_with_kvcache(Q, K, V, cache_seqlens=used, **given), out)


def test_results_of_splits_are_combined() -> None:
    parts = [flash_attn_func(Q, K[:, s], V[:, s], return_attn_probs=True) for s in
             (slice(0, 7), slice(7, 20))]  # fmt: skip
    outs = torch.stack([out for out, _ in parts])
    lses = torch.stack([lse.transpose(1, 2) for _, lse in parts])
    wanted, wanted_lse = flash_attn_func(Q, K, V, return_attn_probs=True)
    out, lse = flash_attn_combine(outs, lses)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.transpose(1, 2))
    room = torch.empty_like(wanted)
    assert flash_attn_combine(outs, lses, room)[0] is room
    torch.testing.assert_close(room, wanted)
    flat, flat_lse = flash_attn_combine(outs[:, 0], lses[:, 0], out_dtype=torch.float16)
    torch.testing.assert_close(flat, wanted[0].half())
    torch.testing.assert_close(flat_lse, wanted_lse[0].T)
    with pytest.raises(RuntimeError, match="lse_partial"):
        flash_attn_combine(outs, lses[:, :1])


def test_operators_forward_and_backward() -> None:
    leaves = [x.clone().requires_grad_() for x in (Q, K, V)]
    wanted, wanted_lse = flash_attn_func(*leaves, causal=True, return_attn_probs=True)
    out, lse, *rest = _flash_attn_forward(Q, K, V, causal=True)
    assert torch.equal(out, wanted)
    assert torch.equal(lse, wanted_lse)
    assert [x.numel() for x in rest] == [0, 0]
    grad = drawn(*out.shape, seed=5)
    gradients = torch.autograd.grad(wanted, leaves, grad)
    rooms = [torch.empty_like(x) for x in (Q, K, V)]
    sums = _flash_attn_backward(
        grad, Q, K, V, out, lse, dq=rooms[0], dk=rooms[1], dv=rooms[2], is_causal=True
    )
    assert sums.shape == (2, 4, 9)
    for room, gradient in zip(rooms, gradients, strict=True):
        torch.testing.assert_close(room, gradient, atol=1e-5, rtol=1e-5)
    named = {"cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K, "max_seqlen_q": 9, "max_seqlen_k": 20}
    flat, flat_lse, *_ = _flash_attn_forward(*FLAT, causal=True, **named)
    torch.testing.assert_close(flat, out.flatten(0, 1))
    rooms = [torch.empty_like(x) for x in FLAT]
    sums = _flash_attn_backward(
        grad.flatten(0, 1), *FLAT, flat, flat_lse, **named, dq=rooms[0], dk=rooms[1],
        dv=rooms[2], is_causal=True,
    )  # fmt: skip
    assert sums.shape == (4, 18)
    for room, gradient in zip(rooms, gradients, strict=True):
        torch.testing.assert_close(room, gradient.flatten(0, 1), atol=1e-5, rtol=1e-5)
    used = torch.tensor([5, 20], dtype=torch.int32)
    cached, *_ = _flash_attn_forward(Q, K, V, seqused_k=used)
    assert torch.equal(cached, flash_attn_with_kvcache(Q, K, V, cache_seqlens=used))
    room = torch.empty_like(out)
    assert _flash_attn_forward(Q, K, V, out_=room, causal=True)[0] is room
    assert torch.equal(room, out)


def test_a_cache_without_lengths_is_full_and_has_no_gradient() -> None:
    q = Q.clone().requires_grad_()
    out = flash_attn_with_kvcache(q, K, V)
    assert not out.requires_grad
    torch.testing.assert_close(out, flash_attn_func(Q, K, V))
    out = flash_attn_with_kvcache(q, K, V, cache_seqlens=7, causal=True)
    torch.testing.assert_close(out, flash_attn_func(Q, K[:, :7], V[:, :7], causal=True))


def test_refusals() -> None:
    scale, cu = torch.ones(2, 2), {"cu_seqlens_q": CU_Q, "max_seqlen_q": 9}
    new = {"k": FLAT[1], "v": FLAT[2], "cache_seqlens": CU_Q[:2]}
    unsupported: dict[str, Callable[[], object]] = {
        "qv is given": lambda: flash_attn_func(Q, K, V, qv=Q),
        "q_descale is given": lambda: flash_attn_func(Q, K, V, q_descale=scale),
        "v_descale is given: 8-bit": lambda: flash_attn_varlen_func(
            *FLAT, CU_Q, CU_K, 9, 20, v_descale=scale
        ),
        "k_descale is given": lambda: flash_attn_with_kvcache(Q, K, V, k_descale=scale),
        "cu_seqlens_k_new": lambda: flash_attn_with_kvcache(
            FLAT[0], K, V, **new, **cu, cu_seqlens_k_new=CU_K
        ),
        "rotary_seqlens": lambda: flash_attn_with_kvcache(
            Q, K, V, rotary_cos=Q[0, :, 0], rotary_sin=Q[0, :, 0], rotary_seqlens=CU_Q[:2]
        ),
        "cu_seqlens_k with page_table": lambda: _flash_attn_forward(
            *FLAT, **cu, cu_seqlens_k=CU_K, page_table=CU_K[None]
        ),
        "seqused_q without": lambda: _flash_attn_forward(Q, K, V, seqused_q=CU_Q[:2]),
    }
    for message, call in unsupported.items():
        with pytest.raises(jitattn.UnsupportedError, match=message):
            call()
    invalid: dict[str, Callable[[], object]] = {
        "attention_chunk=-1": lambda: flash_attn_func(Q, K, V, attention_chunk=-1),
        "attention_chunk=2.5": lambda: flash_attn_func(Q, K, V, attention_chunk=2.5),
        "window_size=": lambda: flash_attn_func(Q, K, V, window_size=(1,)),
        "softmax_scale=": lambda: flash_attn_func(Q, K, V, softmax_scale=float("nan")),
        "cache_seqlens: where": lambda: flash_attn_with_kvcache(Q, K, V, K, V),
        "rotary_cos and rotary_sin": lambda: flash_attn_with_kvcache(Q, K, V, rotary_cos=Q),
    }
    for message, call in invalid.items():
        with pytest.raises(RuntimeError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)
    for call in (
        lambda: flash_attn_with_kvcache(FLAT[0], K, V, cu_seqlens_q=CU_Q),
        lambda: flash_attn_qkvpacked_func(Q),
        lambda: flash_attn_qkvpacked_func(Q, num_heads_q=1),
    ):
        with pytest.raises(AssertionError):
            call()
    with pytest.raises((jitattn.InvalidInputError, jitattn.UnsupportedError), match="float8"):
        flash_attn_func(*(x.to(torch.float8_e4m3fn) for x in (Q, K, V)))


def test_under_torch_compile() -> None:
    def call(q: torch.Tensor) -> torch.Tensor:
        return flash_attn_func(q, K, V, causal=True, window_size=(5, 0))

    out = torch.compile(call, backend="eager", fullgraph=True)(Q)
    torch.testing.assert_close(out, call(Q))
