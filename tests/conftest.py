"""Defines command-line options and seeds, and skips tests that this machine cannot run."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path

import pytest

SEED = 20260301
GPU_TESTS = Path(__file__).parent / "gpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full", action="store_true", help="run the FULL grid as well (minutes; GPU only)"
    )
    parser.addoption(
        "--emulate", metavar="ARCH", help="run the GPU tests on the processor, as on sm_86, say"
    )
    parser.addoption(
        "--watch", action="store_true", help="with --emulate: look at every access to memory, too"
    )
    parser.addoption(
        "--matrix-cache", help="keep the kernels of the short compile matrices in this cache"
    )
    parser.addoption(
        "--names-table", help="write the table of the five systems' names and their tests there"
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device of sm_80 or newer, and CuPy")
    config.addinivalue_line("markers", "slow: over 2 s")
    config.addinivalue_line("markers", "real_gpu: what --emulate cannot stand in for")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    gpu_items = [item for item in items if GPU_TESTS in item.path.parents]
    if not gpu_items:
        return
    is_emulated = config.getoption("--emulate") is not None
    missing = "" if is_emulated else missing_capability()
    for item in gpu_items:
        item.add_marker(pytest.mark.gpu)
        if is_emulated and item.get_closest_marker("real_gpu") is not None:
            item.add_marker(pytest.mark.skip(reason="an emulator cannot stand in for the GPU here"))
        if missing:
            item.add_marker(pytest.mark.skip(reason=missing))


def missing_capability() -> str:
    """What a GPU test lacks on this machine; empty if nothing."""
    import torch

    if not torch.cuda.is_available():
        return "needs a CUDA device of sm_80 or newer (torch sees no CUDA device)"
    if torch.cuda.get_device_capability() < (8, 0):
        major, minor = torch.cuda.get_device_capability()
        return f"needs a CUDA device of sm_80 or newer (this one is sm_{major}{minor})"
    if importlib.util.find_spec("cupy") is None:
        return "needs CuPy (install the extra cu12 or cu13)"
    return ""


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state; grids seed themselves by case name."""
    random.seed(SEED)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(SEED)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(SEED)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item):
    report = yield
    if report.failed:
        report.sections.append(("seed", str(SEED)))
    return report


@pytest.fixture
def full_grid(request: pytest.FixtureRequest) -> None:
    """Skip unless the FULL grid was asked for."""
    if not request.config.getoption("--full"):
        pytest.skip("the FULL grid runs with --full")
