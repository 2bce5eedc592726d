"""Tests context-parallel attention by kernels: several processes on one GPU, which speak gloo."""

from __future__ import annotations

import pytest
import torch

from tests.support.parallel import in_own_process

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo"),
]
#: Largest error of values and gradients, relative to the largest value, beside fp64.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2, "float16": 4e-3}


def errors(ranks: int, dtype: str, cases: str = "", emulate: str | None = None) -> dict[str, float]:
    """Errors of the cases on a GPU, or on an emulated one."""
    more = ["--dtype", dtype, "--cases", cases]
    more += [] if emulate is None else ["--emulate", emulate]
    found: dict[str, float] = in_own_process(
        "tests.support.parallel", str(ranks), *more, timeout=1800
    )
    return found


@pytest.mark.real_gpu
@pytest.mark.parametrize(
    ("ranks", "dtype", "cases", "fewest"),
    [
        (2, "bfloat16", "blocks", 12),
        (3, "float32", "causal", 9),
        (4, "float16", "documents, ", 10),
    ],
)
def test_as_one_process(ranks: int, dtype: str, cases: str, fewest: int) -> None:
    """Parts of the grid; all of it is ``python -m tests.support.parallel RANKS --dtype DTYPE``."""
    found = errors(ranks, dtype, cases)
    assert len(found) >= fewest
    assert not {name: error for name, error in found.items() if not error <= TOLERANCE[dtype]}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("cases", "fewest"), [("causal fp32", 3), ("documents, window", 9), ("near window", 6)]
)
def test_a_part_of_the_grid(
    dtype: str, cases: str, fewest: int, request: pytest.FixtureRequest
) -> None:
    """Also with --emulate."""
    found = errors(2, dtype, cases, request.config.getoption("--emulate"))
    assert len(found) >= fewest
    assert max(found.values()) < TOLERANCE[dtype]
