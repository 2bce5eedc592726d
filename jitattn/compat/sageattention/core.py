"""SageAttention's functions, translated to `jitattn.attention` at gear 4.

All of them: fp16, bf16 or fp32; Hq a multiple of Hkv; `is_causal` is aligned to the top left. What
steers the original's quantization is checked and has no effect: gear 4 smooths keys, and chooses
the granularity and the accumulators of the GPU. Paper: Zhang et al., "SageAttention2",
arXiv:2411.10958.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, DoorError, check, errors_as
from jitattn.compat._kept_sequences import sequences_of
from jitattn.values.masks import Causal, Dense, Full

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from jitattn.values.masks import Mask

_GEAR: Final = 4
_FULL: Final = Full()
_CAUSAL: Final = Causal("top_left")
_LAYOUTS: Final = {"HND": "bhsd", "NHD": "bshd"}
#: The core's argument names in error messages, and these functions'.
_WORDS: Final = {
    "scale": "sm_scale",
    "q_seqs": "cu_seqlens_q",
    "kv_seqs": "cu_seqlens_k",
    "bias": "attn_mask",
    "Dense": "attn_mask",
    "check the layout argument": 'tensor_layout is "HND", [B, H, L, D], or "NHD", [B, L, H, D]',
}
#: Keywords of the original's other functions, and of its versions, that steer quantization.
_STEERING: Final = frozenset(
    {"smooth_k", "smooth_v", "qk_quant_gran", "pv_accum_dtype", "quantization_backend"}
)


@errors_as(CheckFailedError, _WORDS)
def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
    return_lse: bool = False,
    *,
    attn_mask: Tensor | None = None,
    **others: Any,  # noqa: ANN401 - the original takes any, and ignores them
) -> Any:  # noqa: ANN401 - Tensor, or two
    """Compute attention with Q Kᵀ in 8 bits where that is faster; differentiable.

    Parameters
    ----------
    q : Tensor, [B, Hq, Lq, D], or [B, Lq, Hq, D] with ``tensor_layout="NHD"``
        fp16, bf16 or fp32; D from 1 to 256. Never written to.
    k, v : Tensor, [B, Hkv, Lkv, D], or [B, Lkv, Hkv, D]
    tensor_layout : "HND" or "NHD"
    is_causal : bool
        Query i sees the keys up to i, also where the lengths differ.
    sm_scale : float, default 1 / sqrt(D)
    return_lse : bool
    attn_mask : Tensor, [B or 1, Hq or 1, Lq or 1, Lkv], optional
        bool, True = attend, or added to the scaled scores. Not in version 2.2.0; programs ask the
        signature for it. Such calls run at gear 3.
    **others
        `smooth_k` and what else steers quantization in the original: no effect. Any other keyword
        with a value but None or False is refused.

    Returns
    -------
    out : Tensor, as q
        Relative L2 error at most 2e-2 for 16-bit inputs, 1e-3 for fp32. Rows that see nothing are
        0.
    lse : Tensor, [B, Hq, Lq], fp32
        Natural logarithm of the row sums of exp(score); only with `return_lse`.

    Raises
    ------
    CheckFailedError
        An argument breaks a rule. A ValueError, and an AssertionError as there.
    """
    if others:
        _refuse_unknown("sageattn", others)
    mask: Mask = _CAUSAL if is_causal else _FULL
    bias = None
    if attn_mask is not None:
        if attn_mask.dtype is torch.bool:
            mask = mask & Dense(attn_mask)
        else:
            bias = attn_mask
    return attention(
        q,
        k,
        v,
        mask=mask,
        scale=sm_scale,
        layout=_layout(tensor_layout),
        gear=_GEAR,
        return_lse=bool(return_lse),
        bias=bias,
    )


@errors_as(CheckFailedError, _WORDS)
def sageattn_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    **others: Any,  # noqa: ANN401
) -> Tensor:
    """Compute `sageattn` of sequences one after another; differentiable.

    Parameters
    ----------
    q : Tensor, [total_q, Hq, D]
    k, v : Tensor, [total_k, Hkv, D]
    cu_seqlens_q, cu_seqlens_k : Tensor, [B + 1], int32 or int64
    max_seqlen_q, max_seqlen_k : int
        Bounds on the lengths.

    The others are those of `sageattn`; a causal sequence is aligned to its own top left.

    Returns
    -------
    Tensor, [total_q, Hq, D]
    """
    del smooth_k
    if others:
        _refuse_unknown("sageattn_varlen", others)
    q_seqs, kv_seqs = sequences_of(cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k))
    mask = _CAUSAL if is_causal else _FULL
    out: Tensor = attention(
        q, k, v, mask=mask, scale=sm_scale, gear=_GEAR, q_seqs=q_seqs, kv_seqs=kv_seqs
    )
    return out


def sageattn_qk_int8_pv_fp16_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    quantization_backend: str = "triton",
    is_causal: bool = False,
    sm_scale: float | None = None,
    smooth_k: bool = True,
    return_lse: bool = False,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Compute `sageattn`; `quantization_backend`, "triton" or "cuda", has no effect."""
    _check_one_of("quantization_backend", quantization_backend, ("triton", "cuda"))
    return sageattn(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k=smooth_k, **others
    )


