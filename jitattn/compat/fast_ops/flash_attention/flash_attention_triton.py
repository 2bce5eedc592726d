"""Attention of [B, L, H, D] with a bias and dropout.

Limits of the original are lifted: any lengths, head dims from 1 to 256, CPU tensors, gradients of
the bias. Rows that see nothing are 0, not NaN. The state of the generator that a call takes, and by
how much it moves, is the original's; which weights a state drops is ours (`triton_dropout_mask`
says).

Errors are assertions, as the original's, but for a bias of another shape, which is a RuntimeError;
each is an `InvalidInputError` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.attention import attention
from jitattn.compat._errors import CheckFailedError, ExtensionError, check, errors_as
from jitattn.dropout import dropout_mask, dropout_state
from jitattn.masks import Causal, Full

if TYPE_CHECKING:
    from torch import Tensor

#: What the core says, and what this door does.
_WORDS: Final = {
    "scale": "softmax_scale",
    "check the layout argument": "the layout is [B, L, H, D]",
}


@errors_as(CheckFailedError, _WORDS)
def flash_attn_triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    /,
) -> Tensor:
    """Compute attention; differentiable, the bias included.

    Parameters
    ----------
    q : Tensor, [B, Lq, H, D]
    k, v : Tensor, [B, Lkv, H, D]
        Fewer heads that divide H are fine; so are expanded ones.
    bias : Tensor, [B or 1, H or 1, Lq or 1, Lkv], optional
        Dtype of q, or fp32.
    causal : bool
        Let query i see keys up to i: aligned to the top left.
    dropout_p : float
    softmax_scale : float, default 1 / sqrt(D); 0 means the default, too

    Returns
    -------
    Tensor, [B, Lq, H, D]

    Raises
    ------
    CheckFailedError
        Tensors do not fit together; an AssertionError. The generator may have moved.
    ExtensionError
        The last two sizes of bias are others; a RuntimeError.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        check(
            not tensor.is_nested and tensor.dim() == 4,
            f"{name} is nested or has {tensor.dim()} dimensions: it must be a dense tensor "
            "[B, L, H, D]; FlashAttentionFunction takes nested ones",
        )
    if bias is not None:
        _check_bias(bias, q.shape[1], k.shape[1])
    state = _next_state(q.shape[0] * q.shape[2] * q.shape[1] * k.shape[1], q.device)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    out: Tensor = attention(
        q,
        k,
        v,
        mask=Causal("top_left") if causal else Full(),
        scale=softmax_scale or None,
        bias=bias,
        dropout_p=dropout_p,
        dropout_state=state if dropout_p else None,
    )
    return out


@errors_as(CheckFailedError)
def triton_dropout_mask(
    dropout_p: float,
    batch_sz: int,
    n_heads: int,
    seqlen_q: int,
    seqlen_k: int,
    device: torch.device | str,
) -> Tensor:
    """Return the mask that the next call of these sizes would use, and move the generator on.

    Returns
    -------
    Tensor, [B, H, Lq, Lkv], bool
        True = keep.
    """
    state = _next_state(batch_sz * n_heads * seqlen_q * seqlen_k, torch.device(device))
    return dropout_mask(state, dropout_p, batch_sz, n_heads, seqlen_q, seqlen_k)


def increment_philox_state(increment: int) -> tuple[int, int]:
    """Return seed and offset of torch's generator of the current GPU, and move the offset.

    Parameters
    ----------
    increment : int
        Rounded up to a multiple of 4.
    """
    index = torch.cuda.current_device()
    generator = torch.cuda.default_generators[index]
    seed, offset = generator.initial_seed(), generator.get_offset()
    generator.set_offset(offset + -(-increment // 4) * 4)
    return seed, offset


def _check_bias(bias: Tensor, len_q: int, len_kv: int) -> None:
    check(
        not bias.is_nested and bias.dim() == 4,
        f"bias is nested or has {bias.dim()} dimensions: it must be a dense tensor [B, H, Lq, Lkv]",
    )
    sizes = list(bias.shape)
    if sizes[2:] not in ([1, len_kv], [len_q, len_kv]):
        raise ExtensionError(
            f"bias has shape {sizes}: its last two sizes must be (1, {len_kv}) or "
            f"({len_q}, {len_kv}), as q has {len_q} rows and k {len_kv}; expand it, or cut it"
        )


def _next_state(count: int, device: torch.device) -> Tensor:
    """Take the state of a call with so many weights; the CPU has no offsets, and draws it."""
    if device.type != "cuda":
        return dropout_state(device)
    with torch.cuda.device(device):
        seed, offset = increment_philox_state(count)
    signed = seed - 2**64 if seed >= 2**63 else seed
    return torch.tensor([signed, offset], dtype=torch.int64, device=device)
