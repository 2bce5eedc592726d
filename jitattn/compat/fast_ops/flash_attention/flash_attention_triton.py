"""Attention of [B, L, H, D] with a bias and dropout.

Limits of the original are lifted: any lengths, head dims from 1 to 256, CPU tensors, gradients of
the bias. Rows that see nothing are 0, not NaN. The state of the generator that a call takes, and by
how much it moves, is the original's; which weights a state drops is ours (`triton_dropout_mask`
says). No call waits for the device, and all can be captured in a CUDA graph, whose replays draw
anew; a captured call moves the generator by what it draws.

Errors are assertions, as the original's, but for a bias of another shape, which is a RuntimeError;
each is an `InvalidInputError` too.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Final

import torch

from jitattn.compat._core import attention
from jitattn.compat._errors import CheckFailedError, ExtensionError, errors_as
from jitattn.values.dropout import dropout_mask, dropout_state
from jitattn.values.masks import Causal, Full

if TYPE_CHECKING:
    from torch import Tensor

#: The core's argument names in error messages, and this door's.
_WORDS: Final = {
    "scale": "softmax_scale",
    "check the layout argument": "the layout is [B, L, H, D]",
}
_FULL: Final = Full()
_TOP_LEFT: Final = Causal("top_left")


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
    are_nested = q.is_nested or k.is_nested or v.is_nested
    if are_nested or not q.ndim == k.ndim == v.ndim == 4:
        raise _not_dense(q, k, v)
    batch, len_q, heads, _ = q.shape
    len_kv = k.shape[1]
    if bias is not None:
        _check_bias(bias, len_q, len_kv)
    count = batch * heads * len_q * len_kv
    state = None
    if dropout_p:
        state = _next_state(count, q.device)
    else:
        _skip_state(count, q.device)
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    out: Tensor = attention(
        q,
        k,
        v,
        mask=_TOP_LEFT if causal else _FULL,
        scale=softmax_scale or None,
        bias=bias,
        dropout_p=dropout_p,
        dropout_state=state,
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
    generator.set_offset(offset + _rounded(increment))
    return seed, offset


def _not_dense(q: Tensor, k: Tensor, v: Tensor) -> CheckFailedError:
    """Return the error message for the first tensor that is not dense with four dimensions."""
    first = ((name, x) for name, x in (("q", q), ("k", k), ("v", v)) if x.is_nested or x.ndim != 4)
    name, tensor = next(first)
    return CheckFailedError(
        f"{name} is nested or has {tensor.ndim} dimensions: it must be a dense tensor "
        "[B, L, H, D]; FlashAttentionFunction takes nested ones"
    )


def _check_bias(bias: Tensor, len_q: int, len_kv: int) -> None:
    if bias.is_nested or bias.ndim != 4:
        raise CheckFailedError(
            f"bias is nested or has {bias.ndim} dimensions: it must be a dense tensor "
            "[B, H, Lq, Lkv]"
        )
    _, _, rows, columns = bias.shape
    if columns != len_kv or rows not in (1, len_q):
        raise ExtensionError(
            f"bias has shape {list(bias.shape)}: its last two sizes must be (1, {len_kv}) or "
            f"({len_q}, {len_kv}), as q has {len_q} rows and k {len_kv}; expand it, or cut it"
        )


def _next_state(count: int, device: torch.device) -> Tensor:
    """Draw the dropout state of a call, and advance the generator as the original does.

    The host waits for nothing: seed and offset of the generator decide what a kernel draws.
    """
    generator = _moving_generator(device)
    if generator is None:
        return dropout_state(device)
    before = generator.get_offset()
    state = dropout_state(device)
    generator.set_offset(before + _rounded(count))
    return state


def _skip_state(count: int, device: torch.device) -> None:
    """Advance the generator as a call without dropout does; the CPU's, without offsets, draws."""
    generator = _moving_generator(device)
    if generator is not None:
        generator.set_offset(generator.get_offset() + _rounded(count))
    elif device.type == "cpu":
        dropout_state(device)


def _moving_generator(device: torch.device) -> torch.Generator | None:
    """Return the generator of a GPU; None in captures and compiled graphs, which fix its offset.

    There torch moves it, by what was drawn, and draws anew in every replay.
    """
    if torch.compiler.is_compiling() or not _is_gpu(device):
        return None
    if torch.cuda.is_current_stream_capturing():
        return None
    index = torch.cuda.current_device() if device.index is None else device.index
    generator: torch.Generator = torch.cuda.default_generators[index]
    return generator


@functools.lru_cache(maxsize=64)
def _is_gpu(device: torch.device) -> bool:
    """Return whether a device is a GPU; cached, as `device.type` builds a string each time."""
    return device.type == "cuda"


def _rounded(count: int) -> int:
    return -(-count // 4) * 4
