"""Tests dropout on a GPU: `dropout_mask` against the kernel, seeds, graphs."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.capture import capture
from tests.support.compare import assert_independent, rel_l2

BF16 = torch.bfloat16


@pytest.mark.parametrize("length", [1, 20, 300])
@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_mask_is_that_of_the_call(length: int, dim: int, p: float) -> None:
    """A column of V that is the unit vector of a key shows its weight."""
    q = torch.randn(2, length, 4, dim, device="cuda", dtype=BF16)
    k = torch.randn(2, 200, 2, dim, device="cuda", dtype=BF16)
    v = torch.eye(200, device="cuda", dtype=BF16)[None, :, None, :].expand(2, 200, 2, 200)
    state = jitattn.dropout_state("cuda")
    given = {"dropout_p": p, "dropout_state": state, "out_dtype": torch.float32}
    for num_splits in (1, 3):
        weights = jitattn.attention(q, k, v, num_splits=num_splits, **given).transpose(1, 2)
        assert torch.equal(weights != 0, jitattn.dropout_mask(state, p, 2, 4, length, 200))
        truth = jitattn.reference.reference(
            q.cpu(), k.cpu(), v.cpu(), dropout_p=p, dropout_state=state.cpu()
        )
        assert rel_l2(weights.transpose(1, 2).cpu(), truth) < 4e-3


def test_both_paths_drop_the_same() -> None:
    q, k, v = (torch.randn(1, n, 4, 64, device="cuda", dtype=BF16) for n in (100, 130, 130))
    state = torch.tensor([99, -1])
    here = jitattn.attention(q, k, v, dropout_p=0.25, dropout_state=state.cuda())
    there = jitattn.attention(q.cpu(), k.cpu(), v.cpu(), dropout_p=0.25, dropout_state=state)
    assert rel_l2(here.cpu(), there) < 5e-3


def test_the_high_halves_of_a_state_count() -> None:
    """In the kernels, too: offsets grow by 2^32 where a call has as many weights."""
    q, k = (torch.randn(1, n, 4, 64, device="cuda", dtype=BF16) for n in (100, 64))
    v = torch.eye(64, device="cuda", dtype=BF16)[None, :, None, :].expand(1, 64, 4, 64)
    masks = []
    for state in ([3, 4], [3, 4 + (1 << 32)], [3, 4 - (1 << 63)], [3 + (1 << 32), 4]):
        given = torch.tensor(state).cuda()
        out = jitattn.attention(q, k, v, dropout_p=0.5, dropout_state=given)
        masks.append(out.transpose(1, 2) != 0)
        assert torch.equal(masks[-1].cpu(), jitattn.dropout_mask(given.cpu(), 0.5, 1, 4, 100, 64))
    assert_independent(masks)


def test_torchs_seed_decides() -> None:
    q, k, v = torch.randn(3, 1, 100, 4, 64, device="cuda", dtype=BF16)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(jitattn.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


@pytest.mark.real_gpu
def test_a_graph_draws_anew_in_every_replay() -> None:
    q, k, v = torch.randn(3, 1, 100, 4, 64, device="cuda", dtype=BF16)
    jitattn.attention(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, dropout_p=0.5)
    results = []
    for _ in range(3):
        graph.replay()
        results.append(out.clone())
    assert not torch.equal(results[0], results[1])
    assert not torch.equal(results[1], results[2])
