"""Compiling first, in parallel; GPU fixtures."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.support.grids import EDGE, FULL
from tests.support.precompile import compile_all, specs_of


@pytest.fixture(scope="session")
def arch() -> str:
    major, minor = torch.cuda.get_device_capability()
    return f"sm_{major}{minor}"


@pytest.fixture(scope="session", autouse=True)
def _precompiled(request: pytest.FixtureRequest) -> None:
    """Compile what the selected tests need in parallel; later calls find it on disk."""
    if not torch.cuda.is_available():
        return
    selected = {item.path.name for item in request.session.items}
    if "test_forward.py" not in selected:
        return
    major, minor = torch.cuda.get_device_capability()
    cases = EDGE + (FULL if request.config.getoption("--full") else ())
    compile_all(specs_of(cases, f"sm_{major}{minor}"))


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield
