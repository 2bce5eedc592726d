"""Tests invariants that hold for all inputs."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv

BF16 = torch.bfloat16


def test_order_of_keys_does_not_matter() -> None:
    q, k, v = random_qkv(2, 200, 333, 4, 2, 64, dtype=BF16, device="cuda")
    order = torch.randperm(333, device="cuda")
    out = jitattn.attention(q, k, v)
    shuffled = jitattn.attention(q, k[:, order], v[:, order])
    assert rel_l2(shuffled, out) < 5e-3


@pytest.mark.parametrize("len_q", [3, 150])
def test_two_halves_merge_into_the_whole(len_q: int) -> None:
    q, k, v = random_qkv(2, len_q, 500, 4, 2, 64, dtype=BF16, device="cuda")
    whole, lse = jitattn.attention(q, k, v, out_dtype=torch.float32, return_lse=True)
    halves = [
        jitattn.attention(q, k[:, part], v[:, part], out_dtype=torch.float32, return_lse=True)
        for part in (slice(0, 180), slice(180, 500))
    ]
    lses = torch.stack([half[1] for half in halves])
    total = torch.logsumexp(lses, 0)
    weights = (lses - total).exp().transpose(2, 3).unsqueeze(-1)
    merged = weights[0] * halves[0][0] + weights[1] * halves[1][0]
    torch.testing.assert_close(total, lse, rtol=0, atol=1e-5)
    assert rel_l2(merged, whole) < 3e-3


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("len_q", [1, 20, 300])
@pytest.mark.real_gpu
def test_runs_are_bitwise_equal(dtype: torch.dtype, len_q: int) -> None:
    q, k, v = random_qkv(2, len_q, 2000, 8, 2, 64, dtype=dtype, device="cuda")
    first, first_lse = jitattn.attention(q, k, v, mask=jitattn.Causal(), return_lse=True)
    for _ in range(50):
        out, lse = jitattn.attention(q, k, v, mask=jitattn.Causal(), return_lse=True)
        assert torch.equal(out, first)
        assert torch.equal(lse, first_lse)


@pytest.mark.parametrize("len_q", [1, 20, 300])
def test_batch_does_not_change_bits_with_fixed_splits(len_q: int) -> None:
    q, k, v = random_qkv(7, len_q, 1000, 8, 2, 64, dtype=BF16, device="cuda")
    together = jitattn.attention(q, k, v, num_splits=3)
    for index in range(7):
        one = slice(index, index + 1)
        alone = jitattn.attention(q[one], k[one], v[one], num_splits=3)
        assert torch.equal(alone, together[one])


@pytest.mark.parametrize("num_splits", [*range(1, 10), 40])
def test_every_split_count_gives_the_truth(num_splits: int) -> None:
    q, k, v = random_qkv(2, 5, 1500, 8, 2, 128, dtype=BF16, device="cuda")
    arguments = {"mask": jitattn.Causal(), "return_lse": True}
    truth, lse_truth = jitattn.reference.reference(q, k, v, **arguments)
    out, lse = jitattn.attention(q, k, v, num_splits=num_splits, **arguments)
    assert rel_l2(out, truth) < 5e-3
    torch.testing.assert_close(lse.double(), lse_truth.double(), rtol=0, atol=1e-5)


def test_scale_of_q_is_scale_of_scores() -> None:
    q, k, v = random_qkv(1, 100, 100, 2, 2, 64, dtype=BF16, device="cuda")
    # Doubling q is exact in bf16, so the scores are the same numbers.
    assert torch.equal(
        jitattn.attention(q * 2, k, v, scale=0.125), jitattn.attention(q, k, v, scale=0.25)
    )


def test_nan_key_reaches_the_rows_that_see_it_and_no_others() -> None:
    q, k, v = random_qkv(1, 100, 100, 1, 1, 64, dtype=BF16, device="cuda")
    k[0, 70] = float("nan")
    out = jitattn.attention(q, k, v, mask=jitattn.Causal())
    assert out[0, :70].isfinite().all()
    assert out[0, 70:].isnan().all()


def test_constant_on_all_scores_shifts_the_lse_alone() -> None:
    q, k, v = random_qkv(2, 40, 500, 4, 2, 64, dtype=BF16, device="cuda")
    q[..., 0], k[..., 0] = 1.0, 0.0
    shifted = k.clone()
    shifted[..., 0] = 16.0  # exact in bf16; 1/8 of it on every score
    out, lse = jitattn.attention(q, k, v, return_lse=True)
    out_shifted, lse_shifted = jitattn.attention(q, shifted, v, return_lse=True)
    assert rel_l2(out_shifted, out) < 5e-3
    torch.testing.assert_close(lse_shifted, lse + 2.0, rtol=0, atol=2e-5)


@pytest.mark.parametrize("len_q", [1, 20])
def test_another_tile_gives_the_same_answer(len_q: int) -> None:
    """The first rows of a long query, alone: another row class, other warps, other splits."""
    q, k, v = random_qkv(1, 300, 700, 2, 2, 64, dtype=BF16, device="cuda")
    long, lse_long = jitattn.attention(q, k, v, return_lse=True)
    short, lse_short = jitattn.attention(q[:, :len_q], k, v, return_lse=True)
    assert rel_l2(short, long[:, :len_q]) < 5e-3
    torch.testing.assert_close(lse_short, lse_long[:, :, :len_q], rtol=0, atol=1e-5)
