"""Building side by side: what becomes of a kernel whose worker dies."""

from __future__ import annotations

import os
from typing import Any

import pytest

from jitattn.jit.prebuild import build_all

from .specs import merge_spec


class _Deadly:
    """Ends the worker that unpickles it, as the kernel's memory killer would."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (9,)


@pytest.mark.slow
def test_dead_worker_is_an_outcome() -> None:
    specs: list[Any] = [_Deadly(), merge_spec()]
    outcomes = list(build_all(specs, jobs=2))
    assert len(outcomes) == 2
    dead = next(outcome for outcome in outcomes if outcome.spec is specs[0])
    assert dead.origin == "failed"
    assert "worker process died" in dead.error
