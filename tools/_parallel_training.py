"""Trains a small GPT with FSDP2 and context parallelism, beside the curve of one GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist
from _table import print_table
from torch import nn
from torch.nn import functional as F  # noqa: N812

import jitattn
from jitattn.distributed import context_parallel_attention, plan, shard

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.distributed import Plan

_WORDS, _LAYERS, _HEADS, _HEADS_KV = 256, 4, 8, 4
_SIZES: Final = {"cuda": (4096, 64), "cpu": (96, 16)}  #: tokens, head dim
_MASK: Final = jitattn.Causal()


class _Layer(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim * _HEADS
        self.before, self.between = nn.RMSNorm(width), nn.RMSNorm(width)
        self.qkv = nn.Linear(width, dim * (_HEADS + 2 * _HEADS_KV), bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dim = dim

    def forward(self, x: Tensor, turns: Tensor, own: Plan | None) -> Tensor:
        """Compute a layer of this rank's tokens."""
        packed = self.qkv(self.before(x)).unflatten(-1, (-1, self.dim))
        q, k, v = packed.split((_HEADS, _HEADS_KV, _HEADS_KV), dim=2)
        q, k = (_turned(one, turns) for one in (q, k))
        if own is None:
            attended = jitattn.attention(q, k, v, mask=_MASK)
        else:
            attended = context_parallel_attention(q, k, v, mask=_MASK, plan=own)
        x = x + self.out(attended.flatten(2))
        found: Tensor = x + self.down(F.gelu(self.up(self.between(x))))
        return found


def _turned(x: Tensor, turns: Tensor) -> Tensor:
    """Apply rotary embedding, [rows, dim / 2] angles."""
    one, other = x.chunk(2, dim=-1)
    cos, sin = turns.cos()[:, None], turns.sin()[:, None]
    return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class _Gpt(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        width = dim * _HEADS
        self.words = nn.Embedding(_WORDS, width)
        self.layers = nn.ModuleList(_Layer(dim) for _ in range(_LAYERS))
        self.last = nn.Linear(width, _WORDS, bias=False)
        self.dim = dim

    def forward(self, tokens: Tensor, positions: Tensor, own: Plan | None) -> Tensor:
        """Return the logits of this rank's tokens."""
        rates = 1e4 ** (-torch.arange(0, self.dim, 2, device=tokens.device) / self.dim)
        turns = positions.to(tokens.device)[:, None] * rates
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, turns, own)
        found: Tensor = self.last(x)
        return found


def _curve(device: str, steps: int, own: Plan | None) -> list[float]:
    """Return the loss of every step; with a plan, of all ranks together."""
    length, dim = _SIZES[device]
    torch.manual_seed(0)
    model: Any = _Gpt(dim).to(device)
    ranks = 1 if own is None else dist.get_world_size()
    if own is not None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (ranks,))
        for layer in model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4)
    losses = []
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        # Words that repeat at a distance, so that attention has something to learn.
        tokens = torch.randint(0, _WORDS, (1, length // 2 + 1), generator=generator)
        tokens = torch.cat([tokens, tokens], dim=1)[:, : length + 1].to(device)
        given, wanted = tokens[:, :-1], tokens[:, 1:]
        positions = torch.arange(length)
        if own is not None:
            given, wanted = shard(given, own), shard(wanted, own)
            positions = own.position_ids
        logits = model(given, positions, own)
        loss = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), reduction="sum") / length
        optimizer.zero_grad()
        (loss * ranks).backward()  # FSDP averages over ranks
        optimizer.step()
        total = loss.detach().clone()
        if own is not None:
            dist.all_reduce(total)
        losses.append(float(total))
    return losses


def bench_train(device: str, steps: int) -> None:
    """Print the curves of one GPU and of all, and their largest difference."""
    length = _SIZES[device][0]
    one = _curve(device, steps, None)
    all_ranks = _curve(device, steps, plan(_MASK, length))
    if dist.get_rank():
        return
    shown = sorted({0, steps // 4, steps // 2, 3 * steps // 4, steps - 1})
    rows: list[tuple[object, ...]] = [
        (step, f"{one[step]:.5f}", f"{all_ranks[step]:.5f}") for step in shown
    ]
    gap = max(abs(a - b) for a, b in zip(one, all_ranks, strict=True))
    rows.append(("largest difference", "", f"{gap:.2e}"))
    title = f"loss of a GPT with FSDP2 and context parallelism, {length} tokens in fp32"
    print_table(title, ("step", "one GPU", f"{dist.get_world_size()} ranks"), rows)
