"""Tests that the examples of the README run as they are written."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support import readme

pytestmark = pytest.mark.usefixtures("with_grad")


@pytest.mark.real_gpu
def test_every_example_runs_after_those_before_it() -> None:
    names: dict[str, Any] = {}
    for code in readme.examples():
        readme.run(code, names)
    assert names["out"].isfinite().all()
    assert names["q"].grad.isfinite().all()
    assert names["sdpa"].counts()["jitattn"] >= 1
