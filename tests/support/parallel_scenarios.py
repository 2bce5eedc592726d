"""What a group of ranks is made to do, beside the grid: composition, decoding, disagreement, death.

``python -m tests.support.parallel_scenarios`` forks groups of ranks, which speak gloo, and prints a
line of JSON: what each rank saw in every scenario.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import jitattn
from jitattn import Causal, Full, MaskMod, Paged, PerHead, Window
from jitattn.distributed import context_parallel_attention, decode_attention, plan, shard, unshard
from tests.support.parallel import on_ranks
from tests.support.parallel_cases import drawn

LENGTH, HEADS, DIM = 37, (4, 2), 8
MASK = Window(11, 0, 3)


def _qkv(dtype: torch.dtype = torch.float64, heads: tuple[int, int] = HEADS) -> list[Tensor]:
    sizes = (heads[0], heads[1], heads[1])
    return [
        drawn(1, LENGTH, size, DIM, dtype=dtype, seed=idx).requires_grad_()
        for idx, size in enumerate(sizes)
    ]


def _gap(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).detach().abs().max()) if found.numel() else 0.0


# ---- What works


def bitwise(rank: int) -> list[bool]:
    """Two runs of every method give the same bits, gradients too."""
    own = plan(MASK, LENGTH, layout="zigzag")
    found = []
    for method in ("ring", "allgather", "ulysses"):
        runs = []
        for _ in range(2):
            leaves = [shard(x.detach(), own).requires_grad_() for x in _qkv(torch.float32)]
            out = context_parallel_attention(
                *leaves, mask=MASK, plan=own, method=method, deterministic=True
            )
            out.square().sum().backward()
            runs.append([out.detach(), *(x.grad for x in leaves)])
        found.append(all(torch.equal(a, b) for a, b in zip(*runs, strict=True)))
    return found


def sharded_and_back(rank: int) -> float:
    """`unshard` undoes `shard`, in every dimension, and gradients go the same way."""
    worst = 0.0
    for layout in ("contiguous", "zigzag", "striped"):
        for dim in (0, 1, -1):
            shape = [3, 5, 4]
            shape[dim] = LENGTH
            x = drawn(*shape).requires_grad_()
            own = plan(Causal(), LENGTH, layout=layout)
            back = unshard(shard(x, own, dim), own, dim)
            weights = drawn(*shape, seed=1)
            (back * weights).sum().backward()
            mine = shard(weights, own, dim)
            worst = max(worst, _gap(back, x), _gap(shard(x.grad, own, dim), mine))
    return worst


def dtensors(rank: int) -> dict[str, Any]:
    """DTensors in and out, gradients too; one that is not sharded on the sequence is refused."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = _qkv()
    wanted, wanted_lse = jitattn.attention(*whole, mask=MASK, return_lse=True)
    weights = drawn(*wanted.shape, seed=5)
    gradients = torch.autograd.grad((wanted * weights).sum(), whole)
    parts = [distribute_tensor(x.detach(), mesh, [Shard(1)]).requires_grad_() for x in whole]
    out, lse = context_parallel_attention(*parts, mask=MASK, return_lse=True)
    (out * distribute_tensor(weights, mesh, [Shard(1)])).sum().backward()
    gaps = [_gap(out.full_tensor(), wanted), _gap(lse.full_tensor(), wanted_lse)]
    gaps += [_gap(x.grad.full_tensor(), dx) for x, dx in zip(parts, gradients, strict=True)]
    placements = [str(x.placements) for x in (out, parts[0].grad)]
    refused = ""
    try:
        context_parallel_attention(*(x.redistribute(mesh, [Replicate()]) for x in parts))
    except jitattn.UnsupportedError as error:
        refused = str(error)
    return {"gap": max(gaps), "placements": placements, "refused": refused}


