"""The front door of flash-cosine-sim-attention: attention over q and k of length 1.

Where it differs from the original, on purpose: rows that see nothing are 0 everywhere; a key mask
and `causal` go together; results are those of the softmax, whatever the scale, with and without
l2norm (the original's constant shift overflows or underflows for some); fp16 vectors of zeros are
normalised to zeros, not NaN; nothing synchronises the device. Its limits are lifted: head dims from
1 to 256, bf16, v of another head dim, any number of kv heads that divides that of q, and a bias by
distance alone (the "1d dynamic positional bias" of its wishes).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final

from jitattn.api.l2norm import l2norm
from jitattn.compat._core import attention
from jitattn.compat.flash_cosine_sim_attention._plain import plain_attention
from jitattn.errors import InvalidInputError
from jitattn.request.layouts import parse_any
from jitattn.request.problem import Call
from jitattn.request.scores import NO_CHANGES, Scores
from jitattn.values.masks import Causal, Full, KeyPadding
from jitattn.values.norm import L2Norm

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.values.masks import Mask

__all__ = [
    "debug",
    "flash_cosine_sim_attention",
    "l2norm_tensors",
    "plain_cosine_sim_attention",
    "triton_flash_cosine_sim_attention",
]


_FULL: Final = Full()
_CAUSAL: Final = Causal()
_NORM: Final = L2Norm()


def flash_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    use_triton: bool = False,
    sequence_parallel: bool | None = None,
) -> Tensor:
    """Compute cosine attention; differentiable, on the GPU and the CPU.

    Parameters
    ----------
    q : Tensor, [B, Hq, Lq, D], or [B * H, Lq, D] with batch and heads merged
    k, v : Tensor, [B, Hkv, Lkv, D], or [B, Lkv, D] for one head; as q if that is merged
    mask : Tensor, [B, Lkv], bool, optional
        True = attend. (With a merged q, [B * H, Lkv].)
    attn_bias : Tensor, [Hq, Lq, Lkv], or [B, Lq, Lkv] with `attn_bias_batch_dim`, optional
        Added to the scaled scores. Dtype of q, or fp32. Or [Hq or 1, 2 R + 1]: one value for each
        distance, entry d + R, where d is key - query (aligned to the bottom right), held between -R
        and R; it takes no Lq x Lkv memory, nor does its gradient.
    scale : float
        Factor of the cosines.
    groups : int
        Slices of a vector that are normalised each by itself.
    causal : bool
        Aligned to the bottom right.
    l2norm_qk : bool
        False: q and k are taken as they are.
    attn_bias_batch_dim : bool
        Whether the first dimension of `attn_bias` is the batch; always so with a merged q.
    use_triton, sequence_parallel : bool
        Taken for the sake of callers of newer versions, whose kernels they choose.

    Returns
    -------
    Tensor, as q (with the head dim of v)

    Raises
    ------
    InvalidInputError
    """
    del use_triton, sequence_parallel
    arguments = _translate(
        q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim
    )
    out: Tensor = attention(**arguments)
    return out.squeeze(1) if q.dim() == 3 else out


def plain_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
) -> Tensor:
    """Compute cosine attention in plain PyTorch, in the dtype of q, with all scores in memory.

    Parameters, result and errors are those of `flash_cosine_sim_attention`.
    """
    arguments = _translate(
        q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim
    )
    _check(**arguments)
    out = plain_attention(
        arguments["q"],
        arguments["k"],
        arguments["v"],
        mask,
        attn_bias if attn_bias is not None and attn_bias.dim() == 2 else arguments["bias"],
        scale,
        groups if l2norm_qk else 0,
        causal,
    )
    return out.squeeze(1) if q.dim() == 3 else out


def triton_flash_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    sequence_parallel: bool | None = None,
) -> Tensor:
    """Compute `flash_cosine_sim_attention`; the name of newer versions' Triton kernel.

    `sequence_parallel` says how that one's backward pass is scheduled, and nothing here.
    """
    del sequence_parallel
    return flash_cosine_sim_attention(q, k, v, mask, None, scale, groups, causal, l2norm_qk)


def l2norm_tensors(*tensors: Tensor, groups: int = 1) -> tuple[Tensor, ...]:
    """Scale the vectors of all tensors to length 1, in the dtype of the first.

    Parameters
    ----------
    *tensors : Tensor, [..., D]
    groups : int
        Slices of a vector that are normalised each by itself.
    """
    return tuple(l2norm(tensor, groups).to(tensors[0].dtype) for tensor in tensors)


def debug() -> tuple[()]:
    """Return nothing, as the original does; `jitattn-cache doctor` says what is installed."""
    return ()


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Mask,
    bias: Tensor | None,
    relative_bias: Tensor | None,
    scale: float,
    layout: str,
    qk_norm: L2Norm | None,
) -> None:
    """Refuse the arguments that `jitattn.attention` refuses."""
    scores = NO_CHANGES
    if not (bias is None and relative_bias is None and qk_norm is None):
        scores = Scores(bias=bias, relative_bias=relative_bias, qk_norm=qk_norm)
    parse_any(
        q,
        k,
        v,
        Call(
            mask=mask,
            scale=scale,
            layout=layout,
            gear=None,
            out=None,
            out_dtype=None,
            num_splits=None,
            return_lse=False,
            q_seqs=None,
            kv_seqs=None,
            scores=scores,
        ),
    )


def _translate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | None,
    scale: float,
    groups: int,
    causal: bool,
    l2norm_qk: bool,
    attn_bias_batch_dim: bool,
) -> dict[str, Any]:
    """Return the arguments of `jitattn.attention`."""
    if q.dim() not in (3, 4):
        raise InvalidInputError(
            f"q has shape {list(q.shape)}: it must be [B, H, L, D], or [B * H, L, D]"
        )
    if q.dim() == 3:
        q, attn_bias_batch_dim = q[:, None], True
    if k.dim() == 3:
        k = k[:, None]
    if v.dim() == 3:
        v = v[:, None]
    bias = by_distance = None
    if attn_bias is not None and attn_bias.dim() == 2:
        by_distance = attn_bias.float()
    elif attn_bias is not None:
        if attn_bias.dim() != 3:
            raise InvalidInputError(
                f"attn_bias has shape {list(attn_bias.shape)}: it must be [H, Lq, Lkv], or "
                "[B, Lq, Lkv] with attn_bias_batch_dim=True, or [H or 1, 2 R + 1] by distance"
            )
        bias = attn_bias[:, None] if attn_bias_batch_dim else attn_bias[None]
    seen: Mask = _CAUSAL if causal else _FULL
    if mask is not None:
        seen = seen & KeyPadding(mask) if causal else KeyPadding(mask)
    norm = None
    if l2norm_qk:
        norm = _NORM if type(groups) is int and groups == 1 else L2Norm(groups)
    return {
        "q": q,
        "k": k,
        "v": v,
        "mask": seen,
        "bias": bias,
        "relative_bias": by_distance,
        "scale": scale,
        "layout": "bhsd",
        "qk_norm": norm,
    }


_OF_BOTH_KINDS: Final = {
    "flash_cosine_sim_attention": flash_cosine_sim_attention,
    "triton_flash_cosine_sim_attention": triton_flash_cosine_sim_attention,
}


class _Package(ModuleType):
    """The package's module type: functions keep their names beside submodules of the same name."""

    def __setattr__(self, name: str, value: object) -> None:
        if isinstance(value, ModuleType):
            value = _OF_BOTH_KINDS.get(name, value)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