def sageattn_qk_int8_pv_fp16_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Compute `sageattn`; `qk_quant_gran`, `pv_accum_dtype` and the smoothing have no effect."""
    del smooth_v
    _check_granularity(qk_quant_gran)
    _check_one_of("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp16", "fp16+fp32"))
    return sageattn(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k=smooth_k, **others
    )


def sageattn_qk_int8_pv_fp8_cuda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp16",
    smooth_k: bool = True,
    smooth_v: bool = False,
    return_lse: bool = False,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Compute `sageattn`; P V is in 16 bits here, on every GPU."""
    del smooth_v
    _check_granularity(qk_quant_gran)
    _check_one_of("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp32+fp32", "fp32+fp16"))
    return sageattn(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k=smooth_k, **others
    )


def sageattn_qk_int8_pv_fp8_cuda_sm90(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    qk_quant_gran: str = "per_thread",
    sm_scale: float | None = None,
    pv_accum_dtype: str = "fp32+fp32",
    smooth_k: bool = True,
    return_lse: bool = False,
    **others: Any,  # noqa: ANN401
) -> Any:  # noqa: ANN401
    """Compute `sageattn`, on a GPU of any architecture."""
    _check_granularity(qk_quant_gran)
    _check_one_of("pv_accum_dtype", pv_accum_dtype, ("fp32", "fp32+fp32"))
    return sageattn(
        q, k, v, tensor_layout, is_causal, sm_scale, return_lse, smooth_k=smooth_k, **others
    )


def _layout(tensor_layout: str) -> str:
    found = _LAYOUTS.get(tensor_layout)
    if found is None:
        raise DoorError(
            f'tensor_layout={tensor_layout!r}: it must be "HND", [B, H, L, D], or "NHD", '
            "[B, L, H, D]"
        )
    return found


def _check_granularity(qk_quant_gran: str) -> None:
    check(
        qk_quant_gran in ("per_warp", "per_thread"),
        f'qk_quant_gran={qk_quant_gran!r}: it must be "per_warp" or "per_thread"',
    )


def _check_one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise DoorError(f"{name}={value!r}: it must be one of {', '.join(allowed)}")


def _refuse_unknown(name: str, others: Mapping[str, Any]) -> None:
    """Refuse keywords that ask for something; the original ignores them and all that they say."""
    for key, value in others.items():
        asks = value is not None and value is not False
        if asks and key not in _STEERING:
            raise DoorError(
                f"{name}({key}={value!r}): it has no such argument; leave it out, or call "
                "jitattn.attention"
            )