def on_a_mesh(rank: int) -> float:
    """DTensors on a mesh of two dimensions, in shards of different lengths."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ring", "ulysses"))
    whole, both = _qkv(), [Shard(1), Shard(1)]
    wanted = jitattn.attention(*whole, mask=MASK)
    gradients = torch.autograd.grad(wanted.square().sum(), whole)
    parts = [distribute_tensor(x.detach(), mesh, both).requires_grad_() for x in whole]
    out = context_parallel_attention(*parts, mask=MASK)
    out.square().sum().backward()
    gaps = [_gap(out.full_tensor(), wanted)]
    gaps += [_gap(x.grad.full_tensor(), dx) for x, dx in zip(parts, gradients, strict=True)]
    return max(gaps)


class Block(nn.Module):
    """An attention layer of a language model."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48, dtype=torch.float64)
        self.last = nn.Linear(16, 16, dtype=torch.float64)

    def forward(self, x: Tensor, **given: Any) -> Tensor:
        q, k, v = self.qkv(x).view(*x.shape[:2], 3, 4, 4).unbind(2)
        return x + self.last(self.attend(q, k, v, **given).flatten(2))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, **given: Any) -> Tensor:
        found: Tensor = context_parallel_attention(q, k, v, **given)
        return found


def wrapped(rank: int) -> dict[str, float]:
    """Gradients of a module under FSDP2, activation checkpoints and torch.compile."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    module = Block()
    x = drawn(2, LENGTH, 16)
    own = plan(Causal(), LENGTH)
    alone = dist.new_group([rank], use_local_synchronization=True)
    module(x, mask=Causal(), group=alone).square().sum().backward()
    wanted = [p.grad.clone() for p in module.parameters()]
    found = {}
    for name in ("plain", "checkpoint", "reentrant", "compiled", "fsdp2"):
        torch.manual_seed(0)
        again: Any = Block()
        call: Callable[..., Tensor] = functools.partial(again, mask=Causal(), plan=own)
        if name in ("checkpoint", "reentrant"):
            call = functools.partial(checkpoint, call, use_reentrant=name == "reentrant")
        elif name == "compiled":
            call = torch.compile(call, backend="eager")
        elif name == "fsdp2":
            fully_shard(again, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
        call(shard(x, own).requires_grad_()).square().sum().backward()
        gaps = []
        for p, gradient in zip(again.parameters(), wanted, strict=True):
            if name == "fsdp2":  # which averages over ranks
                total = p.grad.full_tensor() * dist.get_world_size()
            else:
                total = p.grad.clone()
                dist.all_reduce(total)
            gaps.append(_gap(total, gradient) / float(gradient.abs().max()))
        found[name] = max(gaps)
    return found


def cast(rank: int) -> dict[str, Any]:
    """Inside autocast."""
    q, k, v = _qkv(torch.float32)
    own = plan(Causal(), LENGTH)
    with torch.autocast("cpu", torch.bfloat16):
        wanted = jitattn.attention(q, k, v, mask=Causal())
        leaves = [shard(x.detach(), own).requires_grad_() for x in (q, k, v)]
        out = context_parallel_attention(*leaves, mask=Causal(), plan=own)
    out.sum().backward()
    gap = _gap(out.float(), shard(wanted, own).float())
    return {"gap": gap, "dtypes": [str(out.dtype), str(leaves[0].grad.dtype)]}


def decoding(rank: int) -> dict[str, float]:
    """Steps over a cache whose keys ranks share, beside one process with all of them."""
    size = dist.get_world_size()
    batch, total = 2, 41
    ends = [total * idx // size for idx in range(size + 1)]
    k, v = (drawn(batch, total, 2, DIM, seed=idx) for idx in (1, 2))
    mine = slice(ends[rank], ends[rank + 1])
    start = ends[rank]
    pattern = torch.rand(6, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    slopes, sinks = drawn(4).abs(), drawn(4, seed=1)
    cases: dict[str, dict[str, Any]] = {
        "full": {},
        "causal": {"mask": Causal()},
        "window": {"mask": Window(20, 0, 3)},
        "decode": {"mask": Window(5, 0, 1, full_on_decode=True)},
        "blocks": {"mask": jitattn.BlockSparse(pattern, 8, causal=True)},
        "stride": {"mask": jitattn.LocalStride(8, 1, 3)},
        "heads": {"mask": PerHead([Causal(), Window(4, 0), Full(), Causal()])},
        "function": {"mask": Causal() & MaskMod(lambda b, h, i, j: (i - j) % 3 != 1)},
        "sinks": {"sinks": sinks, "softcap": 3.0},
        "slopes": {"alibi_slopes": slopes, "mask": Causal()},
        "slopes by sequence": {"alibi_slopes": drawn(2, 4).abs()},
        "fp32": {"out_dtype": torch.float32},
    }
    found = {}
    for name, given in cases.items():
        for rows in (1, 3):
            dtype = torch.bfloat16 if name == "fp32" else torch.float64
            q = drawn(batch, rows, 4, DIM, dtype=dtype)
            own_k, own_v = k.to(dtype), v.to(dtype)
            for layout in ("bshd", "bhsd"):
                turned = [x.transpose(1, 2) if layout == "bhsd" else x for x in (q, own_k, own_v)]
                named: dict[str, Any] = {**given, "layout": layout, "return_lse": True}
                if name in ("blocks", "function"):
                    named["q_offset"] = total - rows
                wanted = jitattn.attention(*turned, **named)
                named.pop("q_offset", None)
                axis = 1 if layout == "bshd" else 2
                parts = [x.narrow(axis, mine.start, mine.stop - mine.start) for x in turned[1:]]
                out = decode_attention(turned[0], *parts, kv_start=start, **named)
                gap = max(_gap(a, b) for a, b in zip(out, wanted, strict=True))
                found[name] = max(found.get(name, 0.0), gap)
    found |= _paged(rank, k, v, ends)
    return found


def _paged(rank: int, k: Tensor, v: Tensor, ends: list[int]) -> dict[str, float]:
    """Pages, and sequences of different lengths, of which a rank may have none."""
    lengths = torch.tensor([41, 9])
    pages = torch.zeros(24, 4, 2, DIM, dtype=torch.float64), torch.zeros(24, 4, 2, DIM).double()
    own = (lengths - ends[rank]).clamp(0, ends[rank + 1] - ends[rank])
    table = torch.arange(24).view(2, 12)
    for b in range(2):
        for row in range(int(own[b])):
            for page, x in zip(pages, (k, v), strict=True):
                page[table[b, row // 4], row % 4] = x[b, ends[rank] + row]
    q = drawn(2, 1, 4, DIM)
    seqs = Paged(table.int(), own.int())
    wanted = jitattn.attention(q, k, v, kv_seqs=jitattn.Padded(lengths.int()), mask=Window(12, 0))
    starts = torch.full((2,), ends[rank], dtype=torch.int32)
    given: dict[str, Any] = {"kv_seqs": seqs, "mask": Window(12, 0)}
    outs = [
        decode_attention(q, *pages, **given, kv_start=starts),
        decode_attention(q, *pages, **given, kv_start=ends[rank], q_start=lengths.int() - 1),
    ]
    return {"pages": max(_gap(out, wanted) for out in outs)}


# ---- What does not


def _message(call: Callable[[], Any]) -> str:
    try:
        call()
    except jitattn.JitAttnError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _seqs(odd: bool) -> jitattn.Ragged:
    return jitattn.Ragged(torch.tensor([0, 9]), torch.tensor([9, 8 if odd else 7]))


def disagreement(rank: int) -> dict[str, str]:
    """Every rank gets an error that names rank and argument, and the group goes on working."""
    size = dist.get_world_size()
    q, k, v = (x.detach() for x in _qkv(torch.float32))
    own = plan(Causal(), LENGTH, layout="contiguous")
    mine = [shard(x, own) for x in (q, k, v)]
    odd = rank == size - 1
    call = context_parallel_attention
    table = torch.zeros(1, 3)
    cases: dict[str, Callable[[], Any]] = {
        "heads": lambda: call(*(mine if not odd else [mine[0][:, :, :2], *mine[1:]])),
        "dtype": lambda: call(*(x.half() if odd else x for x in mine)),
        "head_dim": lambda: call(*(x[..., :4] if odd else x for x in mine), plan=own),
        "mask": lambda: call(*mine, mask=Window(3 + rank)),
        "method": lambda: call(*mine, method="ring" if odd else "allgather"),
        "scale": lambda: call(*mine, scale=0.5 if odd else 0.25, plan=own),
        "own": lambda: call(mine[0], mine[1], mine[2][:, 1:] if odd else mine[2]),
        "rows": lambda: call(*(x[:, 1:] if odd else x for x in mine), plan=own),
        "given": lambda: call(*mine, relative_bias=table if odd else None),
        "bias": lambda: call(*mine, bias=torch.zeros(1, 1, 1, 1)),
        "dense": lambda: call(*mine, mask=jitattn.Dense(torch.ones(1, 1, 1, 1).bool())),
        "too few heads": lambda: call(*(x[:, :, :1] for x in mine), method="ulysses"),
        "two dimensions": lambda: call(*mine, method="hybrid"),
        "state": lambda: call(*mine, dropout_p=0.5),
        "plan": lambda: call(*mine, plan=own if odd else None),
        "documents": lambda: call(*(x[0] for x in mine), q_seqs=_seqs(odd), kv_seqs=_seqs(odd)),
        "padding": lambda: call(*mine, mask=jitattn.KeyPadding(torch.ones(1, 4).bool())),
    }
    found = {name: _message(one) for name, one in cases.items()}
    wanted = jitattn.attention(q, k, v, mask=Causal())
    out = call(*mine, mask=Causal(), plan=own)
    found["afterwards"] = str(_gap(out, shard(wanted, own)) < 1e-5)
    return found


def debugging(rank: int) -> list[str]:
    """With JITATTN_DEBUG=1 ranks are compared at every call, also of a known signature."""
    own = plan(Causal(), LENGTH)
    mine = [shard(x.detach(), own) for x in _qkv(torch.float32)]
    for scale in (0.25, 0.5):  # every rank has made both calls
        context_parallel_attention(*mine, plan=own, scale=scale)
    os.environ["JITATTN_DEBUG"] = "1"
    scale = 0.25 if rank else 0.5
    return [_message(lambda: context_parallel_attention(*mine, plan=own, scale=scale))]


def death(rank: int, method: str) -> dict[str, Any]:
    """The last rank dies between two calls; the others get an error, and do not hang."""
    own = plan(Causal(), LENGTH)
    mine = [shard(x.detach(), own) for x in _qkv(torch.float32, (4, 4))]
    given: dict[str, Any] = {"mask": Causal(), "plan": own, "method": method}
    context_parallel_attention(*mine, **given)
    if rank == dist.get_world_size() - 1:
        os.kill(os.getpid(), signal.SIGKILL)
    start = time.monotonic()
    message = ""
    while not message and time.monotonic() - start < 30:
        message = _message(lambda: context_parallel_attention(*mine, **given))
    return {"message": message, "seconds": time.monotonic() - start}


def mistake(rank: int) -> dict[str, Any]:
    """A rank's argument is wrong in a call that the others have made before, and do not compare."""
    own = plan(Causal(), LENGTH)
    q, k, v = (shard(x.detach(), own) for x in _qkv(torch.float32))
    given: dict[str, Any] = {"mask": Causal(), "plan": own, "method": "ring"}
    context_parallel_attention(q, k, v, **given)
    start = time.monotonic()
    k = k.half() if rank else k
    message = _message(lambda: context_parallel_attention(q, k, v, **given))
    return {"message": message, "seconds": time.monotonic() - start}


WORKING = (bitwise, sharded_and_back, dtensors, wrapped, cast, decoding)
FAILING = (disagreement, debugging)
TIMEOUT = 5.0


def main() -> None:
    torch.set_num_threads(1)

    def work(rank: int) -> dict[str, Any]:
        return {one.__name__: one(rank) for one in (*WORKING, *FAILING)}

    found = {str(ranks): on_ranks(ranks, work) for ranks in (2, 3)}
    found["mistake"] = on_ranks(2, mistake, timeout=TIMEOUT)
    found["mesh"] = on_ranks(4, on_a_mesh)
    for method in ("ring", "allgather", "ulysses"):
        answers = on_ranks(
            3, functools.partial(death, method=method), timeout=TIMEOUT, keeps_failures=True
        )
        found[f"death, {method}"] = answers[:-1]
    print(json.dumps(found))  # noqa: T201


if __name__ == "__main__":
    main()
