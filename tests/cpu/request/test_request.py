"""Tests requests: calls that share one, and facts read at every call."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.errors import InvalidInputError
from jitattn.request import request
from jitattn.request.request import find

KEEP = torch.ones(2, 40, dtype=torch.bool)
PATTERN = torch.ones(1, 3, 3, dtype=torch.bool)


@pytest.fixture(autouse=True)
def _no_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_requests", {})


def found(dtype: torch.dtype = torch.float16, shift: int = 0, **given: Any) -> request.Found:
    """The request of a call, whose tensors begin `shift` elements after an aligned address."""
    length = given.pop("length", 40)
    q, k, v = (
        torch.zeros(2 * length * 2 * 16 + 8, dtype=dtype)[shift : shift + 2 * length * 2 * 16]
        for _ in range(3)
    )
    q, k, v = (x.view(2, length, 2, 16) for x in (q, k, v))
    if given.pop("flat", False):
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    _, call = bind(q, k, v, given)
    return find(q, k, v, call)


def ragged(ends: list[int], longest: int = 40) -> jitattn.Ragged:
    return jitattn.Ragged.from_cu_seqlens(torch.tensor(ends, dtype=torch.int32), longest)


def bias(rows: int = 40) -> torch.Tensor:
    return torch.zeros(1, 2, rows, 40, dtype=torch.float16)


SHARED = {
    "plain": lambda: {},
    "causal": lambda: {"mask": jitattn.Causal()},
    "window": lambda: {"mask": jitattn.Window(3, 0)},
    "key padding": lambda: {"mask": jitattn.KeyPadding(KEEP.clone())},
    "pattern": lambda: {"mask": jitattn.BlockSparse(PATTERN.clone(), 16)},
    "bias": lambda: {"bias": bias()},
    "softcap": lambda: {"softcap": 3.0, "scale": 0.5},
    "sinks": lambda: {"sinks": torch.zeros(2)},
    "norm": lambda: {"qk_norm": jitattn.L2Norm()},
    "ragged": lambda: {"flat": True, "q_seqs": ragged([0, 9, 80]), "kv_seqs": ragged([0, 9, 80])},
    "padded": lambda: {"kv_seqs": jitattn.Padded(torch.tensor([9, 40]))},
    "dropout": lambda: {"dropout_p": 0.5},
}


@pytest.mark.parametrize("name", SHARED)
def test_like_calls_share_a_request(name: str) -> None:
    """Other tensors, other contents: the same facts."""
    first, second = found(**SHARED[name]()), found(**SHARED[name]())
    assert first.request is second.request
    assert first.addresses.keys() == second.addresses.keys()
    assert set(request._requests.values()) == {first.request}


DIFFERENT = {
    "dtype": {"dtype": torch.bfloat16},
    "alignment": {"shift": 1},
    "length": {"length": 41},
    "mask": {"mask": jitattn.Causal()},
    "alignment of a mask": {"mask": jitattn.Causal("top_left")},
    "reach": {"mask": jitattn.Window(3, 0)},
    "another reach": {"mask": jitattn.Window(4, 0)},
    "scale": {"scale": 0.5},
    "gear": {"gear": 1},
    "out_dtype": {"out_dtype": torch.float32},
    "num_splits": {"num_splits": 2},
    "tile_rows": {"tile_rows": 16},
    "bias": {"bias": bias()},
    "bias of one row": {"bias": bias(1)},
    "fp32 bias": {"bias": bias().float()},
    "bias of odd rows": {"length": 44, "bias": torch.zeros(1, 2, 44, 44).half()},
    "bias of odd rows with room behind it": {
        "length": 44, "bias": torch.zeros(4, 2, 44, 44).half()[:1]
    },
    "padding": {"mask": jitattn.KeyPadding(KEEP)},
    "padding and causal": {"mask": jitattn.KeyPadding(KEEP) & jitattn.Causal()},
    "dense": {"mask": jitattn.Dense(KEEP[:, None, None])},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": torch.zeros(2)},
    "slopes": {"alibi_slopes": torch.zeros(2)},
    "relative": {"relative_bias": torch.zeros(2, 3)},
    "norm": {"qk_norm": jitattn.L2Norm()},
    "norm in groups": {"qk_norm": jitattn.L2Norm(2)},
    "dropout": {"dropout_p": 0.5},
    "more dropout": {"dropout_p": 0.25},
    "padded keys": {"kv_seqs": jitattn.Padded(torch.tensor([9, 40]))},
    "padded queries": {"q_seqs": jitattn.Padded(torch.tensor([9, 40]))},
    "padded with a bound": {"kv_seqs": jitattn.Padded(torch.tensor([9, 20]), max_length=20)},
    "left padding": {"kv_seqs": jitattn.Padded(torch.tensor([9, 30]), torch.tensor([0, 2]))},
    "rows by index": {
        "kv_seqs": jitattn.Padded(torch.tensor([9, 40]), batch_idx=torch.tensor([1, 0]))
    },
    "pattern": {"mask": jitattn.BlockSparse(PATTERN, 16)},
    "causal pattern": {"mask": jitattn.BlockSparse(PATTERN, 16, causal=True)},
    "rules": {"mask": jitattn.PerHead([jitattn.Full(), jitattn.Window(3)])},
    "two rules alike": {"mask": jitattn.PerHead([jitattn.Window(3), jitattn.Window(3)])},
}  # fmt: skip


def test_calls_that_differ_have_requests_of_their_own() -> None:
    names = ["", *DIFFERENT]
    requests = [found(**(DIFFERENT[name] if name else {})).request for name in names]
    again = [found(**(DIFFERENT[name] if name else {})).request for name in names]
    assert [one is other for one, other in zip(requests, again, strict=True)] == [True] * len(names)
    assert len(set(map(id, requests))) == len(names)


def test_one_value_may_say_where_queries_and_keys_lie() -> None:
    """Its facts are read once; what differs in it makes another request all the same."""

    def of_both(ends: list[int], longest: int = 40, dtype: torch.dtype = torch.int32) -> Any:
        seqs = jitattn.Ragged.from_cu_seqlens(torch.tensor(ends, dtype=dtype), longest)
        return seqs, found(flat=True, q_seqs=seqs, kv_seqs=seqs)

    seqs, first = of_both([0, 9, 80])
    names = ("q_start", "q_stop", "kv_start", "kv_stop")
    at = seqs.cumulative.data_ptr()
    assert [first.addresses[name] for name in names] == [at, at + 4] * 2
    assert of_both([0, 60, 70])[1].request is first.request
    others = [
        of_both([0, 9, 80], 39),
        of_both([0, 9, 20, 80]),
        of_both([0, 9, 80], dtype=torch.int64),
    ]
    different = [first, *(one for _, one in others)]
    different.append(found(flat=True, q_seqs=seqs, kv_seqs=ragged([0, 9, 20])))
    assert len({id(one.request) for one in different}) == 4 + 1
    same = jitattn.Padded(torch.tensor([9, 40]))
    one = found(q_seqs=same, kv_seqs=same)
    assert found(q_seqs=same, kv_seqs=same).request is one.request
    assert one.addresses["q_stop"] == one.addresses["kv_stop"] == same.stop.data_ptr()


def test_a_default_gear_makes_another_request() -> None:
    usual = found()
    with jitattn.set_default_gear(1):
        other = found()
    assert usual.request is not other.request
    assert usual.request.problem.numerics is not other.request.problem.numerics
    assert found().request is usual.request


@pytest.mark.parametrize("given", [{"num_splits": True}, {"gear": 2.0}, {"tile_rows": 16.0}])
def test_equal_numbers_of_other_types_are_refused(given: dict[str, Any]) -> None:
    ((name, value),) = given.items()
    found(**{name: int(value)})
    with pytest.raises(InvalidInputError, match=name):
        found(**given)


def test_memory_of_the_result_is_looked_at_every_time() -> None:
    q = torch.zeros(2, 40, 2, 16)
    out = torch.empty_like(q)
    jitattn.attention(q, q, q, out=out)
    jitattn.attention(q, q, q, out=out)
    with pytest.raises(InvalidInputError, match="memory of q"):
        jitattn.attention(q, q, q, out=q)


def test_rules_and_tensors_are_not_kept() -> None:
    first, second = (jitattn.BlockSparse(PATTERN.clone(), 16) for _ in range(2))
    request_of_first = found(mask=first).request
    assert request_of_first.runtime.listed is None
    _, call = bind(*(torch.zeros(2, 40, 2, 16) for _ in range(3)), {"mask": second})
    assert request_of_first.runtime_of(call).listed is second


def test_requests_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_MOST_REQUESTS", 3)
    for length in range(1, 10):
        found(length=length)
    assert len(request._requests) <= 3


def test_growing_calls_do_not_drive_others_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(request, "_MOST_REQUESTS", 8)
    other = found(softcap=3.0).request
    q = torch.zeros(1, 40, 2, 16)
    for length in range(2, 40):
        k = q[:, :length]
        assert find(q, k, k, bind(q, k, k, {})[1]).request.len_kv == length
        assert len(request._requests) <= 8
    assert found(softcap=3.0).request is other


@pytest.mark.parametrize("mask", [jitattn.Full(), jitattn.Causal(), jitattn.Causal("top_left")])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(
    "given", [{}, {"scale": 0.5, "gear": 4}, {"layout": "bhsd"}, {"num_splits": 2, "tile_rows": 64}]
)
def test_calls_with_more_keys_are_as_if_checked(
    mask: jitattn.Causal, batch: int, given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoding step has a key more than the one before, and is not checked anew."""
    parsed = request.parse_any
    heads_first = given.get("layout") == "bhsd"
    cache = torch.zeros(batch, 64, 2, 16, dtype=torch.float16)
    q = torch.zeros(batch, 3, 4, 16, dtype=torch.float16)
    q = q.transpose(1, 2) if heads_first else q

    def step(num_keys: int) -> Any:
        k = cache[:, :num_keys].transpose(1, 2) if heads_first else cache[:, :num_keys]
        return q, k, k, bind(q, k, k, {"mask": mask, **given})[1]

    find(*step(40))
    with monkeypatch.context() as patch:
        patch.setattr(request, "parse_any", None)
        longer = {num_keys: find(*step(num_keys)).request for num_keys in (2, 39, 41, 64)}
    for num_keys, ours in longer.items():
        problem, runtime, _ = parsed(*step(num_keys))
        assert (ours.problem, ours.runtime) == (problem, runtime)
        assert (ours.len_kv, ours.diagonal) == (runtime.len_kv, runtime.diagonal)


