"""Tests random combinations of masks and score modifications on a GPU, without recompiling."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given

import jitattn
from jitattn.jit import build
from jitattn.kernels.norm import NormSpec
from jitattn.spec.enums import Access, BiasKind, MaskKind, RowClass, SeqLayout, Staging, Switch
from jitattn.spec.kernel_spec import Problem
from jitattn.values.gears import resolve_numerics
from jitattn.values.tensors import DTYPES
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.features import (
    FEATURES,
    KINDS,
    LAYOUTS,
    FeatureCase,
    check_features,
    feature_cases,
)
from tests.support.patterns import on_device
from tests.support.precompile import CompileOnce, kernels_of
from tests.support.random_cases import cases, check_part, in_parts

BF16 = torch.bfloat16


def problem_of(features: str, dtype: torch.dtype, dim: int, q: str, kv: str) -> Problem:
    words = features.split()

    def on(word: str) -> Switch:
        return Switch.ON if word in words else Switch.OFF

    staging = Staging.MATRIX if "staged" in words else Staging.OFF
    if "row" in words:
        staging = Staging.ROW
    return Problem(
        dtype=DTYPES[dtype],
        out_dtype=DTYPES[dtype],
        head_dim=dim,
        head_dim_v=dim,
        mask=MaskKind(words[0]),
        numerics=resolve_numerics(None, DTYPES[dtype]),
        q_layout=SeqLayout(q),
        kv_layout=SeqLayout.PAGED16 if kv == "paged" else SeqLayout(kv),
        access=Access.VEC16 if dim * 2 % 16 == 0 else Access.ELEMENT,
        bias=BiasKind.SAME
        if "bias" in words
        else BiasKind.FP32
        if "bias32" in words
        else BiasKind.NONE,
        relative_bias=on("relative"),
        alibi=on("alibi"),
        softcap=on("softcap"),
        sinks=on("sinks"),
        key_padding=on("padding"),
        dense=on("dense"),
        dropout=on("dropout"),
        fixed_shift=on("cosine"),
        bias_staged=staging if {"bias", "bias32"} & set(words) else Staging.OFF,
        dense_staged=staging if "dense" in words else Staging.OFF,
    )


@pytest.fixture(scope="module", autouse=True)
def _compiled(arch: str, compile_once: CompileOnce) -> None:
    """Compile in parallel all kernels that the random cases can need."""
    specs = [
        spec
        for features, (dtype, dim), (q, kv), rows in itertools.product(
            FEATURES, KINDS, LAYOUTS, RowClass
        )
        if "cosine" not in features or kv != "paged"
        for spec in kernels_of(problem_of(features, dtype, dim, q, kv), arch, rows)
    ]
    assert len(specs) <= 320
    norms = [
        NormSpec(dtype=DTYPES[dtype], head_dim=dim, groups=groups, access=access, arch=arch)
        for (dtype, dim), groups, access in itertools.product(KINDS, (1, 2, 4), Access)
    ]
    assert compile_once([*specs, *norms]) == []


@cases(150)
@given(feature_cases())
def test_random_features(case: FeatureCase) -> None:
    compiled = build.stats().compiled
    check_features(case, "cuda")
    assert build.stats().compiled == compiled


@pytest.mark.usefixtures("full_grid")
@in_parts
def test_many_random_features(part: int) -> None:
    check_part(part, 2000, feature_cases(), lambda case: check_features(case, "cuda"))


@pytest.mark.parametrize("length", [1, 1000, 3000])
@pytest.mark.parametrize("keep_first", [0, 4])
def test_windows_of_long_sequences(length: int, keep_first: int) -> None:
    """Blocks left out between the first keys and the window, with and without splits."""
    q = torch.randn(2, length, 8, 64, device="cuda", dtype=BF16)
    k, v = torch.randn(2, 2, 3000, 2, 64, device="cuda", dtype=BF16)
    window = jitattn.Window(700, 0, keep_first)
    truth = jitattn.reference.reference(q.cpu(), k.cpu(), v.cpu(), mask=window)
    for num_splits in (None, 1, 5):
        out = jitattn.attention(q, k, v, mask=window, num_splits=num_splits)
        assert rel_l2(out.cpu(), truth) < 5e-3


@pytest.mark.parametrize("length", [1, 700, 2000])
@pytest.mark.parametrize(
    "pattern",
    [
        jitattn.LocalStride(64, 4, 8),
        jitattn.LocalStride(64, 2, 3, head_step=2, head_offset=1, num_dense_heads=1),
        jitattn.LocalStride(128, 1, 5, homo_head=True),
    ],
    ids=str,
)
def test_patterns_of_long_sequences(pattern: jitattn.LocalStride, length: int) -> None:
    """Blocks nearby and blocks on the stride, with and without splits."""
    q = torch.randn(1, length, 8, 64, device="cuda", dtype=BF16)
    k, v = torch.randn(2, 1, 2000, 4, 64, device="cuda", dtype=BF16)
    truth = jitattn.reference.reference(q.cpu(), k.cpu(), v.cpu(), mask=pattern)
    for num_splits in (None, 1, 5):
        out = jitattn.attention(q, k, v, mask=pattern, num_splits=num_splits)
        assert rel_l2(out.cpu(), truth) < 5e-3


@pytest.mark.parametrize("length", [1, 64, 700, 2000])
@pytest.mark.parametrize("name", ["stride16", "stride32", "both_sides", "random", "heads"])
def test_listed_patterns_of_long_sequences(name: str, length: int) -> None:
    """Lists over many blocks, with tiles that begin before the first query."""
    q = torch.randn(1, length, 8, 64, device="cuda", dtype=BF16)
    k, v = torch.randn(2, 1, 2000, 4, 64, device="cuda", dtype=BF16)
    generator = torch.Generator().manual_seed(1)
    blocks = torch.rand(8, 63, 63, generator=generator) < 0.2
    rule = {
        "stride16": jitattn.LocalStride(16, 8, 8),
        "stride32": jitattn.LocalStride(32, 4, 5, head_step=2, head_offset=1, num_dense_heads=1),
        "both_sides": jitattn.LocalStride(64, (2, 3), 4, causal=False),
        "random": jitattn.BlockSparse(blocks, 32, causal=True),
        "heads": jitattn.PerHead(
            [
                jitattn.Causal(),
                jitattn.Window(100, 0, 4),
                jitattn.LocalStride(16, 4, 8),
                jitattn.BlockSparse(blocks[0], 32),
            ]
        ),
    }[name]
    truth = jitattn.reference.reference(q.cpu(), k.cpu(), v.cpu(), mask=rule)
    for num_splits in (None, 1, 5):
        out = jitattn.attention(q, k, v, mask=on_device(rule, "cuda"), num_splits=num_splits)
        assert rel_l2(out.cpu(), truth) < 5e-3


@pytest.mark.real_gpu
def test_lists_in_a_graph_need_a_call_before() -> None:
    q, k, v = torch.randn(3, 1, 300, 4, 64, device="cuda", dtype=BF16)
    rule = jitattn.BlockSparse(torch.rand(10, 10, device="cuda") < 0.5, 32)
    jitattn.warmup(q, k, v, mask=rule)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        q.mul(2)  # an empty graph is warned of
        with pytest.raises(jitattn.LaunchError, match="make one call"):
            jitattn.attention(q, k, v, mask=rule)
    eager = jitattn.attention(q, k, v, mask=rule)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, mask=rule)
    graph.replay()
    assert torch.equal(out, eager)


@pytest.mark.real_gpu
def test_nothing_compiles_when_reaches_and_values_change() -> None:
    q, k, v = torch.randn(3, 1, 300, 4, 64, device="cuda", dtype=BF16)
    jitattn.warmup(q, k, v, mask=jitattn.Window(5, 5), softcap=3.0)
    compiled = build.stats().compiled
    for step in range(60):
        window = jitattn.Window(step * 3, step % 4 or None, step % 7, step % 2 == 0)
        rows = slice(0, 1 + step * 5)
        jitattn.attention(q[:, rows], k, v, mask=window, softcap=1.0 + step)
    assert build.stats().compiled == compiled


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
@pytest.mark.parametrize("lowest", [float("-inf"), -1e9, None])
@pytest.mark.parametrize("room", [0, 1])
def test_the_lowest_biases_hide(dtype: torch.dtype, lowest: float | None, room: int) -> None:
    """Rows of nothing else are 0, never NaN; with and without shared memory on the way."""
    q, k, v = torch.randn(3, 1, 40, 2, 64, device="cuda", dtype=BF16)
    lowest = torch.finfo(dtype).min if lowest is None else lowest
    bias = torch.zeros(1, 1, 40, 48, device="cuda", dtype=dtype)[..., room : 40 + room]
    bias[:, :, 0] = lowest
    bias[:, :, 1:, :7] = lowest
    out, lse = jitattn.attention(q, k, v, bias=bias, return_lse=True)
    assert torch.equal(out[:, 0], torch.zeros_like(out[:, 0]))
    assert torch.isneginf(lse[:, :, 0]).all()
    truth = jitattn.attention(q, k[:, 7:], v[:, 7:])
    assert rel_l2(out[:, 1:], truth[:, 1:]) < 5e-3
    alike = torch.full((1, 1, 1, 40), lowest, device="cuda", dtype=dtype)
    assert torch.equal(jitattn.attention(q, k, v, bias=alike), torch.zeros_like(q))


@pytest.mark.parametrize("shape", [(1, 1, 1, 190), (2, 4, 130, 190)], ids=str)
def test_a_bias_whose_last_row_ends_within_16_bytes(shape: tuple[int, ...]) -> None:
    """No copy reads past the end of its memory, or names what is there (memcheck)."""
    generator = torch.Generator().manual_seed(3)
    q, k, v = (
        torch.randn(2, length, 4, 64, generator=generator).to("cuda") for length in (130, 190, 190)
    )
    last = torch.randn(1, 1, 1, 190, generator=generator).to("cuda")
    bias = last.expand(shape)
    out = jitattn.attention(q, k, v, bias=bias)
    truth = jitattn.reference.reference(q, k, v, bias=bias)
    assert rel_l2(out, truth) < 2e-6
    padded = torch.zeros(1, 1, 1, 192, device="cuda")[..., :190].copy_(last).expand(shape)
    assert rel_l2(jitattn.attention(q, k, v, bias=padded), truth) < 2e-6
