"""xformers' functions of attention.

All of them: query [B, Lq, H, D], key [B, Lkv, H, D] and value [B, Lkv, H, Dv]; with groups
[B, L, G, H, D], of which key and value may be expanded along H; or one head, [B, L, D]. fp16, bf16
or fp32. `op` names an operator of xformers and has no effect. Paper: Rabe and Staats,
"Self-attention does not need O(n^2) memory", arXiv:2112.05682.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.api.merge import merge
from jitattn.compat._errors import DoorError, errors_as
from jitattn.compat.xformers.ops.fmha._attend import attend, gradients, refuse_dropout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.compat.xformers.ops.fmha._bias import AttentionBias


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401 - any operator of xformers
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute attention; differentiable, in the bias too.

    Parameters
    ----------
    query : Tensor, [B, Lq, H, D], [B, Lq, G, H, D] or [B, Lq, D]
    key : Tensor, likewise with Lkv
    value : Tensor, likewise with Dv
    attn_bias : Tensor or AttentionBias, optional
        [B, H, Lq, Lkv] ([B, G, H, Lq, Lkv] with groups, [B, Lq, Lkv] with one head), of the dtype
        of query, added to the scaled scores; any dimension may be 1 or expanded. Or one of
        `attn_bias`'s.
    p : float
        Of dropout.
    scale : float, default 1 / sqrt(D)
    output_dtype : torch.dtype, default that of query
        torch.float32 returns sums unrounded.

    Returns
    -------
    Tensor, as query with Dv columns
        Rows that see nothing are 0.

    Raises
    ------
    DoorError
        An argument breaks a rule. A ValueError, as there.
    UnsupportedError
        No kernel exists. A NotImplementedError, as there.
    """
    del op
    out: Tensor = attend(query, key, value, attn_bias, p, scale, output_dtype, return_lse=False)
    return out


def memory_efficient_attention_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401
    output_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute `memory_efficient_attention`."""
    return memory_efficient_attention(
        query, key, value, attn_bias, p, scale, op=op, output_dtype=output_dtype
    )


def memory_efficient_attention_forward_requires_grad(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `memory_efficient_attention` and its LSE, for `memory_efficient_attention_backward`.

    Returns
    -------
    out : Tensor, as query with Dv columns
    lse : Tensor, fp32
        [B, H, Lq], [B, G, H, Lq] with groups, [1, H, total] with a bias over sequences; -inf for
        rows that see nothing.
    """
    del op
    refuse_dropout(p)
    out, lse = attend(query, key, value, attn_bias, p, scale, output_dtype, return_lse=True)
    return out, lse


def memory_efficient_attention_backward(
    grad: Tensor,
    output: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute dq, dk and dv, each as its input.

    Parameters
    ----------
    grad : Tensor, as output
    output, lse : Tensor
        Of `memory_efficient_attention_forward_requires_grad`, over the same keys, or of all keys
        where these are a part.
    """
    del op
    refuse_dropout(p)
    return gradients(grad, output, lse, query, key, value, attn_bias, scale)


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Tensor | AttentionBias | None = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,  # noqa: ANN401
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute attention to some of the keys, for `merge_attentions`; differentiable.

    Parameters
    ----------
    output_dtype : torch.dtype, default torch.float32

    Returns
    -------
    out, lse
        As `memory_efficient_attention_forward_requires_grad` returns them.
    """
    del op
    refuse_dropout(p)
    if output_dtype is None and query.dtype is not torch.float64:
        output_dtype = torch.float32
    out, lse = attend(query, key, value, attn_bias, p, scale, output_dtype, return_lse=True)
    return out, lse


@errors_as(DoorError, {"outs": "attn_split", "lses": "lse_split", "out_dtype": "output_dtype"})
def merge_attentions(
    attn_split: Tensor | Sequence[Tensor],
    lse_split: Tensor | Sequence[Tensor],
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Merge results over disjoint sets of keys, with `jitattn.merge`; differentiable.

    Parameters
    ----------
    attn_split : sequence of Tensor [B, L, H, Dv] or [B, L, G, H, Dv], or one Tensor of all
    lse_split : sequence of Tensor [B, H, L] or [B, G, H, L], or one Tensor of all; fp32
    write_lse : bool
        Return the LSE as well.
    output_dtype : torch.dtype, default that of `attn_split`

    Returns
    -------
    out, and lse or None
    """
    outs, lses = _stacked(attn_split), _stacked(lse_split)
    if outs.dim() not in (5, 6) or lses.dim() != outs.dim() - 1:
        raise DoorError(
            f"attn_split {list(outs.shape)} and lse_split {list(lses.shape)}: they must be "
            "[parts, B, L, H, D] and [parts, B, H, L], or [parts, B, L, G, H, D] and "
            "[parts, B, G, H, L]"
        )
    groups = outs.shape[3:5]
    if outs.dim() == 6:
        outs, lses = outs.flatten(3, 4), lses.flatten(2, 3)
        out, lse = merge(outs, lses, out_dtype=output_dtype)
        out, lse = out.unflatten(2, groups), lse.unflatten(1, groups)
    else:
        out, lse = merge(outs, lses, out_dtype=output_dtype)
    return out, lse if write_lse else None


def _stacked(parts: Tensor | Sequence[Tensor]) -> Tensor:
    """Return parts as one tensor, a copy if they are several."""
    if isinstance(parts, torch.Tensor):
        return parts
    if not parts or len({x.shape for x in parts}) > 1:
        raise DoorError(
            f"parts of shapes {[list(x.shape) for x in parts]}: there must be some, all alike"
        )
    return torch.stack(list(parts))
