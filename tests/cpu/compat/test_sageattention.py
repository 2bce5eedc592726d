"""Tests the sageattention door: names, keywords, errors, and the gear that its calls have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import jitattn
from jitattn.compat import sageattention
from jitattn.compat.sageattention import (
    core,
    sageattn,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_varlen,
)
from tests.support.inputs import drawn

Q, K, V = (drawn(2, 4, 9, 16, seed=seed) for seed in range(3))
CU = torch.tensor([0, 4, 9], dtype=torch.int32)
NAMED = (
    sageattn_qk_int8_pv_fp16_triton,
    sageattn_qk_int8_pv_fp16_cuda,
    sageattn_qk_int8_pv_fp8_cuda,
    sageattn_qk_int8_pv_fp8_cuda_sm90,
)


def test_facts_of_the_original() -> None:
    assert sageattention.__version__ == "2.2.0"
    assert core.sageattn is sageattn
    assert core.sageattn_varlen is sageattn_varlen


def test_every_function_has_gear_4(monkeypatch: pytest.MonkeyPatch) -> None:
    gears = []

    def attention(q: torch.Tensor, *_: object, **given: Any) -> torch.Tensor:
        gears.append(given["gear"])
        return q

    monkeypatch.setattr(core, "attention", attention)
    for function in (sageattn, *NAMED):
        function(Q, K, V)
    sageattn_varlen(Q[0], K[0], V[0], CU, CU, 5, 5)
    assert gears == [4] * 6


def test_lengths_may_differ_and_causal_is_aligned_to_the_top_left() -> None:
    out = sageattn(Q[:, :, :3], K, V, is_causal=True)
    torch.testing.assert_close(out[:, :, 0], V[:, :, 0])
    out = sageattn(Q, K[:, :, :3], V[:, :, :3], is_causal=True)
    whole = sageattn(Q, K[:, :, :3], V[:, :, :3])
    torch.testing.assert_close(out[:, :, 3:], whole[:, :, 3:])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_dtypes_and_odd_head_dims(dtype: torch.dtype) -> None:
    x = drawn(1, 2, 5, 130, dtype=dtype)
    out, lse = sageattn(x, x, x, return_lse=True)
    assert out.dtype is dtype
    assert lse.shape == (1, 2, 5)


def test_what_steers_quantization_has_no_effect() -> None:
    wanted = sageattn(Q, K, V)
    steering = {"qk_quant_gran": "per_warp", "pv_accum_dtype": "fp32", "smooth_k": False}
    assert torch.equal(sageattn(Q, K, V, **steering), wanted)
    for function in NAMED[1:]:
        assert torch.equal(function(Q, K, V, **steering), wanted)
    own = sageattn_qk_int8_pv_fp16_triton(Q, K, V, quantization_backend="cuda", smooth_k=False)
    assert torch.equal(own, wanted)
    assert torch.equal(sageattn(Q, K, V, dropout_p=None, enable_gqa=False), wanted)


def test_as_scaled_dot_product_attention() -> None:
    """Programs put it there, and pass a mask by name."""
    mask = drawn(2, 1, 9, 9, seed=4) > 0
    mask[..., 0] = True
    out = sageattn(Q, K, V, attn_mask=mask, is_causal=False)
    wanted = torch.nn.functional.scaled_dot_product_attention(Q, K, V, attn_mask=mask)
    torch.testing.assert_close(out, wanted, atol=1e-5, rtol=1e-5)


def test_refusals_are_assertions_in_the_words_of_the_door() -> None:
    calls: dict[str, Callable[[], object]] = {
        r"tensor_layout='NDH'": lambda: sageattn(Q, K, V, "NDH"),
        r"qk_quant_gran='per_block'": lambda: sageattn_qk_int8_pv_fp16_cuda(
            Q, K, V, qk_quant_gran="per_block"
        ),
        r"pv_accum_dtype='fp64'": lambda: sageattn_qk_int8_pv_fp8_cuda(
            Q, K, V, pv_accum_dtype="fp64"
        ),
        r"pv_accum_dtype='fp16'": lambda: sageattn_qk_int8_pv_fp8_cuda_sm90(
            Q, K, V, pv_accum_dtype="fp16"
        ),
        r"quantization_backend='nvcc'": lambda: sageattn_qk_int8_pv_fp16_triton(
            Q, K, V, quantization_backend="nvcc"
        ),
        r"sageattn\(dropout_p=0.5\)": lambda: sageattn(Q, K, V, dropout_p=0.5),
        r"sageattn_varlen\(window=3\)": lambda: sageattn_varlen(
            Q[0], K[0], V[0], CU, CU, 5, 5, window=3
        ),
    }
    for message, call in calls.items():
        with pytest.raises(ValueError, match=message) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)
    for call in (
        lambda: sageattn(Q, K.half(), V),
        lambda: sageattn(Q, K, V, sm_scale=float("nan")),
        lambda: sageattn_varlen(Q[0], K[0], V[0], CU, CU[:2], 5, 5),
        lambda: sageattn_qk_int8_pv_fp16_cuda(Q, K, V, qk_quant_gran="per_block"),
    ):
        with pytest.raises(AssertionError) as caught:
            call()
        assert isinstance(caught.value, jitattn.InvalidInputError)


def test_under_torch_compile() -> None:
    compiled = torch.compile(sageattn, backend="eager", fullgraph=True)
    out = compiled(Q, K, V, tensor_layout="HND", is_causal=True)
    torch.testing.assert_close(out, sageattn(Q, K, V, is_causal=True))
