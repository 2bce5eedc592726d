"""Tests that the examples of the README run as they are written, on the CPU path."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import readme


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_every_example_runs_after_those_before_it() -> None:
    names: dict[str, Any] = {}
    examples = readme.examples()
    assert len(examples) == 3
    for code in examples:
        readme.run(code, names, "cpu")
    assert names["out"].shape == (1, 8, 32, 128)
    assert names["q"].grad.isfinite().all()
    assert names["sdpa"].counts()["jitattn"] == 0  # SDPA's calls on a CPU stay torch's
