"""Tests calls whose key count is new, which share state: as decoding steps, on a GPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

import jitattn
from jitattn.errors import UnsupportedError
from jitattn.plan import forward as plan
from jitattn.request import request
from jitattn.run import forward as run
from tests.support.emulator import EmulatedKernel, emulated

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

LENGTHS = [700, *range(2, 12), *range(250, 262), 4000, 3999, *range(1020, 1100, 9), 1, 700]
CACHES = {dtype: torch.zeros(2, 4000, 2, 64, dtype=dtype) for dtype in (torch.half, torch.float)}


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Kernels that are launched, with grids and arguments but no addresses; none is run."""
    found: list[Any] = []

    def note(kernel: EmulatedKernel, grid: int, given: bytes) -> None:
        blank = bytearray(given)
        for offset, code in kernel.spec.arguments.offsets().values():
            if code == "Q":  # an address, which may be none
                blank[offset : offset + 8] = bytes([any(blank[offset : offset + 8])]) * 8
        found.append((kernel.spec, grid, bytes(blank)))

    monkeypatch.setattr(EmulatedKernel, "run", note)
    monkeypatch.setenv("JITATTN_FAMILY", "sm80")  # tensor maps hold the key count
    run.forget_kernels()
    with emulated("sm_90"):
        yield found
    run.forget_kernels()


def attend(q: Tensor, length: int, **given: Any) -> list[tuple[Any, ...]]:
    """Call on so many keys of the cache; return what is known of the results."""
    k = CACHES[q.dtype][: len(q), :length]
    if given.get("layout") == "bhsd":
        q, k = q.transpose(1, 2), k.transpose(1, 2)
    found = jitattn.attention(q, k, k, **given)
    return [(x.shape, x.stride(), x.dtype) for x in (found if given.get("return_lse") else [found])]


CALLS: dict[str, Any] = {
    "a step": (1, 1, torch.float16, {}),
    "of a batch": (2, 1, torch.float16, {"mask": jitattn.Causal(), "return_lse": True}),
    "from the top left": (1, 5, torch.float16, {"mask": jitattn.Causal("top_left")}),
    "many queries": (1, 200, torch.float16, {"mask": jitattn.Causal()}),
    # At some key counts it is computed in fp16 parts.
    "fp32": (2, 800, torch.float32, {}),
    "a number": (1, 1, torch.float16, {"scale": -0.5, "mask": jitattn.Causal()}),
    "heads first": (2, 3, torch.float16, {"layout": "bhsd", "mask": jitattn.Causal()}),
    "splits": (1, 1, torch.float16, {"num_splits": 3, "out_dtype": torch.float32}),
    "a gear": (2, 100, torch.float16, {"gear": 4}),
    # The lengths are in its score arguments, too: it is checked and planned at each.
    "a window": (1, 1, torch.float16, {"mask": jitattn.Window(100, 0)}),
}


@pytest.mark.parametrize("name", CALLS)
def test_launches_are_those_of_a_first_call(name: str, launched: list[Any]) -> None:
    batch, len_q, dtype, given = CALLS[name]
    q = torch.zeros(batch, len_q, 8, 64, dtype=dtype)
    shapes = [attend(q, length, **given) for length in LENGTHS]
    ours = launched.copy()
    launched.clear()
    for length, shape in zip(LENGTHS, shapes, strict=True):
        run.forget_kernels()
        assert attend(q, length, **given) == shape
    assert (len({spec.family for spec, _, _ in ours}) > 1) == (name in {"fp32", "a gear"})
    if name in {"a step", "of a batch", "a number", "heads first"}:
        assert len({grid for _, grid, _ in ours}) > 1
    assert ours == launched


@pytest.mark.parametrize("name", ["a step", "a number", "heads first", "splits", "many queries"])
def test_a_new_key_count_is_neither_checked_nor_planned(
    name: str, launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, len_q, dtype, given = CALLS[name]
    q = torch.zeros(batch, len_q, 8, 64, dtype=dtype)
    for length in (1000, 1001):
        attend(q, length, **given)
    monkeypatch.setattr(request, "parse_any", None)
    for planning in ("deciding_facts", "forward", "keys_per_block"):
        monkeypatch.setattr(run, planning, None)
    for length in range(961, 1025):
        attend(q, length, **given)
    assert len(launched) == 2 + 64


def test_a_grid_of_too_many_ctas_is_refused(
    launched: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    q = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    for length in (100, 101):
        attend(q, length)
    monkeypatch.setattr(plan, "MAX_GRID", launched[-1][1])
    attend(q, 102)
    with pytest.raises(UnsupportedError, match="CTAs"):
        attend(q, 4000)
    assert len(launched) == 3


def test_plans_of_lengths_are_bounded(launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "_MOST_SHARED", 3)
    q = torch.zeros(1, 1, 8, 64, dtype=torch.float16)
    for length in range(64, 4000, 64):
        attend(q, length)
    bases = {one.base for one in request._requests.values() if one.base is not None}
    assert len(bases) == 1
    (shared,) = (one.plans_of_lengths[False] for one in bases)
    assert 0 < len(shared.bound) <= 3
    assert len(launched) == len(range(64, 4000, 64))
