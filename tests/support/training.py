"""What training programs do with modules: a block of attention, its gradients, loss curves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import jitattn
from tests.support.models import model_of, tokens


class Block(nn.Module):
    """Self-attention of [B, L, 32] with projections."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        """Compute causal attention."""
        q, k, v = self.qkv(x).unflatten(-1, (3, 4, 8)).unbind(2)
        out = jitattn.attention(q, k, v, mask=jitattn.Causal())
        found: Tensor = self.out(out.flatten(-2))
        return found


def block(device: str = "cpu") -> Block:
    """Return a block, always with the same weights."""
    torch.manual_seed(0)
    return Block().to(device)


def block_inputs(device: str = "cpu", length: int = 9) -> Tensor:
    """Return inputs of a block, always the same."""
    return torch.randn(2, length, 32, generator=torch.Generator().manual_seed(length)).to(device)


def block_gradients(run: Any, module: nn.Module, device: str = "cpu") -> list[Tensor]:
    """Return gradients of the parameters of a block that something was wrapped around."""
    run(block_inputs(device)).sin().sum().backward()
    found = [p.grad for p in module.parameters() if p.grad is not None]
    return [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in found]


@contextmanager
def one_process(backend: str, folder: Path) -> Iterator[None]:
    """Be a group of one process."""
    store = torch.distributed.FileStore(str(folder / "store"), 1)
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


def losses(implementation: str, device: str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
    """Return the losses of 100 steps of a tiny Llama, under autocast if a dtype is given."""
    model = model_of("llama", implementation).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for step in range(100):
        ids = tokens(4, 24, seed=step % 5).to(device)
        with torch.autocast(device, dtype, enabled=dtype is not None):
            loss = model(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.detach())
    return torch.stack(found).float().cpu()


def assert_curves_are_together(device: str = "cpu", dtype: torch.dtype | None = None) -> None:
    """Assert that ours is within twice the distance of sdpa from eager, plus 1e-3."""
    eager, sdpa, ours = (losses(name, device, dtype) for name in ("eager", "sdpa", "jitattn"))
    assert eager[-1] < 0.5 * eager[0]
    assert (ours - eager).abs().max() <= 2 * (sdpa - eager).abs().max() + 1e-3
