"""Compiles the tests' kernels in parallel beforehand, and defines GPU fixtures."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch

from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.run import forward
from tests.support.emulator import emulated, missing
from tests.support.grids import EDGE, FULL
from tests.support.precompile import CompileOnce, compile_once, specs_of


@pytest.fixture(scope="session", autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    arch = request.config.getoption("--emulate")
    if arch is None:
        yield
        return
    if missing():
        pytest.fail(f"--emulate: {missing()}")
    with emulated(arch, watched=request.config.getoption("--watch")):
        yield


@pytest.fixture(scope="session", autouse=True)
def _autograds_thread_has_a_context(_emulated: None, request: pytest.FixtureRequest) -> None:
    """Give it one: where its first work is a product of torch's own, cuBLAS warns."""
    if request.config.getoption("--emulate") is not None or not torch.cuda.is_available():
        return
    x = torch.ones(2, 2, device="cuda", requires_grad=True)
    with warnings.catch_warnings(), torch.enable_grad():
        warnings.simplefilter("ignore")
        (x @ x).sum().backward()


@pytest.fixture(scope="session")
def arch(_emulated: None) -> str:
    return device(0).arch


@pytest.fixture(scope="module")
def wgmma_family(arch: str) -> Iterator[None]:
    """Let calls take the wgmma kernels of sm_90, whatever the environment says."""
    if arch != "sm_90" or not backend.active.encodes_maps():
        pytest.skip("needs a GPU of sm_90, and a driver that encodes tensor maps")
    yield from _family("sm90")


@pytest.fixture(scope="module")
def mma_family(arch: str) -> Iterator[None]:
    """Let calls take the mma.sync kernels alone."""
    yield from _family("sm80")


def _family(name: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITATTN_FAMILY", name)
        forward.forget_kernels()
        yield
    forward.forget_kernels()


@pytest.fixture(scope="session", name="compile_once")
def _compile_once(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CompileOnce:
    """Compile in parallel; in one process, if several share the run."""
    if request.config.getoption("--emulate") is not None:
        return lambda _: []
    folder = tmp_path_factory.getbasetemp()
    # A worker of pytest-xdist has its own folder in one of the run.
    shared = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    return lambda specs: compile_once(specs, shared)


@pytest.fixture(scope="module")
def _precompiled(request: pytest.FixtureRequest, arch: str, compile_once: CompileOnce) -> None:
    """Compile what the grids need."""
    cases = EDGE + (FULL if request.config.getoption("--full") else ())
    compile_once(specs_of(cases, arch))  # a test meets an error again


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def with_grad(_no_grad: None) -> Iterator[None]:
    with torch.enable_grad():
        yield
