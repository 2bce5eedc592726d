"""Tests fp32 inputs at fp32 accuracy."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import jitattn
from jitattn.jit import backend
from jitattn.plan import prepare
from jitattn.request import request
from jitattn.run import forward
from jitattn.spec.enums import Dtype
from jitattn.values.gears import GEARS
from tests.support.capture import capture
from tests.support.compare import max_error, rel_l2
from tests.support.inputs import random_qkv


def check_fp32(len_q: int, len_kv: int, head_dim: int, causal: bool) -> None:
    """Compare one call with fp64, and its worst value with that of plain fp32 products."""
    q, k, v = random_qkv(1, len_q, len_kv, 4, head_dim=head_dim, device="cuda", seed=len_q)
    mask = jitattn.Causal() if causal else jitattn.Full()
    out, lse = jitattn.attention(q, k, v, mask=mask, return_lse=True)
    truth, lse_truth = jitattn.reference.reference(q, k, v, mask=mask, return_lse=True)
    visible = torch.ones(len_q, len_kv, dtype=torch.bool, device="cuda")
    if causal:
        visible = visible.tril(len_kv - len_q)
    assert not torch.backends.cuda.matmul.allow_tf32
    with sdpa_kernel(SDPBackend.MATH):
        math_out = torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=visible
        ).transpose(1, 2)
    assert rel_l2(out, truth) <= 2e-6
    assert max_error(out, truth) <= 4 * max_error(math_out, truth)
    assert max_error(lse, lse_truth) <= 1e-5


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize(("len_q", "len_kv"), [(512, 4096), (8, 4096), (40, 1000)])
@pytest.mark.parametrize("causal", [False, True])
def test_as_accurate_as_fp32_products(head_dim: int, len_q: int, len_kv: int, causal: bool) -> None:
    check_fp32(len_q, len_kv, head_dim, causal)


@pytest.mark.parametrize("head_dim", [33, 80])  # one element at a time; no power of two
def test_other_head_dims(head_dim: int) -> None:
    check_fp32(512, 4096, head_dim, causal=True)


@pytest.mark.real_gpu
@pytest.mark.parametrize("causal", [False, True])
def test_long_queries(causal: bool) -> None:
    check_fp32(4096, 4096, 128, causal)


@pytest.fixture
def _small_calls_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(prepare, "LEAST_PRODUCTS", 1)


split_fp32 = pytest.mark.usefixtures("_small_calls_too")
SPLIT_FP32 = {
    "full": {},
    "causal": {"mask": jitattn.Causal()},
    "top left": {"mask": jitattn.Causal("top_left")},
    "window": {"mask": jitattn.Window(50, 0, keep_first=3)},
    "stride": {"mask": jitattn.LocalStride(64, 1, 3)},
    "splits": {"num_splits": 3},
    "scale": {"scale": 0.3},
}


@pytest.mark.parametrize("name", list(SPLIT_FP32))
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (80, 80), (128, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("gear", [2, 3])
@split_fp32
def test_long_queries_as_fp16_parts(
    gear: int, dims: tuple[int, int], heads: tuple[int, int], name: str, arch: str
) -> None:
    q, k, v = random_qkv(1, 200, 333, *heads, head_dim=dims[0], head_dim_v=dims[1], device="cuda")
    if arch == "sm_90" and heads == (2, 2) and backend.active.encodes_maps():
        kernel = jitattn.explain(q, k, v, **SPLIT_FP32[name], gear=gear).kernel
        assert kernel["family"] == "fwd_sm90"
    _check_parts(gear, dims, heads, SPLIT_FP32[name])


@pytest.mark.parametrize("name", list(SPLIT_FP32))
@pytest.mark.parametrize("dims", [(16, 16), (64, 64), (128, 128)], ids=str)
@split_fp32
def test_fp16_parts_on_mma_sync(
    dims: tuple[int, int], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_FAMILY", "sm80")
    forward.forget_kernels()
    _check_parts(2, dims, (6, 2), SPLIT_FP32[name])
    monkeypatch.undo()
    forward.forget_kernels()


def _check_parts(
    gear: int, dims: tuple[int, int], heads: tuple[int, int], features: dict[str, Any]
) -> None:
    given = {**features, "gear": gear}
    promise = GEARS[gear].rel_l2[Dtype.FP32]
    for len_q, len_kv in ((200, 333), (135, 1100), (300, 100)):
        q, k, v = random_qkv(
            2,
            len_q,
            len_kv,
            *heads,
            head_dim=dims[0],
            head_dim_v=dims[1],
            device="cuda",
            seed=len_q,
        )
        numerics = "f16x3" if gear == 2 else "f16x1"
        assert jitattn.explain(q, k, v, **given).kernel["numerics"] == numerics
        out, lse = jitattn.attention(q, k, v, return_lse=True, **given)
        exact = {name: given[name] for name in given.keys() & {"mask", "scale"}}
        truth, lse_truth = jitattn.reference.reference(q, k, v, return_lse=True, **exact)
        assert rel_l2(out, truth) <= promise
        # Errors of scores grow with the scores.
        spread = max(1.0, given.get("scale", 0.0) * dims[0] ** 0.5)
        assert max_error(lse, lse_truth) <= (5e-6 if gear == 2 else 2.5e-3) * spread
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        assert torch.equal(jitattn.attention(*turned, layout="bhsd", **given).transpose(1, 2), out)


@pytest.mark.parametrize("factor", [1e-30, 1e-6, 1e6, 1e15])
@pytest.mark.parametrize("gear", [2, 3])
@split_fp32
def test_fp16_parts_of_numbers_of_any_size(gear: int, factor: float) -> None:
    promise = GEARS[gear].rel_l2[Dtype.FP32]
    q, k, v = random_qkv(1, 200, 500, 2, head_dim=64, device="cuda", seed=3)
    out = jitattn.attention(q * factor, k / factor, v * factor, gear=gear)
    truth = jitattn.reference.reference(q, k, v) * factor
    assert rel_l2(out, truth) <= 1.5 * promise
    spread = v * torch.exp(3 * torch.randn(500, 1, 1, device="cuda"))
    truth = jitattn.reference.reference(q, k, spread)
    assert rel_l2(jitattn.attention(q, k, spread, gear=gear), truth) <= promise
    q[:, 5], k[:, 7], v[:, 9] = 0.0, 0.0, 0.0
    truth = jitattn.reference.reference(q, k, v)
    assert rel_l2(jitattn.attention(q, k, v, gear=gear), truth) <= promise
    zeros = torch.zeros_like(v)
    assert not jitattn.attention(q, k, zeros, gear=gear).any()


@pytest.mark.parametrize("bad", [float("inf"), float("nan"), 1e30])
@pytest.mark.parametrize("gear", [2, 3])
@split_fp32
def test_what_a_row_does_not_see_is_nothing_to_it(gear: int, bad: float) -> None:
    q, k, v = random_qkv(1, 384, 384, 2, head_dim=64, device="cuda", seed=5)
    k[:, 200:], v[:, 200:] = bad, bad
    mask = jitattn.Causal()
    out = jitattn.attention(q, k, v, mask=mask, gear=gear)[:, :128]
    truth = jitattn.reference.reference(q[:, :128], k[:, :128], v[:, :128], mask=mask)
    assert rel_l2(out, truth) <= GEARS[gear].rel_l2[Dtype.FP32]


@split_fp32
@pytest.mark.parametrize("scale", [None, 0.0])
def test_fp16_parts_of_a_block_of_zeros(scale: float | None) -> None:
    """Scales whose product is below every float, in a block with hidden keys."""
    q, k, v = random_qkv(1, 300, 300, 2, head_dim=64, device="cuda", seed=7)
    k[:, 256:] = 0.0
    q[:, :5] = 0.0
    given = {"mask": jitattn.Causal(), "scale": scale}
    truth = jitattn.reference.reference(q, k, v, **given)
    assert rel_l2(jitattn.attention(q, k, v, **given), truth) <= 2e-6


@split_fp32
def test_fp16_parts_of_keys_with_very_different_values() -> None:
    """Scales are of 64 keys: what large values lie beside keeps 2^-38 of them, the others all."""
    q, k, v = random_qkv(1, 256, 256, 2, head_dim=64, device="cuda", seed=6)
    v[:, 128:] *= 1e12
    out = jitattn.attention(q, k, v, mask=jitattn.Causal())[:, :128]
    truth = jitattn.reference.reference(q, k, v, mask=jitattn.Causal())[:, :128]
    assert rel_l2(out, truth) <= 2e-6


@pytest.mark.parametrize("scale", [8.0, 60.0])
@split_fp32
def test_fp16_parts_of_cosine_attention(scale: float) -> None:
    """Most weights are far below the bound of the scores."""
    q, k, v = random_qkv(2, 200, 300, 4, 2, head_dim=64, device="cuda", seed=9)
    given = {"qk_norm": jitattn.L2Norm(), "scale": scale, "mask": jitattn.Causal()}
    assert jitattn.explain(q, k, v, **given).kernel["numerics"] == "f16x3"
    out, lse = jitattn.attention(q, k, v, return_lse=True, **given)
    truth, lse_truth = jitattn.reference.reference(q, k, v, return_lse=True, **given)
    assert rel_l2(out, truth) <= 3e-6
    assert max_error(lse, lse_truth) <= 5e-6 * max(1.0, scale / 8)  # of a score's deviation


@pytest.mark.parametrize("garbage", [1e38, float("nan")])
@pytest.mark.parametrize("gear", [2, 3])
@split_fp32
def test_fp16_parts_of_padded_keys(gear: int, garbage: float) -> None:
    """What hidden keys hold is nothing to the others."""
    q, k, v = random_qkv(2, 200, 300, 4, 2, head_dim=64, device="cuda", seed=11)
    keep = torch.arange(300, device="cuda") < torch.tensor([[237], [70]], device="cuda")
    keep[0, 20:29] = False
    for mask in (jitattn.KeyPadding(keep), jitattn.Causal() & jitattn.KeyPadding(keep)):
        truth, lse_truth = jitattn.reference.reference(q, k, v, mask=mask, return_lse=True)
        hidden = (~keep)[..., None, None]
        bad = k.masked_fill(hidden, garbage), v.masked_fill(hidden, -garbage)
        numerics = "f16x3" if gear == 2 else "f16x1"
        assert jitattn.explain(q, *bad, mask=mask, gear=gear).kernel["numerics"] == numerics
        out, lse = jitattn.attention(q, *bad, mask=mask, gear=gear, return_lse=True)
        assert rel_l2(out, truth) <= GEARS[gear].rel_l2[Dtype.FP32]
        seen = lse_truth.isfinite()
        assert torch.equal(lse.isfinite(), seen)
        assert max_error(lse[seen], lse_truth[seen]) <= (5e-6 if gear == 2 else 2.5e-3)


@split_fp32
def test_batch_does_not_change_bits_of_fp16_parts() -> None:
    q, k, v = random_qkv(3, 200, 300, 4, 2, head_dim=64, device="cuda", seed=10)
    together = jitattn.attention(q, k, v, num_splits=2)
    for index in range(3):
        one = slice(index, index + 1)
        alone = jitattn.attention(q[one], k[one], v[one], num_splits=2)
        assert torch.equal(alone, together[one])


@pytest.mark.real_gpu
@split_fp32
def test_fp16_parts_can_be_captured() -> None:
    qkv = random_qkv(1, 200, 300, 2, head_dim=64, device="cuda", seed=4)
    jitattn.warmup(*qkv)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = jitattn.attention(*qkv)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=side):
            captured = jitattn.attention(*qkv)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
