"""Tests that the examples of the README run as they are written, on the CPU path."""

from __future__ import annotations

from typing import Any

import pytest

import jitattn
from tests.support import readme


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*nested tensor:UserWarning")
def test_every_example_runs_after_those_before_it() -> None:
    names: dict[str, Any] = {}
    examples = readme.examples()
    assert len(examples) == 9
    for code in examples:
        if "warmup(preset=" in code:  # loads kernels, which needs a GPU; what is before it does not
            with pytest.raises(jitattn.UnsupportedError, match="torch sees no CUDA device"):
                readme.run(code, names, "cpu")
        else:
            readme.run(code, names, "cpu")
    assert names["out"].shape == (1, 8, 32, 128)
    assert names["q"].grad.isfinite().all()
    assert names["logits"].shape == (1, 64, 256)