@pytest.mark.parametrize(
    "given",
    [
        {"mask": jitattn.Window(3, 0)},
        {"softcap": 3.0},
        {"out": torch.empty(1, 3, 4, 16)},
        {"kv_seqs": jitattn.Padded(torch.tensor([2]))},
    ],
    ids=lambda given: next(iter(given)),
)
def test_calls_with_more_in_them_are_checked(
    given: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, q = torch.zeros(1, 64, 2, 16), torch.zeros(1, 3, 4, 16)
    looked = []
    parse_any = request.parse_any
    monkeypatch.setattr(request, "parse_any", lambda *x: looked.append(x) or parse_any(*x))
    for num_keys in (20, 21):
        k = cache[:, :num_keys]
        find(q, k, k, bind(q, k, k, given)[1])
    assert len(looked) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda k, v: (k[:, :1], v[:, :1]),
        lambda k, v: (k[:, :20], v[:, :21]),
        lambda k, v: (k[:, :20].contiguous(), v[:, :20]),
        lambda k, v: (k[:, 1:20, :, 1:], v[:, 1:20, :, 1:]),
        lambda k, v: (k[:1, :20], v[:1, :20]),
    ],
)
def test_other_calls_are_checked(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One key has no stride; and more than the number of keys differs, or k and v do."""
    k, v = torch.zeros(2, 2, 64, 2, 17, dtype=torch.float16)
    q = torch.zeros(2, 3, 4, 17, dtype=torch.float16)
    find(q, k[:, :40], v[:, :40], bind(q, k, v, {})[1])
    looked = []
    parse_any = request.parse_any
    monkeypatch.setattr(request, "parse_any", lambda *x: looked.append(x) or parse_any(*x))
    k, v = change(k, v)
    q = q[: len(k), ..., : k.shape[-1]]
    with contextlib.suppress(InvalidInputError):
        find(q, k, v, bind(q, k, v, {})[1])
    assert looked


def test_rows_by_index_are_of_both_caches() -> None:
    """An index that only k has room for would lead out of v."""
    q, k = torch.empty(2, 3, 4, 16), torch.empty(5, 8, 4, 16)
    where = jitattn.Padded(torch.tensor([8, 8]), batch_idx=torch.tensor([4, 0]))
    for v in (k[:3], k[:1]):
        with pytest.raises(jitattn.InvalidInputError, match="rows of the batch differ: 5 and"):
            jitattn.attention(q, k, v, kv_seqs=where)
