"""Tests gradients of tensors that score functions capture, against torch.vmap in fp64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import Causal, Dense, KeyPadding, MaskMod, Padded, Paged, Ragged, Window
from jitattn.jit import build
from jitattn.reference import reference
from tests.support.compare import rel_l2
from tests.support.functions import attend_exactly

pytestmark = pytest.mark.usefixtures("with_grad")
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LIMIT = {FP16: 3e-3, BF16: 2e-2, FP32: 3e-5}
BATCH, HEADS, ROWS, KEYS = 2, 4, 75, 90
IDS = torch.arange(KEYS).remainder(7)

#: A function of captured tensors, and their shapes.
Case = tuple[Callable[..., Any], tuple[tuple[int, ...], ...]]
CASES: dict[str, Case] = {
    "slopes": (lambda t: lambda s, b, h, q, k: s + t[h] * (k - q), ((HEADS,),)),
    "scalar": (lambda t: lambda s, b, h, q, k: s * t, ((),)),
    "temperature of rows": (lambda t: lambda s, b, h, q, k: s * t[b, q], ((BATCH, ROWS),)),
    "bias of keys": (lambda t: lambda s, b, h, q, k: s + t[k] * t[k], ((KEYS,),)),
    "relative table": (
        lambda t: lambda s, b, h, q, k: s + t[h, q - k + KEYS],
        ((HEADS, ROWS + KEYS),),
    ),
    "clamped table": (
        lambda t: lambda s, b, h, q, k: s + t[(q - k).clamp(-8, 8) + 8, h],
        ((17, HEADS),),
    ),
    "matrix": (lambda t: lambda s, b, h, q, k: s + t[0, q, k], ((1, ROWS, KEYS),)),
    "of the score": (
        lambda t, u: lambda s, b, h, q, k: torch.tanh(s * t[h]) * u[b, k],
        ((HEADS,), (BATCH, KEYS)),
    ),
    "where hidden": (
        lambda t: lambda s, b, h, q, k: torch.where(q >= k, s + t[q - k], -float("inf")),
        ((KEYS,),),
    ),
    "twice": (lambda t: lambda s, b, h, q, k: s * t[h] + t[b], ((HEADS,),)),
}


def drawn(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to("cuda")


def of_sizes(dtype: torch.dtype, dim: int = 32) -> list[Tensor]:
    shapes = ((BATCH, ROWS, HEADS, dim), (BATCH, KEYS, 2, dim), (BATCH, KEYS, 2, dim))
    return [drawn(shape, seed).to(dtype).requires_grad_() for seed, shape in enumerate(shapes)]


def gradients(out: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.double().sin().sum(), inputs)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_against_vmap(name: str, dtype: torch.dtype) -> None:
    make, shapes = CASES[name]
    captured = [drawn(shape, 9).requires_grad_() for shape in shapes]
    qkv = of_sizes(dtype)
    out = jitattn.attention(*qkv, score_mod=make(*captured))
    found = gradients(out, [*qkv, *captured])
    again = gradients(jitattn.attention(*qkv, score_mod=make(*captured)), captured)
    leaves = [x.detach().double().requires_grad_() for x in (*qkv, *captured)]
    exact, _ = attend_exactly(*leaves[:3], make(*leaves[3:]), None)
    wanted = gradients(exact, leaves)
    for one, other in zip(found, wanted, strict=True):
        assert rel_l2(one, other) < 3 * LIMIT[dtype]
    for one, other in zip(found[3:], again, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [FP16, BF16, torch.float64], ids=str)
def test_dtypes_of_captured_tensors(dtype: torch.dtype) -> None:
    table = drawn((HEADS, ROWS + KEYS), 3).to(dtype).requires_grad_()
    fixed = drawn((HEADS,), 4)
    make = CASES["relative table"][0]
    qkv = of_sizes(FP32)
    out = jitattn.attention(
        *qkv, score_mod=lambda s, b, h, q, k: make(table)(s, b, h, q, k) + fixed[h] * q
    )
    (found,) = gradients(out, [table])
    leaves = [x.detach().double().requires_grad_() for x in (*qkv, table)]
    exact, _ = attend_exactly(
        *leaves[:3],
        lambda s, b, h, q, k: make(leaves[3])(s, b, h, q, k) + fixed[h].double() * q,
        None,
    )
    assert found.dtype is dtype
    assert rel_l2(found, gradients(exact, [leaves[3]])[0]) < 3 * LIMIT.get(dtype, 3e-5)


def wide_mask() -> Tensor:
    """Rows that kernels would copy 16 bytes at a time."""
    room = torch.zeros(1, 1, ROWS, KEYS + 6, dtype=torch.bool, device="cuda")
    room[..., :KEYS] = drawn((1, 1, ROWS, KEYS), 8) > -0.5
    return room[..., :KEYS]


FEATURES: dict[str, Callable[[], dict[str, Any]]] = {
    "causal": lambda: {"mask": Causal()},
    "window": lambda: {"mask": Window(20, 0, keep_first=3)},
    "function": lambda: {"mask": MaskMod(lambda b, h, q, k: (q + 3 >= k) & (k % 5 != 1))},
    "softcap": lambda: {"softcap": 2.0},
    "sinks": lambda: {"sinks": drawn((HEADS,), 5)},
    "bias": lambda: {"bias": drawn((1, HEADS, ROWS, KEYS), 6)},
    "scale": lambda: {"scale": 0.4},
    "negative scale": lambda: {"scale": -0.2},
    "key padding": lambda: {"mask": KeyPadding(drawn((BATCH, KEYS), 8) > -0.5)},
    "dense": lambda: {"mask": Dense(drawn((1, HEADS, ROWS, KEYS), 8) > -0.5)},
    "dense of rows of 16 bytes": lambda: {"mask": Dense(wide_mask())},
    "padding and a function": lambda: {
        "mask": KeyPadding(drawn((BATCH, KEYS), 8) > -0.5) & MaskMod(lambda b, h, q, k: q != k)
    },
}


@pytest.mark.parametrize("name", FEATURES)
def test_beside_other_features(name: str) -> None:
    given = FEATURES[name]()
    make, shapes = CASES["of the score"]
    captured = [drawn(shape, 9).requires_grad_() for shape in shapes]
    qkv = of_sizes(FP32)
    out = jitattn.attention(*qkv, score_mod=make(*captured), **given)
    found = gradients(out, [*qkv, *captured])
    leaves = [x.detach().double().requires_grad_() for x in (*qkv, *captured)]
    exact = reference(*leaves[:3], score_mod=make(*leaves[3:]), **given)
    assert rel_l2(out, exact) < 1e-5
    for one, other in zip(found, gradients(exact, leaves), strict=True):
        assert rel_l2(one, other) < 1e-4


def test_dropout_drops_the_same_weights() -> None:
    """With values of one number in all keys, only what dropout leaves tells rows apart."""
    state = torch.tensor([3, 5], device="cuda")
    table = drawn((HEADS, ROWS + KEYS), 3).requires_grad_()
    make = CASES["relative table"][0]
    q, k, v = of_sizes(FP32)
    given: dict[str, Any] = {"dropout_p": 0.5, "dropout_state": state}
    (found,) = gradients(jitattn.attention(q, k, v, score_mod=make(table), **given), [table])
    keep = jitattn.dropout_mask(state, 0.5, BATCH, HEADS, ROWS, KEYS)
    leaf = table.detach().double().requires_grad_()
    rows = torch.arange(ROWS, device="cuda")[:, None]
    keys = torch.arange(KEYS, device="cuda")
    wide_q, wide_k, wide_v = (x.detach().double().transpose(1, 2) for x in (q, k, v))
    wide_k, wide_v = (x.repeat_interleave(2, 1) for x in (wide_k, wide_v))
    scores = wide_q @ wide_k.transpose(-1, -2) / 32**0.5 + leaf[:, rows - keys + KEYS]
    weights = scores.softmax(-1) * keep / 0.5
    (wanted,) = gradients((weights @ wide_v).transpose(1, 2), [leaf])
    assert rel_l2(found, wanted) < 1e-4


def test_ragged_padded_and_paged_sequences() -> None:
    lengths = [0, 50, 3, 70]
    cu = torch.tensor([0, *lengths], device="cuda", dtype=torch.int32).cumsum(0, dtype=torch.int32)
    total = int(cu[-1])
    q, k, v = (drawn((total, 2, 32), seed).requires_grad_() for seed in range(3))
    table = drawn((4, 71), 8).requires_grad_()
    score = lambda s, b, h, i, j: s + table[b, (i - j).abs()] * (h + 1)  # noqa: E731
    ragged = Ragged.from_cu_seqlens(cu, 70)
    out = jitattn.attention(q, k, v, q_seqs=ragged, kv_seqs=ragged, score_mod=score)
    found = gradients(out, [q, table])
    leaves = [x.detach().double().requires_grad_() for x in (q, k, v, table)]
    parts = []
    for idx, length in enumerate(lengths):
        if length:
            one = [x[int(cu[idx]) : int(cu[idx + 1])][None] for x in leaves[:3]]
            parts.append(
                attend_exactly(
                    *one,
                    lambda s, b, h, i, j, row=leaves[3][idx]: s + row[(i - j).abs()] * (h + 1),
                    None,
                )[0][0]
            )
    exact = torch.cat(parts)
    for one, other in zip(found, gradients(exact, [leaves[0], leaves[3]]), strict=True):
        assert rel_l2(one, other) < 1e-4
    _padded_and_paged_agree(score, table)


def _padded_and_paged_agree(score: Any, table: Tensor) -> None:
    q, k, v = (drawn((4, 48, 2, 32), seed) for seed in range(3))
    length = torch.tensor([48, 20, 1, 33], device="cuda", dtype=torch.int32)
    plain = jitattn.attention(q, k, v, kv_seqs=Padded(length), score_mod=score)
    (wanted,) = gradients(plain, [table])
    order = torch.randperm(12, generator=torch.Generator().manual_seed(1)).to("cuda")
    pages = [torch.empty_like(x).view(12, 16, 2, 32) for x in (k, v)]
    for page, x in zip(pages, (k, v), strict=True):
        page[order] = x.view(12, 16, 2, 32)
    paged = Paged(order.view(4, 3).to(torch.int32), length)
    out = jitattn.attention(q, *pages, kv_seqs=paged, score_mod=score)
    (found,) = gradients(out, [table])
    assert rel_l2(found, wanted) < 1e-5


def test_what_is_no_number_stays_in_its_element() -> None:
    q, k, v = of_sizes(FP32)
    v = v.detach().clone()
    v[0, 3, 0, 0] = float("inf")
    table = torch.zeros(BATCH, HEADS, device="cuda", requires_grad=True)
    score = lambda s, b, h, i, j: s + table[b, h] * j  # noqa: E731
    out = jitattn.attention(q, k, v, score_mod=score)
    (found,) = torch.autograd.grad(out.nan_to_num(0.0, 0.0, 0.0).sum(), [table], retain_graph=True)
    out.backward(torch.ones_like(out))
    assert table.grad is not None
    assert table.grad[0, :2].isnan().all()  # heads that read head 0 of v
    assert table.grad[0, 2:].isfinite().all()
    assert table.grad[1].isfinite().all()
    assert found.shape == table.shape


def test_only_what_is_asked_for() -> None:
    """A mask has no derivative, and a tensor that needs no gradient gets none."""
    bound = torch.full((HEADS,), 20.0, device="cuda", requires_grad=True)
    table, fixed = (drawn((HEADS,), seed) for seed in (1, 2))
    table.requires_grad_()
    qkv = of_sizes(FP32)
    out = jitattn.attention(
        *qkv,
        score_mod=lambda s, b, h, q, k: s * table[h] + fixed[h],
        mask=MaskMod(lambda b, h, q, k: q - k < bound[h]),
    )
    out.sum().backward()
    assert table.grad is not None
    assert table.grad.abs().min() > 0
    assert bound.grad is None or bound.grad.count_nonzero() == 0
    assert fixed.grad is None


def test_tiny_and_huge_gradients_keep_their_digits() -> None:
    table = drawn((HEADS, ROWS + KEYS), 3).requires_grad_()
    make = CASES["relative table"][0]
    qkv = of_sizes(FP32)
    out = jitattn.attention(*qkv, score_mod=make(table))
    of_one = torch.autograd.grad(out, [table], torch.ones_like(out), retain_graph=True)[0]
    for size in (1e-25, 1e25):
        (found,) = torch.autograd.grad(out, [table], torch.full_like(out, size), retain_graph=True)
        assert rel_l2(found.double() / size, of_one.double()) < 1e-6
    zero = torch.autograd.grad(out, [table], torch.zeros_like(out))[0]
    assert zero.count_nonzero() == 0


@pytest.mark.real_gpu
def test_a_warmed_up_call_compiles_nothing() -> None:
    table = drawn((HEADS, ROWS + KEYS), 3).requires_grad_()
    qkv = of_sizes(BF16, 64)
    make = CASES["relative table"][0]
    jitattn.warmup(*qkv, score_mod=make(table), gradients=True)
    before = build.stats().compiled
    gradients(jitattn.attention(*qkv, score_mod=make(table)), [table])
    other = drawn((HEADS, 2 * (ROWS + KEYS)), 3).requires_grad_()
    gradients(jitattn.attention(*qkv, score_mod=make(other)), [other])
    assert build.stats().compiled == before


def test_a_function_of_hidden_keys_makes_nothing_of_them() -> None:
    """It turns a score of -inf, as other kernels hide by, into +inf and into a number."""
    q, k, v = of_sizes(FP32)
    keep = drawn((BATCH, KEYS), 8) > 0
    keep[1] = False
    for score in (lambda s, b, h, i, j: -s, lambda s, b, h, i, j: 3.0 * torch.tanh(s)):
        out = jitattn.attention(q, k, v, score_mod=score, mask=KeyPadding(keep))
        found = gradients(out, [q, k, v])
        leaves = [x.detach().double().requires_grad_() for x in (q, k, v)]
        exact = reference(*leaves, score_mod=score, mask=KeyPadding(keep))
        assert rel_l2(out, exact) < 1e-5
        assert out[1].count_nonzero() == 0
        for one, other in zip(found, gradients(exact, leaves), strict=True):
            assert rel_l2(one, other) < 1e-4


def test_wrong_masks_beside_a_function_are_refused() -> None:
    q, k, v = of_sizes(FP32)
    score = lambda s, b, h, i, j: s * 2  # noqa: E731
    short = torch.ones(BATCH, KEYS - 1, dtype=torch.bool, device="cuda")
    for mask in (KeyPadding(short), KeyPadding(short.float()), Dense(short), Dense(short[None])):
        with pytest.raises(jitattn.InvalidInputError):
            jitattn.attention(q, k, v, score_mod=score, mask=mask)


def test_the_last_of_32_captured_tensors() -> None:
    q, k, v = of_sizes(FP32)
    many = [drawn((HEADS,), seed) for seed in range(31)]
    last = drawn((HEADS,), 40).requires_grad_()

    def score(s: Any, b: Any, h: Any, i: Any, j: Any) -> Any:
        for one in many:
            s = s + 0.01 * one[h]
        return s * last[h]

    (found,) = gradients(jitattn.attention(q, k, v, score_mod=score), [last])
    leaves = [x.detach().double() for x in (q, k, v)]
    leaf = last.detach().double().requires_grad_()
    offset = 0.01 * torch.stack(many).double().sum(0)
    exact, _ = attend_exactly(*leaves, lambda s, b, h, i, j: (s + offset[h]) * leaf[h], None)
    assert rel_l2(found, gradients(exact, [leaf])[0]) < 1e-4
