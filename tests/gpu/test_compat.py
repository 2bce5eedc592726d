"""Tests the front doors on a GPU, forward and backward."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
)
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import FlashAttentionFunction
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    increment_philox_state,
    triton_dropout_mask,
)
from jitattn.compat.flash_attn import _extension as extension
from jitattn.compat.flash_attn import flash_attn_func, flash_attn_with_kvcache
from jitattn.compat.flash_cosine_sim_attention import flash_cosine_sim_attention, l2norm_tensors
from jitattn.compat.flash_cosine_sim_attention.transformer import CosineSimCausalTransformer
from jitattn.compat.warp_attention import warp_attention_forward
from tests.support import compat_dkernel as block_sparse
from tests.support import compat_flash_attn as swaa
from tests.support import compat_warp as warp
from tests.support.compare import assert_same_gradients, rel_l2
from tests.support.compat_cosine import CASES, dense, tensors
from tests.support.compat_fast_ops import LENGTHS_KV, LENGTHS_Q, H, dense_inputs, nested, parts

#: What torch says once of every strided nested tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", list(CASES))
def test_cosine_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    arguments, kind = CASES[name]
    if name == "large scale" and dtype is not torch.float32:
        arguments = {**arguments, "scale": 20.0}  # the rounding of q and k is multiplied by it
    given = {n: x.cuda() if isinstance(x, torch.Tensor) else x for n, x in arguments.items()}
    own = [x.detach().cuda().requires_grad_() for x in tensors(**kind, dtype=dtype)]
    with torch.enable_grad():
        out = flash_cosine_sim_attention(*own, **given)
        truth = dense(*own, **given)
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(6)).to(out)
    limit = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 6e-2}[dtype]
    assert rel_l2(out, truth) < limit
    assert_same_gradients([out], [truth], own, [d_out], 2 * limit)


@pytest.mark.real_gpu
@pytest.mark.parametrize(
    ("shape_q", "shape_kv", "arguments"),
    [
        ((1, 8, 1024, 64), (1, 8, 1024, 64), {}),
        ((1, 8, 1024, 64), (1, 8, 2048, 64), {}),
        ((1, 8, 1024, 64), (1, 8, 2048, 64), {"mask": True}),
        ((4, 8, 1024, 64), (4, 8, 1024, 64), {"causal": True}),
        ((4, 8, 1024, 64), (4, 1024, 64), {"causal": True}),
        ((4, 8, 1024, 64), (4, 1024, 64), {"l2norm_qk": False}),
        ((1, 8, 1024, 64), (1, 8, 2048, 64), {"causal": True}),
        ((32, 1024, 64), (32, 2048, 64), {"causal": True}),
    ],
    ids=str,
)
def test_the_calls_of_the_readme(
    shape_q: tuple[int, ...], shape_kv: tuple[int, ...], arguments: dict[str, bool]
) -> None:
    """Under the name that the readme imports."""
    given: dict[str, object] = dict(arguments)
    if "mask" in given:
        given["mask"] = torch.ones(shape_kv[0], shape_kv[-2], dtype=torch.bool, device="cuda")
    with jitattn.compat.alias("flash_cosine_sim_attention"):
        theirs = importlib.import_module("flash_cosine_sim_attention")
        q = torch.randn(shape_q, device="cuda")
        k, v = (torch.randn(shape_kv, device="cuda") for _ in range(2))
        if given.get("l2norm_qk") is False:
            q, k = theirs.l2norm_tensors(q, k)
        out = theirs.flash_cosine_sim_attention(q, k, v, **given)
    assert out.shape == shape_q
    assert rel_l2(out, dense(q, k, v, **given)) < 1e-5


def test_l2norm_tensors() -> None:
    x, y = l2norm_tensors(torch.randn(2, 5, 64).cuda(), torch.randn(2, 5, 64).cuda())
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 5, device="cuda"))
    assert y.shape == (2, 5, 64)


def test_the_transformer_trains() -> None:
    torch.manual_seed(0)
    sizes = {"num_tokens": 16, "dim": 64, "max_seq_len": 64, "depth": 2, "heads": 2}
    model = CosineSimCausalTransformer(**sizes, dim_head=32, use_cuda_kernel=True).cuda()
    text = (torch.arange(41) % 5).expand(4, -1).cuda()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    with torch.enable_grad():
        for _ in range(30):
            loss = model(text, return_loss=True)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_fast_ops_triton(dtype: torch.dtype, causal: bool, dropout_p: float) -> None:
    own = dense_inputs(dtype, "cuda")
    bias = torch.randn(1, H, 33, 50, device="cuda").requires_grad_()
    torch.manual_seed(11)
    with torch.enable_grad():
        out = flash_attn_triton(*own, bias, causal, dropout_p)
    torch.manual_seed(11)
    mask = triton_dropout_mask(dropout_p, 2, H, 33, 50, "cuda")
    with torch.enable_grad():
        wide = [x.double() for x in own]
        truth, _ = attention_ref(*wide, None, None, dropout_p, mask, causal, bias, upcast=False)
    assert rel_l2(out, truth) < 1e-2
    assert_same_gradients([out], [truth], [*own, bias], [torch.ones_like(out)], 2e-2)


@pytest.mark.real_gpu
def test_fast_ops_moves_the_generator_as_the_original() -> None:
    torch.manual_seed(5)
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    first = generator.get_offset()
    flash_attn_triton(*dense_inputs(torch.float16, "cuda"))
    assert generator.get_offset() == first + -(-2 * H * 33 * 50 // 4) * 4
    assert increment_philox_state(5) == (5, first + -(-2 * H * 33 * 50 // 4) * 4)
    assert increment_philox_state(1)[1] == first + -(-2 * H * 33 * 50 // 4) * 4 + 8


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_fast_ops_nested(layout: torch.layout) -> None:
    lengths = (LENGTHS_Q, LENGTHS_KV, LENGTHS_KV)
    sides = [parts(one, torch.bfloat16, "cuda", seed) for seed, one in enumerate(lengths)]
    with torch.enable_grad():
        out = FlashAttentionFunction.apply(*(nested(side, layout) for side in sides), None, True)
        results = out.unbind()
        truths = [
            attention_ref(*(x.double().transpose(0, 1)[None] for x in one), causal=True)[0][0]
            for one in zip(*sides, strict=True)
        ]
        loss = sum(x.float().square().sum() for x in results)
        true_loss = sum(x.square().sum() for x in truths)
    for result, truth in zip(results, truths, strict=True):
        assert rel_l2(result, truth.transpose(0, 1)) < 1e-2
    leaves = [x for side in sides for x in side]
    got, wanted = (torch.autograd.grad(end, leaves) for end in (loss, true_loss))
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < 3e-2


@pytest.mark.real_gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_jagged_layer_waits_for_nothing() -> None:
    """Where offsets are shared and the largest length is known; with a residual connection."""
    lengths = (5, 33, 1, 20)
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0)
    values = torch.randn(sum(lengths), 3 * H, 64, dtype=torch.float16, device="cuda")
    x = torch.nested.nested_tensor_from_jagged(values, offsets, max_seqlen=max(lengths))
    apply = FlashAttentionFunction.apply

    def layer() -> torch.Tensor:
        q, k, v = (part.transpose(1, 2) for part in x.chunk(3, 2))
        out = apply(q, k, v, None, True)
        return apply(out + q, k, v) + out + q

    wanted = layer()
    try:
        torch.cuda.set_sync_debug_mode("error")
        out = layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(out.values(), wanted.values())


@pytest.mark.real_gpu
def test_the_call_of_fast_ops_readme() -> None:
    q, k, v = (torch.rand(1, 12, 4096, 128, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    with jitattn.compat.alias("fast_ops"):
        theirs = importlib.import_module("fast_ops.flash_attention.flash_attention")
        out = theirs.FlashAttentionFunction.apply(q, k, v)
    assert rel_l2(out, jitattn.attention(q, k, v, layout="bhsd")) < 1e-6


@pytest.mark.parametrize("name", list(swaa.CASES))
@pytest.mark.parametrize(("len_q", "len_kv"), [(200, 200), (1, 130), (130, 77)])
def test_flash_attn_values_and_gradients(name: str, len_q: int, len_kv: int) -> None:
    theirs, ours = swaa.CASES[name]
    sizes = ((len_q, swaa.H), (len_kv, swaa.HKV), (len_kv, swaa.HKV))
    own = [
        torch.stack(swaa.sequences((length,) * 2, heads, seed)).bfloat16().requires_grad_()
        for seed, (length, heads) in enumerate(sizes)
    ]
    on_gpu = [x.detach().cuda().requires_grad_() for x in own]
    with torch.enable_grad():
        out = flash_attn_func(*on_gpu, **theirs)
        truth = torch.stack([swaa.dense(*one, **ours)[0] for one in zip(*own, strict=True)])
    assert rel_l2(out.cpu(), truth) < 1e-2
    ones = torch.ones_like(out)
    got = torch.autograd.grad(out, on_gpu, ones)
    wanted = torch.autograd.grad(truth, own, ones.double().cpu())
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one.cpu(), other) < 2e-2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("seed", range(20))
def test_warp_attention_values_and_gradients(seed: int, dtype: torch.dtype) -> None:
    with torch.enable_grad():
        given, truth, leaves = warp.call(seed, dtype, "cuda")
        out = warp_attention_forward(**given)
    if not truth.any():
        assert not out.any()
        return
    limit = 1e-2 if dtype is torch.float16 else 2e-2
    assert rel_l2(out, truth) < limit
    assert_same_gradients([out], [truth], leaves, [torch.ones_like(out)], 2 * limit, least=1e-2)


@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize("len_q", [500, 130, 1])
@pytest.mark.parametrize(
    "given",
    [{}, {"num_kv_heads": 2, "num_dense_heads": 1}, {"homo_head": True}, {"causal": False}],
    ids=str,
)
def test_dkernel_values_and_gradients(given: dict[str, Any], len_q: int, seq_dim: int) -> None:
    generator = torch.Generator().manual_seed(2)
    heads_kv = given.get("num_kv_heads", 4)
    own = [
        torch.randn(2, length, heads, 64, generator=generator).bfloat16().cuda().requires_grad_()
        for length, heads in ((len_q, 4), (500, heads_kv), (500, heads_kv))
    ]
    layer = LocalStrideSparseAttention(4, 512, 32, 3, 4, seq_dim=seq_dim, **given)
    arbitrary = SparseAttention(
        32, layer.sparse_pattern, causal=given.get("causal", True), seq_dim=seq_dim
    )
    with torch.enable_grad():
        moved = own if seq_dim == 1 else [x.transpose(1, 2) for x in own]
        out, lse = layer(*moved, return_lse=True)
        again = arbitrary(*moved)
        if seq_dim == 2:
            out, again = out.transpose(1, 2), again.transpose(1, 2)
        pattern, causal = layer.sparse_pattern, given.get("causal", True)
        truths = [block_sparse.dense(*one, pattern, 32, causal) for one in zip(*own, strict=True)]
        truth = torch.stack([one[0] for one in truths])
    assert rel_l2(out, truth) < 1e-2
    assert rel_l2(again, truth) < 1e-2
    assert (lse - torch.stack([one[1] for one in truths])).abs().max() < 1e-4
    assert_same_gradients([out], [truth], own, [torch.ones_like(out)], 2e-2)


def test_dkernel_paddings_and_partitions() -> None:
    layer = LocalStrideSparseAttention(4, 512, 64, 2, 3, num_kv_heads=2)
    generator = torch.Generator().manual_seed(2)
    q, k, v = (
        torch.randn(2, 300, heads, 64, generator=generator).half().cuda().requires_grad_()
        for heads in (4, 2, 2)
    )
    left = [7, 100]
    with torch.enable_grad():
        out = layer(q, k, v, left_paddings=torch.tensor(left))
        truths = [
            block_sparse.dense(q[b, skip:], k[b, skip:], v[b, skip:], layer.sparse_pattern, 64)[0]
            for b, skip in enumerate(left)
        ]
        loss = sum(truth.sum() for truth in truths)
    for b, skip in enumerate(left):
        assert rel_l2(out[b, skip:], truths[b]) < 5e-3
        assert not out[b, :skip].any()
    got = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    for one, other in zip(got, torch.autograd.grad(loss, (q, k, v)), strict=True):
        assert rel_l2(one, other) < 1e-2
    part = layer(q, k, v, return_lse=True)
    assert rel_l2(combine_attn_partitions(part, part, hdim=2), part[0]) < 2e-3


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_flash_attn_extension(dropout_p: float) -> None:
    sizes = ((150, swaa.H), (200, swaa.HKV), (200, swaa.HKV))
    q, k, v = (
        torch.stack(swaa.sequences((length,) * 2, heads, seed)).half().cuda().requires_grad_()
        for seed, (length, heads) in enumerate(sizes)
    )
    tail = (0.25, True, 60, 0, 0.0, 5, True)
    out, lse, dmask, state = extension.fwd(
        q, k, v, None, None, dropout_p, *tail, dropout_p > 0, None
    )
    with torch.enable_grad():
        wide_k, wide_v = (x.double().repeat_interleave(2, 2) for x in (k, v))
        scores = torch.einsum("bihd,bjhd->bhij", q.double(), wide_k) * 0.25
        i, j = torch.arange(150, device="cuda")[:, None] + 50, torch.arange(200, device="cuda")
        seen = (j <= i) & ((j >= i - 60) | (j < 5))
        weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), 3)
        if dropout_p:
            weights = weights * (dmask >= 0)[:, :, :150, :200] / (1 - dropout_p)
        truth = torch.einsum("bhij,bjhd->bihd", weights, wide_v)
    assert rel_l2(out, truth) < 2e-3
    d_out = torch.randn(out.shape, device="cuda", dtype=torch.half)
    wanted = torch.autograd.grad(truth, (q, k, v), d_out.double())
    found = extension.bwd(
        d_out, q, k, v, out, lse, None, None, None, None, dropout_p, *tail, True, None, state
    )
    for one, other in zip(found[:3], wanted, strict=True):
        assert rel_l2(one, other) < 5e-3


def test_the_lse_of_a_cache_does_not_break_a_gradient() -> None:
    q, cache = torch.randn(1, 2, 4, 32).half(), torch.randn(2, 1, 16, 4, 32).half()
    found = []
    for device in ("cuda", "cpu"):
        slopes = torch.linspace(0.1, 0.4, 4).to(device).requires_grad_()
        with torch.enable_grad():
            out, lse = flash_attn_with_kvcache(
                q.to(device),
                *cache.to(device),
                cache_seqlens=12,
                causal=True,
                alibi_slopes=slopes,
                return_softmax_lse=True,
            )
            loss = out.float().sum() + lse.sum()
        found.append(torch.autograd.grad(loss, slopes)[0].cpu())
    assert rel_l2(*found) <= 5e-3
