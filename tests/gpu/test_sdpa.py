"""Tests SDPA with jitattn under it, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from jitattn.integrations import sdpa
from tests.support.compare import rel_l2

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
#: Against fp64 of the same inputs; of gradients twice that.
LIMIT = {FP16: 2e-3, BF16: 1.2e-2, FP32: 3e-6}
pytestmark = [
    pytest.mark.real_gpu,
    pytest.mark.usefixtures("with_grad"),
    pytest.mark.skipif(
        not hasattr(torch.nn.attention, "register_flash_attention_impl"), reason="needs torch 2.11"
    ),
]


def drawn(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device="cuda", dtype=dtype).requires_grad_()


@pytest.fixture
def _under_sdpa() -> Iterator[None]:
    with sdpa.activated():
        yield


def exact(qkv: list[Tensor], **given: Any) -> tuple[Tensor, list[Tensor]]:
    """Out and gradients in fp64."""
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    mask = given.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        given["attn_mask"] = mask.detach().double().requires_grad_()
        leaves.append(given["attn_mask"])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = nn.functional.scaled_dot_product_attention(*leaves[:3], **given)
    return out, list(torch.autograd.grad(out.sin().sum(), leaves))


@pytest.mark.usefixtures("_under_sdpa")
@pytest.mark.parametrize("dtype", [FP16, BF16, FP32], ids=str)
@pytest.mark.parametrize(
    "name", ["full", "causal", "grouped", "of keys", "bias", "bool", "by head", "other lengths"]
)
def test_sdpa(name: str, dtype: torch.dtype) -> None:
    """Ours serves both passes of every kind of call that reaches the two slots."""
    len_kv = 190 if name == "other lengths" else 129
    layout = (2, len_kv, 4, 64)
    q = drawn(2, 129, 4, 64, dtype=dtype).transpose(1, 2)
    heads = 2 if name == "grouped" and dtype is not FP32 else 4
    k, v = (drawn(*layout[:2], heads, 64, dtype=dtype).transpose(1, 2) for _ in range(2))
    given: dict[str, Any] = {"is_causal": name == "causal"}
    if heads == 2:
        given["enable_gqa"] = True
    if name == "of keys":
        given["attn_mask"] = torch.rand(2, 1, 1, len_kv, device="cuda") > 0.3
    if name == "bool":
        given["attn_mask"] = torch.rand(129, len_kv, device="cuda") > 0.3
    if name == "bias":
        given["attn_mask"] = drawn(2, 4, 129, len_kv, dtype=dtype)
    if name == "by head":
        given["attn_mask"] = drawn(1, 4, 129, len_kv, dtype=dtype)
    inputs = [q, k, v]
    if name in ("bias", "by head"):
        inputs.append(given["attn_mask"])
    backends = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel([backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION]):
        out = nn.functional.scaled_dot_product_attention(q, k, v, **given)
        found = torch.autograd.grad(out.sin().sum(), inputs)
    assert sdpa.counts() == {
        "jitattn": 1, "torch": 0, "jitattn_backward": 1, "torch_backward": 0
    }  # fmt: skip
    truth, gradients = exact([q, k, v], **given)
    assert rel_l2(out, truth) < LIMIT[dtype]
    for one, other in zip(found, gradients, strict=True):
        assert one.dtype == dtype
        assert rel_l2(one, other) < 2 * LIMIT[dtype]


@pytest.mark.usefixtures("_under_sdpa")
def test_dropout_and_checkpoints() -> None:
    """Reproducible by the seed, and when computed again; the mean is right."""
    q, k, v = (drawn(1, 2, 256, 64, dtype=BF16) for _ in range(3))

    def attend(*qkv: Tensor) -> Tensor:
        out: Tensor = nn.functional.scaled_dot_product_attention(*qkv, dropout_p=0.5)
        return out

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        found = []
        for run in (attend, attend, lambda *x: checkpoint(attend, *x, use_reentrant=False)):
            torch.manual_seed(1)
            out = run(q, k, v)
            found.append((out, *torch.autograd.grad(out.float().sin().sum(), (q, k, v))))
        for one in found[1:]:
            assert torch.equal(one[0], found[0][0])
            assert all(rel_l2(x, y) < 1e-3 for x, y in zip(one, found[0], strict=True))
        mean = torch.stack([attend(q, k, v).float() for _ in range(200)]).mean(0)
    assert rel_l2(mean, exact([q, k, v])[0]) < 0.15
    assert sdpa.counts()["torch"] == 0


@pytest.mark.usefixtures("_under_sdpa")
def test_varlen() -> None:
    from torch.nn.attention.varlen import varlen_attn

    stops = torch.tensor([0, 100, 100, 333], dtype=torch.int32, device="cuda")
    q, k, v = (drawn(333, 4, 64, dtype=BF16) for _ in range(3))
    out = varlen_attn(q, k, v, stops, stops, 233, 233)
    found = torch.autograd.grad(out.float().sin().sum(), (q, k, v))
    for start, stop in ((0, 100), (100, 333)):
        turned = [x[None, start:stop].transpose(1, 2) for x in (q, k, v)]
        truth, gradients = exact(turned)
        assert rel_l2(out[None, start:stop].transpose(1, 2), truth) < LIMIT[BF16]
        for one, other in zip(found, gradients, strict=True):
            assert rel_l2(one[None, start:stop].transpose(1, 2), other) < 2 * LIMIT[BF16]
    assert sdpa.counts()["jitattn"] == sdpa.counts()["jitattn_backward"] == 1


@pytest.mark.usefixtures("_under_sdpa")
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("is_padded", [False, True])
def test_untouched_modules(is_padded: bool, is_compiled: bool) -> None:
    """An encoder in training: equal results and gradients, all of them by our kernels."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(128, 4, 256, dropout=0.0, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda().to(BF16).train()
    x = drawn(2, 128, 128, dtype=BF16)
    padding = None
    if is_padded:
        padding = torch.zeros(2, 128, dtype=torch.bool, device="cuda")
        padding[1, 90:] = True
    run = torch.compile(model) if is_compiled else model
    backends = torch.nn.attention.SDPBackend
    with torch.nn.attention.sdpa_kernel([backends.FLASH_ATTENTION, backends.EFFICIENT_ATTENTION]):
        out = run(x, src_key_padding_mask=padding)
        (found,) = torch.autograd.grad(out.float().sin().sum(), x)
    assert sdpa.counts() == {
        "jitattn": 2, "torch": 0, "jitattn_backward": 2, "torch_backward": 0
    }  # fmt: skip
    exact_model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).cuda()
    exact_model.load_state_dict(model.state_dict())
    wide = x.detach().double().requires_grad_()
    with torch.nn.attention.sdpa_kernel(backends.MATH):
        truth = exact_model.double()(wide, src_key_padding_mask=padding)
        (gradient,) = torch.autograd.grad(truth.sin().sum(), wide)
    keep = slice(None) if padding is None else ~padding
    assert rel_l2(out[keep], truth[keep]) < 2e-2
    assert rel_l2(found[keep], gradient[keep]) < 4e-2


def test_activation_ends() -> None:
    from torch.nn import attention

    q, k, v = (drawn(1, 2, 64, 64, dtype=BF16) for _ in range(3))
    before = attention.current_flash_attention_impl()
    with sdpa.activated():
        assert attention.current_flash_attention_impl() == "JITATTN"
    assert attention.current_flash_attention_impl() == before
    sdpa.counts(reset=True)
    with attention.sdpa_kernel(attention.SDPBackend.FLASH_ATTENTION):
        nn.functional.scaled_dot_product_attention(q, k, v)
    assert sdpa.counts()["jitattn"] == 0


@pytest.mark.usefixtures("_under_sdpa")
def test_captured() -> None:
    q, k, v = (x.detach() for x in (drawn(1, 2, 64, 64, dtype=BF16) for _ in range(3)))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        expected = nn.functional.scaled_dot_product_attention(q, k, v)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = nn.functional.scaled_dot_product_attention(q, k, v)
    graph.replay()
    assert torch.equal(out, expected)
