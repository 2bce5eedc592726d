"""Tests gradients on a GPU: random combinations, determinism, memory, errors."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn.jit import build
from jitattn.kernels.bwd import specs_of_backward
from jitattn.kernels.bwd_scores import score_grad_spec
from jitattn.kernels.norm import NormGradSpec, NormSpec
from jitattn.plan.backward import without_block_lists
from jitattn.spec.enums import Access, BiasKind, MaskKind, RowClass, ScoreTarget, Switch
from jitattn.spec.kernel_spec import Problem
from jitattn.values.gears import resolve_numerics
from jitattn.values.tensors import DTYPES
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.features import KINDS
from tests.support.gradients import (
    GRAD_FEATURES,
    GRAD_LAYOUTS,
    GradCase,
    check_gradients,
    grad_cases,
)
from tests.support.patterns import on_device
from tests.support.precompile import CompileOnce, kernels_of
from tests.support.random_cases import cases, check_part, in_parts

from .test_features import problem_of

BF16 = torch.bfloat16
DIMS = ((1, 1), (5, 7), (16, 16), (40, 40), (80, 48), (100, 100), (192, 128), (256, 256))
FINE = (jitattn.LocalStride(16, 2, 3), jitattn.LocalStride(32, 2, 3))
DETERMINISTIC = ("full", "window sinks bias row", "block_lists bias dense")


def targets_of(problem: Problem) -> list[ScoreTarget]:
    """Which kernels the gradients of what is added to scores can need."""
    targets = []
    if problem.bias is not BiasKind.NONE:
        targets += [ScoreTarget.ROW, ScoreTarget.MATRIX]
    if Switch.ON in (problem.relative_bias, problem.alibi):
        targets.append(ScoreTarget.DISTANCE)
    return targets


@pytest.fixture(scope="module")
def compiled(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel all kernels that the random cases can need."""
    specs: dict[Any, None] = {}
    for features, (dtype, dim), (q, kv) in itertools.product(GRAD_FEATURES, KINDS, GRAD_LAYOUTS):
        problem = problem_of(features, dtype, dim, q, kv)
        for rows in RowClass:
            specs |= dict.fromkeys(kernels_of(problem, arch, rows))
        of_rules = {problem: None}
        if problem.mask is MaskKind.BLOCK_LISTS:  # random rules are LocalStride, too
            of_rules |= dict.fromkeys(without_block_lists(problem, rule, arch) for rule in FINE)
        for own, switch in itertools.product(of_rules, (False, True)):
            if not switch or features in DETERMINISTIC:
                specs |= dict.fromkeys(specs_of_backward(own, arch, deterministic=switch))
        specs |= dict.fromkeys(
            score_grad_spec(problem, arch, target) for target in targets_of(problem)
        )
    assert len(specs) <= 250
    for (dtype, dim), groups, access, kind in itertools.product(
        KINDS, (1, 2, 4), Access, (NormSpec, NormGradSpec)
    ):
        spec = kind(dtype=DTYPES[dtype], head_dim=dim, groups=groups, access=access, arch=arch)
        specs[spec] = None
    assert compile_once(list(specs)) == []


