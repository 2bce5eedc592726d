"""Tests the CPU path: accuracy, memory, derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from jitattn.cpu.attention import attention_cpu
from jitattn.reference import reference
from jitattn.values.masks import Causal, Full
from tests.support.check import check_case, cpu_path
from tests.support.grids import EDGE, SMOKE
from tests.support.inputs import random_qkv

#: The CPU path knows no specs: every fourth case, and no buffers of many megabytes.
CPU_GRID = list(
    dict.fromkeys([*SMOKE, *(case for case in EDGE[::4] if case.variant != "wide_row")])
)
MASKS = [Full(), Causal(), Causal("top_left")]


@pytest.mark.parametrize("case", CPU_GRID, ids=lambda case: case.name)
def test_grid(case):
    check_case(case, cpu_path)


def small_chunks(q, k, v, mask, *, return_lse=False, chunk_q=3):
    """fp64, and several chunks of odd size along both lengths."""
    return attention_cpu(
        q,
        k,
        v,
        mask=mask,
        scale=0.4,
        out_dtype=torch.float64,
        return_lse=return_lse,
        chunk_q=chunk_q,
        chunk_kv=2,
    )


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(
    ("batch", "len_q", "len_kv", "heads_q", "heads_kv"),
    [
        (2, 7, 5, 4, 2),  # rows that see nothing
        (1, 1, 9, 3, 1),
        (1, 9, 9, 2, 2),
        (1, 5, 0, 2, 2),
        (0, 3, 3, 2, 1),
        (1, 0, 3, 2, 1),
        (1, 3, 3, 0, 0),
        (1, 3, 3, 0, 2),
    ],
)
def test_values_and_gradients_equal_the_reference(batch, len_q, len_kv, heads_q, heads_kv, mask):
    inputs = random_qkv(batch, len_q, len_kv, heads_q, heads_kv, 4, 3, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in inputs)
    results = [
        small_chunks(q, k, v, mask, return_lse=True),
        reference(q, k, v, mask=mask, scale=0.4, return_lse=True),
    ]
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)
    weights = torch.randn_like(results[0][0])
    grads = []
    for out, lse in results:
        seen = lse.masked_fill(lse == -math.inf, 0.0)
        grads.append(torch.autograd.grad((out * weights).sum() + seen.cos().sum(), (q, k, v)))
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("chunk_q", [2, 128], ids=["checkpoints", "one_chunk"])
def test_derivatives_of_first_and_second_order_and_forward_mode(chunk_q):
    inputs = random_qkv(1, 4, 3, 2, 1, 3, 2, dtype=torch.float64)
    q, k, v = (x.requires_grad_() for x in inputs)

    def both(q, k, v):
        out, lse = small_chunks(q, k, v, Causal(), return_lse=True, chunk_q=chunk_q)
        return out, lse[:, :, 1:]  # the first query sees nothing

    assert torch.autograd.gradcheck(both, (q, k, v), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(both, (q, k, v))


def test_forward_mode_goes_through_validation():
    q, k, v = random_qkv(1, 4, 4, 2)

    def call(q, k, v):
        return cpu_path(q, k, v, mask=Causal())[0]

    out, tangent = torch.func.jvp(call, (q, k, v), (q, k, v))
    _, expected = torch.func.jvp(
        lambda *x: reference(*x, mask=Causal(), dtype=torch.float32), (q, k, v), (q, k, v)
    )
    assert out.shape == q.shape
    torch.testing.assert_close(tangent, expected)


@pytest.mark.parametrize("mask", [Full(), Causal()])
def test_nan_stays_where_it_can_be_seen(mask):
    q, k, v = random_qkv(1, 6, 6, 1, dtype=torch.float64)
    k[0, 4] = math.nan
    out = small_chunks(q, k, v, mask)
    bad = torch.isnan(out).any(dim=3)[0, :, 0]
    assert bad.tolist() == [mask == Full() or query >= 4 for query in range(6)]


def test_large_scores_do_not_overflow():
    q, k, v = random_qkv(1, 5, 5, 1, dtype=torch.float64)
    out, lse = small_chunks(100 * q, 100 * k, v, Full(), return_lse=True)
    expected, lse_expected = reference(100 * q, 100 * k, v, scale=0.4, return_lse=True)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, lse_expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
def test_16_bit_inputs_are_computed_in_fp32(dtype, out_dtype):
    q, k, v = random_qkv(1, 20, 200, 2, dtype=dtype)
    out, lse = cpu_path(q, k, v, mask=Full(), out_dtype=out_dtype)
    expected = reference(q, k, v, dtype=torch.float64)
    assert lse.dtype == torch.float32
    assert out.dtype == (out_dtype or dtype)
    if out_dtype is None:
        # Rounded once, from a value close to the truth: half an ulp of the largest result.
        assert (out.double() - expected).abs().max() <= torch.finfo(
            dtype
        ).eps * expected.abs().max()
    else:
        torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)


def peak_bytes(length, *, backward):
    """The largest sum of live allocations that torch reports."""
    q, k, v = random_qkv(1, length, length, 1, head_dim=8)
    if backward:
        q, k, v = (x.requires_grad_() for x in (q, k, v))
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        out, _ = cpu_path(q, k, v, mask=Causal())
        if backward:
            out.sum().backward()
    events = [e for e in prof.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_memory_grows_with_the_length_only(backward):
    short, long = (peak_bytes(length, backward=backward) for length in (2048, 8192))
    assert short > 0
    # Four times the length: four times the memory at most, where the scores would take sixteen.
    assert long <= 5 * short
    assert long < 8192 * 8192 * 4 / 16


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("return_lse", [False, True])
def test_public_function(layout, return_lse):
    from jitattn import Causal, attention

    q, k, v = random_qkv(2, 5, 7, 4, 2, dtype=torch.bfloat16)
    if layout == "bhsd":
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    result = attention(q, k, v, mask=Causal(), layout=layout, return_lse=return_lse)
    out = result[0] if return_lse else result
    expected, lse = cpu_path(q, k, v, mask=Causal(), layout=layout)
    assert out.dtype == q.dtype
    assert torch.equal(out, expected)
    if return_lse:
        assert torch.equal(result[1], lse)


def test_public_function_writes_into_out():
    from jitattn import attention

    q, k, v = random_qkv(dtype=torch.float16)
    out = torch.full((*q.shape[:3], v.shape[3]), math.nan, dtype=torch.float32)
    result = attention(q, k, v, out=out, out_dtype=torch.float32)
    assert result is out
    torch.testing.assert_close(out.double(), reference(q, k, v), rtol=1e-5, atol=1e-6)


def test_public_function_has_gradients_on_the_cpu():
    from jitattn import Causal, attention

    inputs = [x.requires_grad_() for x in random_qkv(1, 6, 6, 2)]
    actual = torch.autograd.grad(attention(*inputs, mask=Causal()).square().sum(), inputs)
    expected = torch.autograd.grad(reference(*inputs, mask=Causal()).square().sum(), inputs)
    for grad, grad_expected in zip(actual, expected, strict=True):
        torch.testing.assert_close(grad, grad_expected, rtol=1e-4, atol=1e-5)
