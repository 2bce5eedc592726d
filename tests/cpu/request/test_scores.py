"""Tests errors of masks and score modifications, and combinations of masks."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import jitattn
from jitattn import Causal, Dense, Full, InvalidInputError, KeyPadding, Window
from jitattn.api.attention import bind
from jitattn.request.layouts import parse
from jitattn.request.scores import stagings
from jitattn.spec.kernel_spec import Problem
from jitattn.values.masks import Both
from tests.support.inputs import random_qkv

KEEP = torch.ones(2, 8, dtype=torch.bool)
MATRIX = torch.ones(2, 4, 8, 8, dtype=torch.bool)


@pytest.mark.parametrize(
    ("text", "arguments"),
    [
        ("bias has shape [2, 4, 8, 7]: it must be [2 or 1, 4 or 1, 8 or 1, 8]", {"bias": (7,)}),
        ("bias has shape [2, 4, 8, 9]", {"bias": (9,)}),
        ("bias is torch.float64", {"bias": torch.zeros(1, 1, 1, 8).double()}),
        ("bias is torch.bool", {"bias": MATRIX}),
        ("bias is a list", {"bias": [1.0]}),
        ("bias has shape [8, 8]", {"bias": torch.zeros(8, 8)}),
        ("the last one must be 1", {"bias": torch.zeros(2, 4, 8, 8).transpose(2, 3)}),
        ("relative_bias is torch.float32 [4, 6]", {"relative_bias": torch.zeros(4, 6)}),
        ("relative_bias is torch.float32 [3, 5]", {"relative_bias": torch.zeros(3, 5)}),
        ("alibi_slopes is torch.float32 [3]", {"alibi_slopes": torch.zeros(3)}),
        ("alibi_slopes is torch.int32 [4]", {"alibi_slopes": torch.zeros(4).int()}),
        ("sinks is torch.float32 [2, 4]", {"sinks": torch.zeros(2, 4)}),
        ("softcap=0", {"softcap": 0}),
        ("softcap=True", {"softcap": True}),
        ("softcap=nan", {"softcap": float("nan")}),
        ("KeyPadding(...) has shape [2, 7]", {"mask": KeyPadding(KEEP[:, :7])}),
        ("KeyPadding(...) is torch.float32", {"mask": KeyPadding(KEEP.float())}),
        ("KeyPadding(...) is a list", {"mask": KeyPadding([True])}),
        ("Dense(...) has shape [2, 3, 8, 8]", {"mask": Dense(MATRIX[:, :3])}),
        ("Dense(...) is torch.int32", {"mask": Dense(MATRIX.int())}),
    ],
)
def test_refusals(text: str, arguments: dict[str, Any]) -> None:
    q, k, v = random_qkv(2, 8, 8, 4, 2, 16)
    if isinstance(arguments.get("bias"), tuple):
        arguments = {"bias": torch.zeros(2, 4, 8, *arguments["bias"])}
    with pytest.raises(InvalidInputError, match=re.escape(text)):
        jitattn.attention(q, k, v, **arguments)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Window(-1),
        lambda: Window(1.0),
        lambda: Window(True),
        lambda: Window(0, 0, None),
        lambda: Window(0, 0, -1),
        lambda: Window(0, 0, 0, 1),
        lambda: Window(2**31),
    ],
)
def test_wrong_windows_are_refused(make: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"Window\("):
        make()


def test_intersections() -> None:
    padding, dense = KeyPadding(KEEP), Dense(MATRIX)
    assert Full() & Causal() == Causal()
    assert Window(3, 5, 2) & Causal() == Window(3, 0, 2)
    assert Causal() & Causal() == Causal()
    mask = Causal() & padding & dense
    assert isinstance(mask, Both)
    assert (mask.rule, mask.key_padding, mask.dense) == (Causal(), padding, dense)
    assert (padding & Window(1)).rule == Window(1)
    for one, other in (
        (Window(1), Window(2)),
        (Causal("top_left"), Window(2)),
        (padding, KeyPadding(KEEP)),
        (dense, mask),
    ):
        with pytest.raises(InvalidInputError, match="at most one"):
            one & other
    with pytest.raises(TypeError):
        Causal() & 3


@pytest.mark.parametrize("keep_first", [0, 2])
@pytest.mark.parametrize("len_q", [1, 5, 9])
def test_window_is_what_its_formula_says(keep_first: int, len_q: int) -> None:
    """Pair by pair: left, right and the first keys, around the bottom-right diagonal."""
    for left, right in ((0, 0), (2, 1), (None, 0), (3, None), (100, 100)):
        for lifts in (False, True):
            seen = jitattn.reference.visible(Window(left, right, keep_first, lifts), len_q, 7)
            for i in range(len_q):
                for j in range(7):
                    p = i + 7 - len_q
                    from_left = left is None or j >= p - left or (lifts and len_q == 1)
                    from_right = right is None or j <= p + right
                    assert seen[i, j] == ((from_left or j < keep_first) and from_right)


def test_a_window_of_everything_is_full() -> None:
    q, k, v = random_qkv(2, 8, 8, 4, 2, 16)
    full = jitattn.attention(q, k, v)
    assert torch.equal(jitattn.attention(q, k, v, mask=Window()), full)
    causal = jitattn.attention(q, k, v, mask=Causal())
    assert torch.equal(jitattn.attention(q, k, v, mask=Window(None, 0)), causal)


def test_gradients_of_what_changes_scores() -> None:
    """The CPU path is differentiable in all of them."""
    q, k, v = (x.double().requires_grad_() for x in random_qkv(1, 4, 5, 2, 1, 3))
    bias = torch.randn(1, 2, 1, 5).double().requires_grad_()
    made = {
        "alibi_slopes": torch.rand(2).requires_grad_(),
        "sinks": torch.randn(2).requires_grad_(),
        "relative_bias": torch.randn(2, 3).requires_grad_(),
    }
    from jitattn.cpu.attention import attention_cpu
    from jitattn.request.scores import Scores

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        q, k, v, bias = tensors
        return attention_cpu(
            q,
            k,
            v,
            mask=Window(2, 1, 1),
            scale=0.4,
            scores=Scores(bias, softcap=2.0, **made),
            out_dtype=torch.float64,
            return_lse=False,
        )

    assert torch.autograd.gradcheck(run, (q, k, v, bias), fast_mode=True)
    grads = torch.autograd.grad(run(q, k, v, bias).sum(), list(made.values()))
    assert all(torch.isfinite(grad).all() and grad.any() for grad in grads)


def test_scores_too_large_for_a_logarithm_of_their_sum() -> None:
    """A row of nothing but the smallest number sees all keys alike; rounding must not undo that."""
    q, k, v = random_qkv(1, 3, 4, 2, 2, 8)
    bias = torch.zeros(1, 1, 3, 4)
    bias[0, 0, 1] = torch.finfo(torch.float32).min
    truth = jitattn.reference.reference(q, k, v, bias=bias)
    assert torch.allclose(truth[:, 1], v.double().mean(1))
    assert torch.allclose(jitattn.attention(q, k, v, bias=bias).double(), truth, atol=1e-6)


def test_transforms_of_torch_func_reach_a_bias() -> None:
    """Tensors inside a transform have no address; the CPU path needs none."""
    q, k, v = random_qkv(1, 3, 4, 2, 2, 8)
    bias = torch.randn(1, 1, 3, 4)

    def loss(bias: torch.Tensor) -> torch.Tensor:
        return jitattn.attention(q, k, v, bias=bias).square().sum()

    leaf = bias.clone().requires_grad_()
    loss(leaf).backward()
    assert torch.allclose(torch.func.grad(loss)(bias), leaf.grad, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "blocks"),
    [
        ({}, 100),
        ({"mask": Causal()}, 100),
        ({"sinks": torch.zeros(4)}, 100),  # nothing hides keys: all of them are shared out
        ({"mask": Causal(), "softcap": 3.0}, 100),
        ({"bias": torch.zeros(1, 1, 1, 6400)}, 100),
        ({"mask": Window(None, 0, 4)}, 100),
        ({"mask": Window(640, 0, 4, full_on_decode=True)}, 100),
        ({"mask": Window(640, 0)}, 12),
        ({"mask": Window(640, 0, 65)}, 14),
        ({"mask": jitattn.LocalStride(64, 4, 10)}, 17),
    ],
)
def test_blocks_that_splits_are_chosen_by(arguments: dict[str, Any], blocks: int) -> None:
    """A bound on the blocks of 64 keys that one query visits, of 100."""
    from dataclasses import replace

    from jitattn.api.attention import bind
    from jitattn.kernels.fwd import fwd_spec
    from jitattn.plan.forward import blocks_seen
    from jitattn.request.layouts import parse
    from jitattn.spec.enums import RowClass

    tensors, call = bind(*random_qkv(1, 1, 6400, 4, 2, 16), arguments)
    problem, runtime = parse(tensors["q"], tensors["k"], tensors["v"], call)
    spec = fwd_spec(problem, "sm_90", RowClass.ROWS16)
    tile = replace(spec.tile, block_q=16, block_kv=64)
    assert blocks_seen(problem, runtime, tile) == blocks


def test_contents_and_sizes_pick_no_other_kernel() -> None:
    """One `Problem`, and so one kernel a row class, whatever patterns and numbers hold."""
    q, k, v = random_qkv(1, 40, 50, 4, 2, 16)

    def problem_of(mask: jitattn.Mask, **given: Any) -> Problem:
        tensors, call = bind(q, k, v, {"mask": mask, **given})
        return parse(tensors["q"], tensors["k"], tensors["v"], call)[0]

    patterns = ((1, 0.1, 8, True), (2, 0.9, 16, False), (4, 0.0, 128, True))
    listed: list[jitattn.Mask] = [
        jitattn.BlockSparse(torch.rand(heads, 7, 7) < density, size, causal)
        for heads, density, size, causal in patterns
    ]
    listed += [jitattn.LocalStride(16, 2, 3), jitattn.LocalStride(64, 1, 2, causal=False)]
    listed += [jitattn.PerHead([jitattn.Window(n), jitattn.Full()]) for n in (3, 30)]
    assert len({id(problem_of(mask)) for mask in listed}) == 1
    windows = [jitattn.Window(left, 2, keep) for left in (None, 5) for keep in (0, 9)]
    assert len({id(problem_of(mask)) for mask in windows}) == 1
    state = torch.zeros(2, dtype=torch.int64)
    dropped = [
        problem_of(jitattn.Causal(), dropout_p=p, dropout_state=state, softcap=cap)
        for p, cap in ((0.1, 2.0), (0.7, 30.0))
    ]
    assert dropped[0] is dropped[1]


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("batch", [1, 2])
def test_warmup_knows_how_a_matrix_comes_at_other_lengths(rows: int, batch: int) -> None:
    found = set()
    for len_kv in (64, 63, 60):
        q, k, v = random_qkv(batch, 8, len_kv, 4, 2, 16)
        given: dict[str, Any] = {
            "bias": torch.zeros(batch, 1, rows, len_kv),
            "mask": Dense(torch.ones(1, 1, rows, len_kv, dtype=torch.bool)),
        }
        _, call = bind(q, k, v, given)
        problem, _ = parse(q, k, v, call)
        ways = stagings(call, problem, 8)
        assert (problem.bias_staged, problem.dense_staged) in ways
        found.add(tuple(ways))
    assert len(found) == 1
