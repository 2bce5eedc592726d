"""Tests score and mask functions on a GPU, against torch.vmap of the same functions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import MaskMod, Padded, Paged, Ragged, Window
from jitattn.reference import reference
from tests.support.compare import rel_l2
from tests.support.expressions import Captured, random_function
from tests.support.functions import FUNCTIONS, attend_exactly

pytestmark = pytest.mark.usefixtures("with_grad")
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LIMIT = {FP16: 2e-3, BF16: 1.5e-2, FP32: 3e-5}


def drawn(dtype: torch.dtype, len_q: int = 75, len_kv: int = 90, dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, len_q, 4, dim), (2, len_kv, 2, dim), (2, len_kv, 2, dim))
    return [
        torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, dtype: torch.dtype) -> None:
    score_mod, mask_mod = FUNCTIONS[name]("cuda", 2, 4, 75, 90)
    qkv = drawn(dtype)
    given: dict[str, Any] = {} if score_mod is None else {"score_mod": score_mod}
    if mask_mod is not None:
        given["mask"] = MaskMod(mask_mod)
    out, lse = jitattn.attention(*qkv, return_lse=True, **given)
    found = torch.autograd.grad(out.float().sin().sum(), qkv)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    exact, exact_lse = attend_exactly(*leaves, score_mod, mask_mod)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves)
    assert rel_l2(out, exact) < LIMIT[dtype]
    finite = exact_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert rel_l2(lse[finite], exact_lse[finite]) < LIMIT[dtype]
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert rel_l2(one, other) < 3 * LIMIT[dtype]


LONG = ["prefix", "document", "natten", "dilated", "window", "by_head"]


@pytest.mark.parametrize("name", LONG)
def test_hidden_blocks_are_not_visited(name: str) -> None:
    """Long enough for lists of blocks, or a rule of positions."""
    sizes = (2, 4, 300, 340)
    score_mod, mask_mod = FUNCTIONS[name]("cuda", *sizes)
    qkv = drawn(FP16, *sizes[2:])
    given: dict[str, Any] = {} if score_mod is None else {"score_mod": score_mod}
    out = jitattn.attention(*qkv, mask=MaskMod(mask_mod), **given)
    found = torch.autograd.grad(out.float().sin().sum(), qkv)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    exact, _ = attend_exactly(*leaves, score_mod, mask_mod)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves)
    assert rel_l2(out, exact) < LIMIT[FP16]
    for one, other in zip(found, wanted, strict=True):
        assert rel_l2(one, other) < 3 * LIMIT[FP16]


@pytest.mark.parametrize("divisor", [1, 2, 3, 7, 2**31 - 1, -1, -3, 1 - 2**31, -(2**31)])
def test_integers_are_divided_exactly(divisor: int) -> None:
    """By a number, with every combination of signs and at both ends of int32."""
    edges = (0, 1, 2, 6, 7, 8, 99, 2**30, 2**31 - 2, 2**31 - 1)
    dividends = [*edges, *(-n for n in edges), -(2**31)]
    truncated = [
        abs(n) // abs(divisor) * (1 if (n < 0) == (divisor < 0) else -1) for n in dividends
    ]

    def table(values: list[int]) -> torch.Tensor:
        wrapped = [(n + 2**31) % 2**32 - 2**31 for n in values]
        return torch.tensor(wrapped, dtype=torch.int32, device="cuda")

    n, quotient = table(dividends), table([n // divisor for n in dividends])
    rest, short = table([n % divisor for n in dividends]), table(truncated)
    of_short = table([n - x * divisor for n, x in zip(dividends, truncated, strict=True)])

    def is_exact(b: Any, h: Any, q: Any, k: Any) -> Any:
        x = n[q]
        rounded = torch.div(x, divisor, rounding_mode="trunc")
        is_down = (x // divisor == quotient[q]) & (x % divisor == rest[q])
        return is_down & (rounded == short[q]) & (torch.fmod(x, divisor) == of_short[q])

    _, lse = jitattn.attention(
        *drawn(FP16, len(dividends)), mask=MaskMod(is_exact), return_lse=True
    )
    assert bool(lse.isfinite().all())


def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return 0.7 * s + 0.02 * (q - k) * (h + 1) - 0.1 * b


def visible(b: Any, h: Any, q: Any, k: Any) -> Any:
    return (q + 11 >= k) & ((k + b + h) % 5 != 0)


def _ragged() -> dict[str, Any]:
    seqs = [
        Ragged.from_cu_seqlens(torch.tensor(ends, dtype=torch.int32, device="cuda"))
        for ends in ([0, 20, 20, 75], [0, 31, 40, 90])
    ]
    return {"q_seqs": seqs[0], "kv_seqs": seqs[1]}


def _padded() -> dict[str, Any]:
    return {"kv_seqs": Padded(torch.tensor([90, 41], dtype=torch.int32, device="cuda"))}


def _paged() -> dict[str, Any]:
    table = torch.tensor([[3, 0, 1], [5, 2, 4]], dtype=torch.int32, device="cuda")
    return {"kv_seqs": Paged(table, torch.tensor([41, 90], dtype=torch.int32, device="cuda"))}


def _changed() -> dict[str, Any]:
    slopes = torch.tensor([0.1, 0.05, 0.2, 0.0], device="cuda")
    sinks = torch.tensor([0.5, -1.0, 0.0, 2.0], device="cuda")
    return {"softcap": 3.0, "alibi_slopes": slopes, "sinks": sinks, "mask": Window(30, 5)}


CALLS: dict[str, Any] = {
    "ragged": _ragged, "padded": _padded, "paged": _paged, "changed": _changed, "decode": dict,
    "bhsd": lambda: {"layout": "bhsd"}, "splits": lambda: {"num_splits": 3},
    "negative scale": lambda: {"scale": -0.3},
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_with_other_arguments(name: str) -> None:
    """As the reference, gradients too."""
    given = CALLS[name]()
    len_q = 1 if name == "decode" else 75
    qkv = drawn(FP16, len_q)
    if name == "ragged":
        qkv = [x[0].detach().requires_grad_() for x in qkv]
    if name == "paged":
        qkv[1:] = [x.detach()[:, :32].repeat(3, 1, 1, 1).requires_grad_() for x in qkv[1:]]
    if name == "bhsd":
        qkv = [x.detach().transpose(1, 2).contiguous().requires_grad_() for x in qkv]
    mask = given.pop("mask", jitattn.Full()) & MaskMod(visible)
    out = jitattn.attention(*qkv, mask=mask, score_mod=score, **given)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    given.pop("num_splits", None)
    exact = reference(*leaves, mask=mask, score_mod=score, **given)
    assert rel_l2(out, exact) < LIMIT[FP16]
    found = torch.autograd.grad(out.float().sin().sum(), qkv)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves)
    for one, other in zip(found, wanted, strict=True):
        assert rel_l2(one, other) < 3 * LIMIT[FP16]


@pytest.mark.parametrize("seed", range(24))
def test_random_expressions(seed: int) -> None:
    function = random_function(seed, Captured("cuda", 2, 4, 90))
    qkv = drawn(FP32, 40, 60)
    out = jitattn.attention(*qkv, score_mod=function)
    found = torch.autograd.grad(out.sin().sum(), qkv)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    exact, _ = attend_exactly(*leaves, function, None)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves, allow_unused=True)
    assert rel_l2(out, exact) < LIMIT[FP32]
    for one, other in zip(found, wanted, strict=True):
        truth = torch.zeros_like(one) if other is None else other
        assert rel_l2(one, truth) < 3 * LIMIT[FP32] or (one - truth).abs().max() < 1e-6


@pytest.mark.real_gpu
@pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")
@pytest.mark.parametrize("is_torchs", [False, True])
def test_flex_attentions_names(is_torchs: bool) -> None:
    """As torch's, run eagerly, with its block masks and ours."""
    from torch.nn.attention import flex_attention as torchs

    from jitattn.compat import flex_attention as ours

    sizes = (2, 4, 300, 340)
    score_mod, _ = FUNCTIONS["alibi"]("cuda", *sizes)
    _, mask_mod = FUNCTIONS["document"]("cuda", *sizes)
    theirs = torchs.create_block_mask(mask_mod, *sizes, device="cuda")
    mask = theirs if is_torchs else ours.create_block_mask(mask_mod, *sizes, device="cuda")
    qkv = [x.detach().transpose(1, 2).requires_grad_() for x in drawn(FP32, *sizes[2:])]
    out = ours.flex_attention(*qkv, score_mod, mask, enable_gqa=True)
    wanted = torchs.flex_attention(*qkv, score_mod, theirs, enable_gqa=True)
    assert rel_l2(out, wanted) < LIMIT[FP32]
    found = torch.autograd.grad(out.sin().sum(), qkv)
    for one, other in zip(found, torch.autograd.grad(wanted.sin().sum(), qkv), strict=True):
        assert rel_l2(one, other) < 3 * LIMIT[FP32]


@pytest.mark.real_gpu
def test_new_numbers_and_tensors_compile_nothing() -> None:
    from jitattn.jit import launch

    q, k, v = (x.detach() for x in drawn(FP16))

    def call(width: int, table: Tensor) -> Tensor:
        out: Tensor = jitattn.attention(
            q, k, v,
            score_mod=lambda s, b, h, q, k: s + table[h] * 0.5,
            mask=MaskMod(lambda b, h, q, k: q - k <= width),
        )  # fmt: skip
        return out

    call(3, torch.randn(4, device="cuda"))
    before = len(launch._kernels)
    for width in range(4, 40):
        call(width, torch.randn(4, device="cuda"))
    assert len(launch._kernels) == before
