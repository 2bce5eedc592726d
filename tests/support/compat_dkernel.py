"""Dense fp64 reference of dkernel's documented semantics."""

from __future__ import annotations

import torch
from torch import Tensor

from .compare import assert_same_gradients, rel_l2

#: Head dim, and tokens of a block.
D, SIZE = 16, 16


def sees(
    heads: int,
    i: int,
    j: int,
    local: tuple[int, int],
    stride: int,
    *,
    head: int,
    heads_kv: int,
    offset: int = 0,
    dense: int = 0,
    causal: bool = True,
    homo: bool = False,
) -> bool:
    """Return whether block i sees block j."""
    if causal and j > i:
        return False
    own = head // (heads // heads_kv)
    if own >= heads_kv - dense:
        return True
    if not causal:
        return (max(0, i - j - local[0] + 1) + max(0, j - i - local[1] + 1)) % stride == 0
    step = max(1, stride // (1 if homo else heads))
    return i - j < local[0] or (j + (0 if homo else own * step) + offset) % stride == 0


def blocks(heads: int, rows: int, columns: int, *rule: object, **more: object) -> Tensor:
    """Return the pattern [heads, rows, columns]."""
    return torch.tensor(
        [
            [
                [sees(heads, i, j, *rule, head=h, **more) for j in range(columns)]  # type: ignore[arg-type]
                for i in range(rows)
            ]
            for h in range(heads)
        ]
    )


def dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Tensor,
    size: int,
    causal: bool = True,
    scale: float | None = None,
    first_row: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (out [Lq, H, D], lse [H, Lq]) of q [Lq, H, D], k and v [Lkv, Hkv, D].

    pattern: [1 or H, rows, columns]; row 0 is the block of position `first_row`, 0 if left out.
    Blocks outside the pattern are not seen.
    """
    (len_q, heads, dim), (len_kv, heads_kv) = q.shape, k.shape[:2]
    position = torch.arange(len_q, device=q.device) + len_kv - len_q
    row = (position - (first_row or 0)) // size
    key = torch.arange(len_kv, device=q.device)
    rows, columns = pattern.shape[1:]
    inside = ((row >= 0) & (row < rows))[:, None] & (key // size < columns)
    seen = pattern.to(q.device)[:, row.clamp(0, rows - 1)]
    seen = seen[:, :, (key // size).clamp(max=columns - 1)] & inside
    if causal:
        seen = seen & (key <= position[:, None])
    wide = [x.double().transpose(0, 1).repeat_interleave(heads // heads_kv, 0) for x in (k, v)]
    scores = q.double().transpose(0, 1) @ wide[0].transpose(1, 2)
    scores = scores * (scale or dim**-0.5)
    scores = scores.masked_fill(~seen.to(q.device), float("-inf"))
    weights = torch.softmax(scores, 2).nan_to_num(0.0)
    return (weights @ wide[1]).transpose(0, 1), torch.logsumexp(scores, 2)


def first_row(shape: tuple[int, int], len_q: int, len_kv: int, causal: bool) -> int:
    """Return the position among the keys at which row 0 of a pattern [rows, columns] begins.

    Square patterns count from the first key. All others from query 0; one query alone has the row
    of its position, if there is more than one. So has query 0 of a square pattern that is not
    causal, if there are more queries than keys.
    """
    past = len_kv - len_q
    if shape[0] == shape[1]:
        return past if past < 0 and not causal else 0
    return min(past, 0) if len_q == 1 and shape[0] > 1 else past


def tensors(
    len_q: int, len_kv: int, heads: tuple[int, int] = (4, 2), seed: int = 0
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = ((2, len_q, heads[0], D), (2, len_kv, heads[1], D), (2, len_kv, heads[1], D))
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def check(
    result: Tensor, truth: Tensor, leaves: list[Tensor], lses: tuple[Tensor, Tensor] | None = None
) -> None:
    """Values, and gradients of all leaves; with LSEs, ours and true ones, through both."""
    assert result.shape == truth.shape
    assert rel_l2(result, truth) < 1e-5
    results, truths = [result], [truth]
    if lses is not None:
        torch.testing.assert_close(lses[0], lses[1].float())
        results.append(lses[0])
        truths.append(lses[1])
    generator = torch.Generator().manual_seed(7)
    given = [torch.randn(x.shape, generator=generator) for x in truths]
    assert_same_gradients(results, truths, leaves, given, 1e-4)
