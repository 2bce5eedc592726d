"""Tests the FlashAttention 4 door: names, functions of scores, and what is refused."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat import alias
from jitattn.compat.flash_attn import cute
from jitattn.compat.flash_attn.cute import flash_attn_func, flash_attn_varlen_func
from jitattn.compat.flash_attn.cute.interface import (
    SchedulerMetadataTensorsTorch,
    flash_attn_combine,
    get_scheduler_metadata,
)
from tests.support.inputs import drawn

Q, K, V = drawn(2, 9, 4, 16), drawn(2, 20, 2, 16, seed=1), drawn(2, 20, 2, 24, seed=2)
CU_Q, CU_K = (torch.tensor([0, n, 2 * n], dtype=torch.int32) for n in (9, 20))
FLAT = tuple(x.flatten(0, 1) for x in (Q, K, V))


def test_facts_of_the_original() -> None:
    assert cute.__version__ == "4.0.0b36"
    out, lse = flash_attn_func(Q, K, V)
    assert lse is None
    assert torch.equal(flash_attn_func(Q, K, V, return_lse=True)[0], out)


def test_its_distribution_is_claimed_by_name_alone() -> None:
    """transformers takes version 4 where it finds that."""
    with alias("flash_attn", distribution=True):
        assert importlib.metadata.packages_distributions()["flash_attn"] == ["flash-attn"]
    with alias("flash_attn", distribution=("flash-attn", "flash-attn-4")):
        found = importlib.metadata.packages_distributions()["flash_attn"]
        assert sorted(found) == ["flash-attn", "flash-attn-4"]
        assert importlib.metadata.version("flash-attn-4") == "4.0.0b36"
        assert importlib.metadata.version("flash-attn") == "2.8.3"
        from flash_attn.cute import flash_attn_func as theirs

        assert theirs is flash_attn_func
    with pytest.raises(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("flash-attn-4")


def test_bounds_that_are_none_or_negative_are_no_bounds() -> None:
    wanted, _ = flash_attn_func(Q, K, V)
    for window in ((None, None), (-1, -1), (None, -7), [-1, None]):
        assert torch.equal(flash_attn_func(Q, K, V, window_size=window)[0], wanted)
    causal, _ = flash_attn_func(Q, K, V, causal=True)
    assert torch.equal(flash_attn_func(Q, K, V, window_size=(None, 0))[0], causal)


def test_a_mask_mod_decides_alone() -> None:
    """As in the original, which then looks at neither causal nor window_size."""
    own = {"mask_mod": lambda b, h, q_idx, kv_idx: kv_idx >= q_idx}
    wanted, _ = flash_attn_func(Q, K, V, **own)
    assert torch.equal(flash_attn_func(Q, K, V, **own, causal=True, window_size=(2, 0))[0], wanted)


def test_a_captured_tensor_has_a_gradient() -> None:
    table = drawn(4, 20, seed=7).requires_grad_()

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + table[h, kv_idx]

    out, _ = flash_attn_func(Q, K, V, score_mod=score_mod)
    (got,) = torch.autograd.grad(out.sin().sum(), table)
    wide_k, wide_v = (x.repeat_interleave(2, 2) for x in (K, V))
    scores = torch.einsum("bihd,bjhd->bhij", Q, wide_k) / 4 + table[:, None]
    truth = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), wide_v)
    (wanted,) = torch.autograd.grad(truth.sin().sum(), table)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-4)


def test_the_lse_holds_the_sink_where_nothing_is_seen_too() -> None:
    sink = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out, lse = flash_attn_func(Q, K[:, :4], V[:, :4], causal=True, learnable_sink=sink,
                               return_lse=True)  # fmt: skip
    assert torch.equal(out[:, :5], torch.zeros(2, 5, 4, 24))
    torch.testing.assert_close(lse[:, :, :5], sink[None, :, None].expand(2, 4, 5))


def test_pages_without_lengths_are_full() -> None:
    pages = [x.unflatten(1, (5, 4)).flatten(0, 1) for x in (K, V)]
    table = torch.arange(10, dtype=torch.int32).view(2, 5)
    wanted, _ = flash_attn_func(Q, K, V)
    own = {"cu_seqlens_q": CU_Q, "max_seqlen_q": 9, "page_table": table}
    out, _ = flash_attn_varlen_func(FLAT[0], *pages, **own)
    torch.testing.assert_close(out, wanted.flatten(0, 1))
    out, _ = flash_attn_varlen_func(FLAT[0], *pages, **own, cu_seqlens_k=CU_K, max_seqlen_k=20)
    torch.testing.assert_close(out, wanted.flatten(0, 1))
    out, _ = flash_attn_varlen_func(FLAT[0], *pages, **own, cu_seqlens_k=CU_K)
    torch.testing.assert_close(out, wanted.flatten(0, 1))


def test_metadata_and_results_of_splits() -> None:
    metadata = get_scheduler_metadata(9, 20, 4, 2, 16, 1, cu_seqlens_q=CU_Q)
    assert metadata == SchedulerMetadataTensorsTorch()
    lengths = (None, CU_Q, CU_K, 9, 20)
    wanted, wanted_lse = flash_attn_varlen_func(*FLAT, *lengths, return_lse=True)
    out, _ = flash_attn_varlen_func(
        *FLAT, *lengths, scheduler_metadata=metadata, min_seqlen_k=3, seqlen_k_per_split=64
    )
    assert torch.equal(out, wanted)
    halves = torch.stack([wanted, wanted]), torch.stack([wanted_lse.T, wanted_lse.T])
    out, lse = flash_attn_combine(*halves)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse.T + torch.tensor(2.0).log())
    assert flash_attn_combine(*halves, return_lse=False)[1] is None


def test_refusals() -> None:
    def of_cute(scores: Any, b: Any, h: Any, q: Any, kv: Any, seqlen: Any, aux: Any) -> Any:
        return scores

    def of_cute_mask(b: Any, h: Any, q: Any, kv: Any, seqlen: Any, aux: Any) -> Any:
        return q >= kv

    unsupported: dict[str, Callable[[], object]] = {
        "qv is given": lambda: flash_attn_func(Q, K, V, qv=Q),
        "gather_kv_indices .*flex_attention": lambda: flash_attn_func(
            Q, K, V, gather_kv_indices=CU_Q
        ),
        "block_sparse_tensors .*flex_attention": lambda: flash_attn_func(
            Q, K, V, block_sparse_tensors=(CU_Q,)
        ),
        "block_sparse_tensors_bwd": lambda: flash_attn_func(Q, K, V, block_sparse_tensors_bwd=(Q,)),
        "score_mod_bwd": lambda: flash_attn_func(Q, K, V, score_mod_bwd=of_cute),
        "aux_tensors": lambda: flash_attn_func(Q, K, V, aux_tensors=[Q]),
        "aux_scalars": lambda: flash_attn_varlen_func(Q, K, V, aux_scalars=(3,)),
        "score_mod=.*flex_attention": lambda: flash_attn_func(Q, K, V, score_mod=of_cute),
        "mask_mod=.*flex_attention": lambda: flash_attn_varlen_func(Q, K, V, mask_mod=of_cute_mask),
    }
    for message, call in unsupported.items():
        with pytest.raises(jitattn.UnsupportedError, match=message):
            call()
    invalid: dict[str, Callable[[], object]] = {
        "window_size=": lambda: flash_attn_func(Q, K, V, window_size=3),
        "learnable_sink": lambda: flash_attn_func(Q, K, V, learnable_sink=Q[0, 0, 0]),
        "out_partial has shape": lambda: flash_attn_combine(Q[0], K[0]),
    }
    for message, call in invalid.items():
        with pytest.raises(AssertionError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)
    assert flash_attn_func(Q, K, V, aux_tensors=[], aux_scalars=())[1] is None
