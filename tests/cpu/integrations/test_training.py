"""Tests what training programs wrap around modules: checkpoints, DDP, FSDP2, export."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.support.compare import rel_l2
from tests.support.training import block, block_gradients, block_inputs, one_process


@pytest.fixture
def expected() -> list[Tensor]:
    module = block()
    return block_gradients(module, module)


def check(found: list[Any], expected: list[Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert rel_l2(one, other) < 1e-6


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoints(reentrant: bool, expected: list[Tensor]) -> None:
    module = block()

    def run(x: Tensor) -> Any:
        return checkpoint(module, x.requires_grad_(), use_reentrant=reentrant)

    check(block_gradients(run, module), expected)


@pytest.fixture
def _one_process(tmp_path: Path) -> Iterator[None]:
    with one_process("gloo", tmp_path):
        yield


needs_distributed = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="needs torch.distributed with gloo",
)


@needs_distributed
@pytest.mark.usefixtures("_one_process")
def test_ddp(expected: list[Tensor]) -> None:
    module = nn.parallel.DistributedDataParallel(block())
    check(block_gradients(module, module), expected)


@needs_distributed
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module")
@pytest.mark.usefixtures("_one_process")
def test_fsdp2(expected: list[Tensor]) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    module = block()
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    check(block_gradients(module, module), expected)


def test_export_for_any_length() -> None:
    module = block()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(module, (block_inputs(),), dynamic_shapes={"x": {1: length}})
    longer = block_inputs(length=17)
    assert rel_l2(program.module()(longer), module(longer)) < 1e-6


AHEAD_OF_TIME = """
import sys, torch
from tests.support.compare import rel_l2
from tests.support.training import block, block_inputs
module = block()
with torch.no_grad():
    program = torch.export.export(module, (block_inputs(),))
    package = torch._inductor.aoti_compile_and_package(program, package_path=sys.argv[1])
    found = torch._inductor.aoti_load_package(package)(block_inputs())
    print(rel_l2(found, module(block_inputs())) < 1e-6)
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_compiled_ahead_of_time(tmp_path: Path) -> None:
    """The operator is called by torch's C++, which makes None of an empty list.

    In a process of its own: torch's compiler leaves workers and pipes.
    """
    done = subprocess.run(
        [sys.executable, "-c", AHEAD_OF_TIME, str(tmp_path / "block.pt2")],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines()[-1:] == ["True"], done.stderr


def test_no_recompile_for_other_lengths() -> None:
    module = block()
    compiled = torch.compile(module, backend="eager", dynamic=True, fullgraph=True)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for length in (9, 17, 33, 64):
            x = block_inputs(length=length)
            assert rel_l2(compiled(x), module(x)) < 1e-6
