"""Tests training on a GPU: loss curves, and what programs wrap around modules."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import jitattn
from jitattn.run import forward, operators
from tests.support.compare import rel_l2
from tests.support.training import (
    assert_curves_are_together,
    block,
    block_gradients,
    block_inputs,
    one_process,
)

pytestmark = [
    pytest.mark.real_gpu,
    pytest.mark.usefixtures("with_grad"),
    pytest.mark.filterwarnings("ignore:FSDP2-wrapped module"),
]


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_curves_are_together(dtype: torch.dtype | None) -> None:
    """A tiny Llama under eager, sdpa and jitattn, in fp32 and under autocast."""
    pytest.importorskip("transformers", minversion="5.0")
    from jitattn.integrations.transformers import register

    register()
    assert_curves_are_together("cuda", dtype)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2"])
@pytest.mark.skipif(not torch.distributed.is_nccl_available(), reason="needs NCCL")
def test_wrapped(wrapper: str, tmp_path: Path) -> None:
    plain, module = block("cuda"), block("cuda")
    expected = block_gradients(plain, plain, "cuda")
    with one_process("nccl", tmp_path):
        if wrapper == "ddp":
            run: Any = nn.parallel.DistributedDataParallel(module)
        else:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            run = fully_shard(module, mesh=init_device_mesh("cuda", (1,)))
        found = block_gradients(run, run, "cuda")
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert rel_l2(one, other) < 1e-5


def test_exported() -> None:
    module = block("cuda")
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(
        module, (block_inputs("cuda"),), dynamic_shapes={"x": {1: length}}
    )
    longer = block_inputs("cuda", 17)
    assert rel_l2(program.module()(longer), module(longer)) < 1e-6


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's own first one
@torch.no_grad()
def test_reduce_overhead_replays_the_decode_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the third step on the graph runs alone: no call of ours, and the same results."""
    keys, values = (torch.zeros(2, 64, 2, 64, device="cuda").half() for _ in range(2))
    lengths = torch.ones(2, dtype=torch.int32, device="cuda")
    for cache in (keys, values):  # a graph may write to what never moves
        torch._dynamo.mark_static_address(cache)

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        rows = torch.arange(2, device="cuda")
        keys[rows, lengths.long() - 1], values[rows, lengths.long() - 1] = k, v
        out: Tensor = jitattn.attention(q, keys, values, kv_seqs=jitattn.Padded(lengths))
        return out

    calls = []

    def counted(*args: Any) -> Any:
        calls.append(1)  # not its tensors: none of a graph's may live on
        return forward.run(*args)

    monkeypatch.setattr(operators, "run", counted)
    torch._dynamo.reset()
    compiled = torch.compile(step, mode="reduce-overhead", fullgraph=True)
    others = [keys.clone(), values.clone()]
    drawn = torch.randn(3, 8, 2, 1, 4, 64, device="cuda").half()
    for idx, (q, k, v) in enumerate(drawn.transpose(0, 1)):
        torch.compiler.cudagraph_mark_step_begin()
        before = len(calls)
        out = compiled(q, k[:, 0, :2], v[:, 0, :2], keys, values).clone()
        if idx > 3:
            assert len(calls) == before
        assert torch.equal(out, step(q, k[:, 0, :2], v[:, 0, :2], *others))
        lengths += 1


def test_nested() -> None:
    """A jagged batch, causal: each sequence as alone, gradients too."""
    generator = torch.Generator("cuda").manual_seed(3)
    lengths = (5, 190, 64)
    parts = [
        torch.randn(n, 4, 64, device="cuda", generator=generator, dtype=torch.bfloat16)
        for n in lengths
    ]
    q = torch.nested.nested_tensor(parts, layout=torch.jagged, requires_grad=True)
    out = jitattn.attention(q, q, q, mask=jitattn.Causal())
    (found,) = torch.autograd.grad(out.values().float().sin().sum(), q)
    for one, gradient, part in zip(out.unbind(), found.unbind(), parts, strict=True):
        leaf = part[None].clone().requires_grad_()
        alone = jitattn.attention(leaf, leaf, leaf, mask=jitattn.Causal())
        (wanted,) = torch.autograd.grad(alone.float().sin().sum(), leaf)
        assert rel_l2(one, alone[0]) < 1e-2
        assert rel_l2(gradient, wanted[0]) < 1e-2


@pytest.mark.parametrize("given", [{}, {"num_heads_kv": 2}, {"rotary_emb_dim": 32}], ids=str)
def test_mha(given: dict[str, Any]) -> None:
    """flash_attn.modules.mha, by our kernels and by its plain attention."""
    from jitattn.compat.flash_attn.modules.mha import MHA

    torch.manual_seed(0)
    modules = [
        MHA(256, 4, causal=True, use_flash_attn=flash, device="cuda", **given)
        for flash in (True, False)
    ]
    modules[1].load_state_dict(modules[0].state_dict())
    x = torch.randn(2, 150, 256, device="cuda")
    with torch.autocast("cuda", torch.float16):
        ours, plain = (module(x) for module in modules)
    assert rel_l2(ours, plain) < 5e-3