@pytest.fixture
def compilations(compiled: None, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Specs compiled after those of `compiled`."""
    found = []

    def noted(spec: Any, *rest: Any) -> Any:
        found.append(spec)
        return compile_spec(spec, *rest)

    compile_spec = build.nvrtc.compile_spec
    monkeypatch.setattr(build.nvrtc, "compile_spec", noted)
    return found


@cases(150)
@given(grad_cases())
def test_random_gradients(compilations: list[Any], case: GradCase) -> None:
    check_gradients(case, "cuda")
    assert compilations == []


@pytest.mark.usefixtures("compiled", "full_grid")
@in_parts
def test_many_random_gradients(part: int) -> None:
    check_part(part, 1500, grad_cases(), lambda case: check_gradients(case, "cuda"))


def tensors(
    dtype: torch.dtype = BF16,
    dim: int = 64,
    dim_v: int | None = None,
    len_q: int = 300,
    len_kv: int = 300,
    heads: tuple[int, int] = (4, 2),
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    sizes = ((len_q, heads[0], dim), (len_kv, heads[1], dim), (len_kv, heads[1], dim_v or dim))
    return [torch.randn(2, *size, generator=generator).to("cuda", dtype) for size in sizes]


def gradients(qkv: list[torch.Tensor], **arguments: Any) -> list[torch.Tensor]:
    own = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = jitattn.attention(*own, **arguments)
    generator = torch.Generator().manual_seed(6)
    d_out = torch.randn(out.shape, generator=generator).to(out)
    return list(torch.autograd.grad(out, own, d_out))


def true_gradients(qkv: list[torch.Tensor], **arguments: Any) -> list[torch.Tensor]:
    own = [x.detach().double().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = jitattn.reference.reference(*own, **arguments)
    generator = torch.Generator().manual_seed(6)
    d_out = torch.randn(out.shape, generator=generator).to(qkv[0])
    return list(torch.autograd.grad(out, own, d_out.double()))


@pytest.fixture(scope="module")
def compiled_dims(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel the kernels of all head dims."""
    specs: dict[Any, None] = {}
    for (dim, dim_v), dtype in itertools.product(DIMS, (BF16, torch.float32)):
        units = (dim | dim_v) * dtype.itemsize
        problem = Problem(
            dtype=DTYPES[dtype],
            out_dtype=DTYPES[dtype],
            head_dim=dim,
            head_dim_v=dim_v,
            mask=MaskKind.CAUSAL,
            numerics=resolve_numerics(None, DTYPES[dtype]),
            access=Access.VEC16 if units % 16 == 0 else Access.ELEMENT,
        )
        specs |= dict.fromkeys(kernels_of(problem, arch, RowClass.MANY))
        specs |= dict.fromkeys(specs_of_backward(problem, arch))
    assert compile_once(list(specs)) == []


@pytest.mark.usefixtures("compiled_dims")
@pytest.mark.parametrize(("dim", "dim_v"), DIMS)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_head_dims(dtype: torch.dtype, dim: int, dim_v: int) -> None:
    qkv = tensors(dtype, dim, dim_v, len_q=150, len_kv=200)
    limit = 6e-3 if dtype is BF16 else 3e-6
    mask = jitattn.Causal()
    for got, true in zip(gradients(qkv, mask=mask), true_gradients(qkv, mask=mask), strict=True):
        assert rel_l2(got, true) < limit


@pytest.mark.parametrize(
    ("rule", "len_q", "len_kv"),
    [
        (jitattn.LocalStride(32, 2, 3), 300, 300),
        (jitattn.LocalStride(16, 3, 4, 1, 1, num_dense_heads=1), 200, 333),
        (jitattn.LocalStride(32, 1, 1), 130, 150),
        (jitattn.LocalStride(16, 2, 5), 330, 130),  # queries before the first key
        (jitattn.LocalStride(32, 3, 2, homo_head=True), 333, 333),
        (jitattn.LocalStride(16, 1, 70), 150, 150),  # a stride beyond the last block
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [BF16, torch.float32], ids=str)
def test_patterns_in_small_blocks(
    rule: jitattn.LocalStride, len_q: int, len_kv: int, dtype: torch.dtype
) -> None:
    qkv = tensors(dtype, len_q=len_q, len_kv=len_kv)
    limit = 6e-3 if dtype is BF16 else 3e-6
    found = gradients(qkv, mask=rule, deterministic=True)
    for got, true in zip(found, true_gradients(qkv, mask=rule), strict=True):
        assert rel_l2(got, true) < limit


@pytest.mark.parametrize("first_row", [0, 37])
def test_lists_of_more_tiles_than_a_block_has_threads(first_row: int) -> None:
    """What lists say is kept for as many query tiles at a time."""
    generator = torch.Generator().manual_seed(7)
    pattern = torch.rand(270, 3, generator=generator) < 0.3
    pattern[::9] = True
    mask = jitattn.BlockSparse(pattern.cuda(), 64, first_row=first_row)
    qkv = [
        torch.randn(1, length, 1, 16, generator=generator).to("cuda", BF16)
        for length in (17000, 150, 150)
    ]
    true = true_gradients(qkv, mask=mask)
    for deterministic in (False, True):
        found = gradients(qkv, mask=mask, deterministic=deterministic)
        for got, wanted in zip(found, true, strict=True):
            assert rel_l2(got, wanted) < 6e-3


@pytest.mark.parametrize("group", [1, 3, 8])
@pytest.mark.real_gpu
def test_dk_and_dv_are_reproducible(group: int) -> None:
    qkv = tensors(len_q=1000, len_kv=1000, heads=(2 * group, 2))
    first = gradients(qkv, mask=jitattn.Causal())
    for _ in range(20):
        again = gradients(qkv, mask=jitattn.Causal())
        assert torch.equal(first[1], again[1])
        assert torch.equal(first[2], again[2])


@pytest.mark.parametrize(
    "mask",
    [
        jitattn.Full(),
        jitattn.Causal(),
        jitattn.Window(100, 0, keep_first=70),
        jitattn.LocalStride(64, 2, 3),
        jitattn.LocalStride(16, 2, 3),
        jitattn.BlockSparse(torch.ones(63, 63).tril().bool(), 16, causal=True),
    ],
    ids=lambda mask: f"{type(mask).__name__}{getattr(mask, 'block_size', '')}",
)
@pytest.mark.real_gpu
def test_deterministic_means_the_same_bits(mask: Any) -> None:
    qkv = tensors(len_q=1000, len_kv=1000)
    mask = on_device(mask, "cuda")
    first = gradients(qkv, mask=mask, deterministic=True)
    for got, true in zip(first, true_gradients(qkv, mask=mask), strict=True):
        assert rel_l2(got, true) < 6e-3
    for _ in range(200):
        again = gradients(qkv, mask=mask, deterministic=True)
        assert all(torch.equal(one, other) for one, other in zip(first, again, strict=True))


def test_gradients_of_keys_that_no_query_sees() -> None:
    """In lists whose tiles begin before the sequence, next to rows that hold NaN."""
    q, k, v = (x[0] for x in tensors(dim=64, len_q=8, len_kv=300))
    q = torch.cat((q, torch.full_like(q, float("nan"))))
    spans = ([8, 0], [0, 8], [0, 203], [203, 97])
    index = [torch.tensor(x, dtype=torch.int32, device="cuda") for x in spans]
    arguments = {
        "mask": jitattn.LocalStride(8, 1, 2, causal=False),
        "q_seqs": jitattn.Ragged(index[0], index[1]),
        "kv_seqs": jitattn.Ragged(index[2], index[3]),
    }
    dq, dk, dv = gradients([q, k, v], **arguments)
    assert not dk[:203].any()
    assert not dv[:203].any()
    assert dv[203:].any()
    assert torch.isfinite(dk).all()
    assert not dq[8:].any()


@pytest.mark.real_gpu
def test_gradients_of_biases_are_reproducible() -> None:
    qkv = tensors()
    made = []
    for _ in range(20):
        bias = torch.ones(1, 1, 300, 300, device="cuda", requires_grad=True)
        slopes = torch.ones(4, device="cuda", requires_grad=True)
        with torch.enable_grad():
            out = jitattn.attention(*qkv, bias=bias, alibi_slopes=slopes)
        made.append(torch.autograd.grad(out, (bias, slopes), torch.ones_like(out)))
    assert all(torch.equal(one[0], made[0][0]) for one in made)
    assert all(torch.equal(one[1], made[0][1]) for one in made)


@pytest.mark.real_gpu
def test_memory_grows_with_the_length_alone() -> None:
    peaks = []
    for length in (4096, 8192, 16384):
        own = [torch.randn(1, length, 4, 64, device="cuda", dtype=BF16) for _ in range(3)]
        own = [x.requires_grad_() for x in own]
        with torch.enable_grad():
            out = jitattn.attention(*own, mask=jitattn.Causal())
        d_out = torch.ones_like(out)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(out, own, d_out)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    # dq, dk, dv; sums of dq in fp32; LSE and delta.
    expected = [4 * length * (64 * (3 * 2 + 4) + 8) for length in (4096, 8192, 16384)]
    for peak, bytes_ in zip(peaks, expected, strict=True):
        assert peak <= 1.05 * bytes_ + 2**21


def test_gradient_through_the_lse_alone() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.enable_grad():
        _, lse = jitattn.attention(q, k, v, return_lse=True)
        own = [x.detach().double().requires_grad_() for x in (q, k, v)]
        _, true = jitattn.reference.reference(*own, return_lse=True)
    ones = torch.ones_like(lse)
    dq, dk, dv = torch.autograd.grad(lse, (q, k, v), ones)
    wanted = torch.autograd.grad(true, own[:2], ones.double())
    assert rel_l2(dq, wanted[0]) < 6e-3
    assert rel_l2(dk, wanted[1]) < 6e-3
    assert not dv.any()


def test_a_gradient_that_is_expanded_or_not_aligned() -> None:
    qkv = tensors()
    own = [x.detach().requires_grad_() for x in qkv]
    with torch.enable_grad():
        out = jitattn.attention(*own)
    expanded = torch.ones((), device="cuda", dtype=BF16).expand(out.shape)
    from_sum = torch.autograd.grad(out, own, expanded, retain_graph=True)
    from_ones = torch.autograd.grad(out, own, torch.ones_like(out), retain_graph=True)
    room = torch.ones(out.numel() + 1, device="cuda", dtype=BF16)
    from_odd = torch.autograd.grad(out, own, room[1:].view(out.shape))
    for one, other, third in zip(from_sum, from_ones, from_odd, strict=True):
        assert rel_l2(one, other) < 1e-3
        assert rel_l2(third, other) < 1e-3


def test_what_has_no_gradient_is_refused_by_name() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    with torch.enable_grad():
        out = jitattn.attention(q, k, v)
        (first,) = torch.autograd.grad(out.sum(), q, create_graph=True)
        with pytest.raises(jitattn.UnsupportedError, match="first derivatives only"):
            torch.autograd.grad(first.sum(), q)
        lengths = torch.tensor([300, 300], dtype=torch.int32, device="cuda")
        flat = k.detach()[0].requires_grad_()
        start = torch.tensor([0, 100], dtype=torch.int32, device="cuda")
        shared = jitattn.Ragged(start, lengths - 100)
        over = jitattn.attention(q, flat, flat, kv_seqs=shared)
        with pytest.raises(jitattn.UnsupportedError, match="overlap"):
            over.sum().backward()
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(q.detach(), torch.ones_like(q))
            with pytest.raises(jitattn.UnsupportedError, match="forward-mode"):
                jitattn.attention(dual, k, v)


def test_writing_to_an_input_before_the_backward_pass_is_noticed() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    bias = torch.zeros(1, 1, 300, 300, device="cuda")
    with torch.enable_grad():
        out = jitattn.attention(q, k, v, bias=bias)
    bias.fill_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(torch.ones_like(out))


@pytest.mark.real_gpu
def test_a_step_can_be_captured() -> None:
    qkv = tensors(len_q=500, len_kv=500)
    own = [x.requires_grad_() for x in qkv]
    jitattn.warmup(*qkv, mask=jitattn.Causal(), gradients=True)
    d_out = torch.ones_like(own[0])

    def step() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = jitattn.attention(*own, mask=jitattn.Causal(), deterministic=True)
        return torch.autograd.grad(out, own, d_out)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = [x.clone() for x in step()]
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=side):
            captured = step()
    for _ in range(3):
        for x in captured:
            x.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(x, y) for x, y in zip(captured, expected, strict=True))


@pytest.mark.real_gpu
def test_zero_compiles_when_only_lengths_change() -> None:
    gradients(tensors(len_q=500, len_kv=500), mask=jitattn.Causal())
    before = build.stats().compiled
    for length in range(300, 400, 7):
        gradients(tensors(len_q=length, len_kv=length + 11), mask=jitattn.Causal())
    assert build.stats().compiled == before


def test_kinds_of_masks_are_enumerated() -> None:
    seen = {features.split()[0] for features in GRAD_FEATURES} | {"fine_stride"}  # in block_lists
    assert seen == {kind.value for kind in MaskKind}
