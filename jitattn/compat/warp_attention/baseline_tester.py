"""Times attention in plain PyTorch and by SDPA, as the original's scripts do; [B, L, H, D]."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.compat.warp_attention.util import attn_flop, cuda_timeit
from jitattn.values.autocast import matmul, outside_autocast

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@outside_autocast
def attn(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    """Compute attention with all scores in memory; causal aligned to the bottom right."""
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    scores = matmul(q, k.transpose(2, 3)) * q.shape[3] ** -0.5
    if is_causal:
        rows, columns = scores.shape[2:]
        hidden = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
        scores = scores.masked_fill(hidden.triu(columns - rows + 1), float("-inf"))
    out = matmul(scores.softmax(3), v)
    return out.transpose(1, 2)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out: Tensor = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    return out.transpose(1, 2)


def _flash(query: Tensor, key: Tensor, value: Tensor, is_causal: bool = False) -> Tensor:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.FLASH_ATTENTION):
        return _sdpa(query, key, value, is_causal)


def _tester(function: Callable[..., Tensor]) -> Callable[..., Any]:
    def test(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        loops: int = 1,
        warmup_loops: int = 1,
        verbose: int = 1,
        is_causal: bool = False,
        return_output: bool = False,
        **kw: Any,  # noqa: ANN401 - taken and dropped, as there
    ) -> Any:  # noqa: ANN401
        """Time one implementation: seconds, or (seconds, output)."""
        del kw
        given = {"query": query, "key": key, "value": value, "is_causal": is_causal}
        output, seconds = cuda_timeit(function, given, loops, verbose=0, warmup_loops=warmup_loops)
        if verbose:
            report(function.__name__.strip("_"), query, key, is_causal, seconds)
        return (seconds, output) if return_output else seconds

    return test


test_torch_naive = _tester(attn)
test_torch_sdpa = _tester(_sdpa)  #: with a causal mask aligned to the top left
test_flash_attn = _tester(_flash)  #: SDPA's FlashAttention-2, with the same mask


def report(name: str, query: Tensor, key: Tensor, is_causal: bool, seconds: float) -> None:
    """Print one line."""
    batch, len_q, heads, dim = query.shape
    rate = attn_flop(batch, len_q, key.shape[1], dim, heads, is_causal, fma=False) / seconds
    print(f"{name}: {seconds * 1e6:.1f} us, {rate / 1e12:.2f} TFLOP/s")  # noqa: T201
