"""Tests public values: copies, pickles, equality, hashes, and numpy scalars."""

from __future__ import annotations

import copy
import multiprocessing
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import (
    BlockSparse,
    Causal,
    Dense,
    Full,
    KeyPadding,
    L2Norm,
    LocalStride,
    Padded,
    Paged,
    PerHead,
    Ragged,
    Rotary,
    Window,
)

LENGTHS = torch.tensor([3, 5], dtype=torch.int32)
STARTS = torch.tensor([1, 2], dtype=torch.int32)
TABLE = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
PATTERN = torch.ones(2, 2, dtype=torch.bool)
KEEP = torch.tensor([[True, False, True], [True, True, True]])

#: Equal to every value that is made alike.
OF_NUMBERS: dict[str, Callable[[], Any]] = {
    "Full": Full,
    "Causal": lambda: Causal("top_left"),
    "Window": lambda: Window(3, None, 2, True),
    "LocalStride": lambda: LocalStride(16, (2, 1), 3, causal=False),
    "PerHead": lambda: PerHead([Causal(), Window(3, 0)]),
}
#: Equal to themselves alone.
OF_TENSORS: dict[str, Callable[[], Any]] = {
    "BlockSparse": lambda: BlockSparse(PATTERN, 16, causal=True),
    "PerHead of patterns": lambda: PerHead([Causal(), BlockSparse(PATTERN, 16)]),
    "KeyPadding": lambda: KeyPadding(KEEP),
    "Dense": lambda: Dense(KEEP[:, None, None]),
    "Both": lambda: Causal() & KeyPadding(KEEP) & Dense(KEEP[:, None, None]),
    "L2Norm": lambda: L2Norm(2, torch.ones(2), 3.0),
    "Ragged": lambda: Ragged(STARTS, LENGTHS, 7),
    "Ragged of cu_seqlens": lambda: Ragged.from_cu_seqlens(torch.tensor([0, 3, 8])),
    "Padded": lambda: Padded(LENGTHS, STARTS, 7, TABLE[0]),
    "Padded to stops": lambda: Padded.from_stop(LENGTHS, STARTS),
    "Paged": lambda: Paged(TABLE, LENGTHS, 7, STARTS),
    "Paged to stops": lambda: Paged.from_stop(TABLE, LENGTHS),
    "Rotary": lambda: Rotary(*torch.ones(2, 4, 2), interleaved=True),
}
COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{
        f"pickle {version}": lambda value, version=version: pickle.loads(
            pickle.dumps(value, version)
        )
        for version in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
}


def fields(value: Any) -> list[Any]:
    """Everything that a value holds, in order, values within it taken apart as well."""
    if value is None or isinstance(value, Tensor | int | float | str):
        return [value]
    if isinstance(value, tuple):
        return [field for part in value for field in fields(part)]
    names = [name for kind in type(value).__mro__ for name in getattr(kind, "__slots__", ())]
    return [type(value), *(field for name in names for field in fields(getattr(value, name)))]


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return bool(one == other)


@pytest.mark.parametrize("how", COPIES)
@pytest.mark.parametrize("name", [*OF_NUMBERS, *OF_TENSORS])
def test_a_copy_holds_the_same(name: str, how: str) -> None:
    value = {**OF_NUMBERS, **OF_TENSORS}[name]()
    made = COPIES[how](value)
    pairs = list(zip(fields(value), fields(made), strict=True))
    assert all(same(one, other) for one, other in pairs)
    has_same_rules = (name, how) == ("PerHead of patterns", "copy")
    assert (made == value) is (name in OF_NUMBERS or has_same_rules)
    shared = {one is other for one, other in pairs if isinstance(one, Tensor)}
    assert shared <= {how == "copy"}


@pytest.mark.parametrize("name", [*OF_NUMBERS, *OF_TENSORS])
def test_equality_and_hash(name: str) -> None:
    make = {**OF_NUMBERS, **OF_TENSORS}[name]
    value, other = make(), make()
    assert value == value
    assert (value == other) is (name in OF_NUMBERS)
    assert (hash(value) == hash(other)) is (name in OF_NUMBERS)
    assert {value: 1}[value] == 1


@pytest.mark.parametrize("name", ["Ragged", "Padded", "Paged", "Rotary"])
def test_a_copy_is_frozen_as_well(name: str) -> None:
    made = copy.deepcopy(OF_TENSORS[name]())
    with pytest.raises(AttributeError, match="is frozen"):
        made.start = None
    with pytest.raises(AttributeError, match="is frozen"):
        del made.start


def test_a_length_that_was_read_is_kept() -> None:
    seqs = Ragged(STARTS, LENGTHS)
    assert seqs.max_length() == 5
    assert pickle.loads(pickle.dumps(seqs)).knows_max_length()


def attend(values: tuple[Ragged, Rotary, L2Norm, Any]) -> Tensor:
    seqs, _, norm, mask = values
    q = torch.arange(64.0).view(8, 2, 4).sin()
    found: Tensor = jitattn.attention(q, q, q, mask=mask, q_seqs=seqs, kv_seqs=seqs, qk_norm=norm)
    return found


def test_another_process_computes_with_them() -> None:
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 3, 8]))
    mask = Window(2, 0) & KeyPadding(torch.tensor([[True] * 5, [False] + [True] * 4]))
    values = (seqs, OF_TENSORS["Rotary"](), L2Norm(2), mask)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(attend, (values,))
    assert torch.equal(found, attend(values))


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (lambda n: Window(n(3), n(4), n(2)), Window(3, 4, 2)),
        (
            lambda n: LocalStride(n(16), n(2), n(3), n(1), n(2), n(1)),
            LocalStride(16, 2, 3, 1, 2, 1),
        ),
        (
            lambda n: LocalStride(16, (n(2), n(1)), 3, causal=False),
            LocalStride(16, (2, 1), 3, causal=False),
        ),
    ],
)
@pytest.mark.parametrize("kind", [np.int64, np.int32, np.uint8])
def test_integers_of_numpy(given: Any, wanted: Any, kind: Any) -> None:
    made = given(kind)
    assert made == wanted
    assert hash(made) == hash(wanted)
    assert repr(made) == repr(wanted)


def test_integers_of_numpy_beside_tensors() -> None:
    assert repr(BlockSparse(PATTERN, np.int64(16), True, np.int64(1)).first_row) == "1"
    assert repr(Ragged(STARTS, LENGTHS, np.int64(7)).max_length()) == "7"
    assert repr(Padded(LENGTHS, None, np.int64(7)).max_length(99)) == "7"
    assert repr(Paged(TABLE, LENGTHS, np.int64(7)).max_length(99)) == "7"
    norm = L2Norm(np.int64(2), torch.ones(2), np.float32(0.5))
    assert (repr(norm.groups), repr(norm.bound)) == ("2", "0.5")
