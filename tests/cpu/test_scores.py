"""What masks, biases and the like refuse, and how masks combine."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import jitattn
from jitattn import Causal, Dense, Full, InvalidInputError, KeyPadding, Window
from jitattn.masks import Both
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
        ("alibi_slopes is torch.float16 [4]", {"alibi_slopes": torch.zeros(4).half()}),
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
    from jitattn.cpu import attention_cpu
    from jitattn.scores import Scores

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
