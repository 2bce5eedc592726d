"""Tests gear 4 on a GPU: INT8 q and k, with values, keys and scores of any magnitude."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from jitattn.spec.enums import Numerics
from jitattn.spec.kernel_spec import arch_number
from jitattn.values.gears import GEARS
from jitattn.values.tensors import DTYPES
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.gears import MASKS, check, tensors

# On wgmma, gear 4 is computed as gear 3.
pytestmark = pytest.mark.usefixtures("mma_family")


@pytest.mark.parametrize("name", ["full", "causal", "window", "stride", "splits"])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
@pytest.mark.parametrize("dim", [128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits(dtype: torch.dtype, dim: int, heads: tuple[int, int], name: str) -> None:
    """With a mean in every channel of K, which the softmax does not see and the LSE does."""
    given = MASKS[name]
    for len_q, len_kv in ((200, 333), (70, 1100)):
        q, k, v = tensors(dtype, len_q, len_kv, heads, dim)
        k = k + torch.linspace(-3, 3, dim, device="cuda", dtype=dtype)
        kernel = jitattn.explain(q, k, v, gear=4, **given).kernel
        assert kernel["numerics"] == Numerics.INT8_F16
        check([q, k, v], 4, factor=1.0, **given)
        turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
        again = jitattn.attention(*turned, gear=4, layout="bhsd", **given)
        one = jitattn.attention(q, k, v, gear=4, **given)
        assert torch.equal(again.transpose(1, 2), one)


@pytest.mark.parametrize("name", ["full", "causal", "splits", "long window"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_two_level_accumulators(dtype: torch.dtype, name: str) -> None:
    """Maxima that rise late, and values that do not cancel: sums that outgrow what is added."""
    masks = {**MASKS, "long window": {"mask": jitattn.Window(2500, 0, keep_first=1100)}}
    q, k, v = tensors(dtype, 150, 5000, (1, 1), 128)
    k[:, 700:720] *= 2.0
    for values in (v, v / 8 + 1.0):
        check([q, k, values], 4, factor=1.0, **masks[name])


SIZES = {torch.float16: (1e-6, 1e-4, 100.0, 14000.0), torch.bfloat16: (1e-35, 1e-20, 1e20, 7e37)}


@pytest.mark.parametrize(
    ("dtype", "size"), [(dtype, size) for dtype, sizes in SIZES.items() for size in sizes], ids=str
)
def test_8_bits_with_values_of_any_size(dtype: torch.dtype, size: float) -> None:
    q, k, v = tensors(dtype, 200, 1500, (2, 2), 128)
    v = (v.clamp(-4.5, 4.5).float() * size).to(dtype)
    check([q, k, v], 4, factor=1.0)
    check([q, k, v.abs()], 4, factor=1.0)  # all that can add up does


@pytest.mark.parametrize("size", [4.5, 13500.0])
@pytest.mark.parametrize("nats", [9.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_a_key_that_outweighs_others(
    dtype: torch.dtype, nats: float, size: float
) -> None:
    """And has nothing to give: what is left of the weights of all others decides."""
    q, k, v = tensors(dtype, 130, 1500, (1, 1), 128)
    q[..., 0], k[..., 0] = 8.0, 0.0
    k[:, 0, :, 0] = nats * 128**0.5 / 8.0
    v = (v.clamp(-4.5, 4.5).float() * (size / 4.5)).to(dtype)
    v[:, 0] = 0.0
    out = jitattn.attention(q, k, v, gear=4, out_dtype=torch.float32)
    # 8 bits of k are for that key, too: with sums in fp32, the error is 0.03 to 0.04.
    assert rel_l2(out, jitattn.reference.reference(q, k, v)) < 0.05


@pytest.mark.parametrize("scale", [1e3, 1e4, 3e4, 1e5, 1e6])
@pytest.mark.parametrize("size", [1e-5, 1.0, 3000.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_scores_of_any_size(dtype: torch.dtype, size: float, scale: float) -> None:
    """Whatever 8 bits make of them, weights are weights, and add up to 1."""
    q, k, v = tensors(dtype, 130, 300, (2, 2), 128)
    v = (v.abs() + 0.5).float() * size
    out, lse = jitattn.attention(q, k, v.to(dtype), gear=4, scale=scale, return_lse=True)
    assert (out <= v.max() * 1.01).all()
    assert (out >= v.min() * 0.99).all()
    _, truth = jitattn.reference.reference(q, k, v, scale=scale, return_lse=True)
    assert ((lse - truth).abs() <= 0.6 * scale).all()  # 8 bits put q k off by 0.1, mostly


def test_8_bits_with_values_at_the_end_of_bf16() -> None:
    """Where the scale of values and the sum of weights together are no number of fp32."""
    q, k, v = tensors(torch.bfloat16, 3000, 3000, (1, 1), 128)
    v = torch.full_like(v, 1.2 * 2.0**126)
    v[..., 1] = 0.0
    for scale in (2.0, 10.0):
        out = jitattn.attention(q, k, v, gear=4, mask=jitattn.Window(0, 0), scale=scale)
        assert rel_l2(out.float() / 2.0**126, v.float() / 2.0**126) < 1e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_8_bits_with_values_that_stand_out(dtype: torch.dtype) -> None:
    """Beside them, others keep their bits; infinities and NaN count for nothing."""
    q, k, v = tensors(dtype, 200, 1500, (2, 2), 128)
    v[..., ::32] *= 300.0
    out = check([q, k, v], 4, factor=1.0)
    truth = jitattn.reference.reference(q, k, v)
    quiet = torch.arange(128, device="cuda") % 32 != 0
    assert rel_l2(out[..., quiet], truth[..., quiet]) < GEARS[4].rel_l2[DTYPES[dtype]]
    q, k, v = (x[:, :200] for x in (q, k, v.clone()))
    one = jitattn.attention(q, k, v, mask=jitattn.Causal(), gear=4)
    v[:, 198, 0], v[:, 199, 1] = torch.inf, torch.nan
    other = jitattn.attention(q, k, v, mask=jitattn.Causal(), gear=4)
    assert torch.equal(one[:, :128], other[:, :128])  # rows of a tile that does not see these keys
    assert not other[:, 199].isfinite().any()


def test_8_bits_with_channels_that_stand_out() -> None:
    q, k, v = tensors(torch.float16, 300, 2000, (2, 2), 128)
    k[..., ::32] *= 20.0
    q[..., ::32] /= 20.0
    q[..., 5], k[..., 7] = 0.0, 0.0
    check([q, k, v], 4, factor=1.0)
    rows = torch.zeros_like(q)
    check([rows, k, v], 4, factor=1.0)
    blind = jitattn.attention(q, k[:, :100], v[:, :100], mask=jitattn.Causal(), gear=4)
    assert not blind[:, :200].any()


@pytest.mark.parametrize("scale", [None, 0.0])
def test_8_bits_of_nothing(scale: float | None) -> None:
    """Rows of zeros, and keys that are their mean: scales whose product is below every float."""
    q, k, v = tensors(torch.float16, 200, 200, (2, 2), 128)
    k = torch.ones_like(k)
    for own_q in (q, torch.zeros_like(q)):
        check([own_q, k, v], 4, factor=1.0, mask=jitattn.Causal(), scale=scale)


@pytest.mark.parametrize(
    ("given", "dim", "len_q"),
    [
        ({"softcap": 2.0}, 128, 200),
        ({"sinks": torch.zeros(2)}, 128, 200),
        ({"scale": -0.1}, 128, 200),
        ({"mask": jitattn.LocalStride(16, 2, 3)}, 128, 200),
        ({}, 128, 64),
        ({}, 80, 200),
    ],
    ids=str,
)
def test_what_8_bits_do_not_serve_is_as_with_gear_3(
    given: dict[str, Any], dim: int, len_q: int
) -> None:
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in given.items()}
    qkv = tensors(torch.bfloat16, len_q, 300, (2, 2), dim)
    assert jitattn.explain(*qkv, gear=4, **given).kernel["numerics"] == Numerics.F32_ACC
    one, other = (jitattn.attention(*qkv, gear=gear, **given) for gear in (3, 4))
    assert torch.equal(one, other)


@pytest.mark.parametrize(("dim", "least_arch"), [(32, 90), (64, 999)])
def test_small_head_dims_have_8_bits_where_that_pays(arch: str, dim: int, least_arch: int) -> None:
    """`least_arch`: from there on, it does not."""
    qkv = tensors(torch.bfloat16, 200, 300, (2, 2), dim)
    expected = Numerics.F32_ACC if arch_number(arch) >= least_arch else Numerics.INT8_F16
    assert jitattn.explain(*qkv, gear=4).kernel["numerics"] == expected
    check(qkv, 4, factor=1.0)


@pytest.mark.real_gpu
def test_8_bits_can_be_captured() -> None:
    qkv = tensors(torch.float16, 200, 300, (4, 2), 128)
    jitattn.warmup(*qkv, gear=4)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        expected = jitattn.attention(*qkv, gear=4)
        side.synchronize()
        graph = torch.cuda.CUDAGraph()
        with capture(graph, stream=side):
            captured = jitattn.attention(*qkv, gear=4)
    for _ in range(3):
        captured.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(captured, expected)
