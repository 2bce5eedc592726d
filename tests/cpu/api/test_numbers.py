"""Tests numeric arguments of every type, tables of every dtype, and errors for other values."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import Causal, Dense, KeyPadding, L2Norm, Ragged, Window
from jitattn.api.attention import bind
from jitattn.reference import reference
from jitattn.run.operator_encoding import encode
from tests.support.inputs import random_qkv

REALS = [np.float32, np.float64, np.float16, Fraction, float]
INTEGERS = [np.int64, np.int32, np.uint8, int]


@pytest.mark.parametrize("kind", REALS)
@pytest.mark.parametrize("needs_grad", [False, True])
def test_reals(kind: Any, needs_grad: bool) -> None:
    q, k, v = (x.requires_grad_(needs_grad) for x in random_qkv(1, 5, 7, 2))
    state = torch.tensor([1, 2])
    for name, number, more in (
        ("softcap", 2.0, {}),
        ("scale", 0.5, {}),
        ("dropout_p", 0.25, {"dropout_state": state}),
    ):
        given, usual = {name: kind(number), **more}, {name: number, **more}
        for compute in (jitattn.attention, reference):
            assert torch.equal(compute(q, k, v, **given), compute(q, k, v, **usual))
        assert jitattn.explain(q, k, v, **given).path == "cpu"
    norm, wanted_norm = L2Norm(1, q.detach()[0, 0, :, 0], kind(9)), L2Norm(1, q[0, 0, :, 0], 9.0)
    found = jitattn.attention(q, k, v, qk_norm=norm)
    assert torch.equal(found, jitattn.attention(q, k, v, qk_norm=wanted_norm))


@pytest.mark.parametrize("kind", REALS)
def test_reals_with_a_cache(kind: Any) -> None:
    q, k, v = random_qkv(1, 2, 7, 2)
    found = jitattn.attention_with_kvcache(q, k, v, length=5, softcap=kind(2), scale=kind(0.5))
    wanted = jitattn.attention_with_kvcache(q, k, v, length=5, softcap=2.0, scale=0.5)
    assert torch.equal(found, wanted)


@pytest.mark.parametrize("kind", INTEGERS)
def test_integers(kind: Any) -> None:
    q, k, v = random_qkv(1, 2, 7, 2)
    found = jitattn.attention(
        q, k, v, gear=kind(1), num_splits=kind(2), tile_rows=kind(16), mask=Window(kind(3), kind(0))
    )
    assert torch.equal(found, jitattn.attention(q, k, v, mask=Window(3, 0)))
    with jitattn.set_default_gear(kind(1)):
        assert jitattn.get_default_gear() == 1
    more = {"length": kind(4), "max_length": kind(7)}
    found = jitattn.attention_with_kvcache(q, k.clone(), v.clone(), k[:, :2], v[:, :2], **more)
    wanted = jitattn.attention_with_kvcache(q, k.clone(), v.clone(), k[:, :2], v[:, :2], length=4)
    assert torch.equal(found, wanted)
    flat = torch.randn(7, 2, 8)
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 3, 7]), kind(4))
    assert jitattn.attention(flat, flat, flat, q_seqs=seqs, kv_seqs=seqs).shape == flat.shape
    assert torch.equal(jitattn.l2norm(flat, kind(2)), jitattn.l2norm(flat, 2))


@pytest.mark.parametrize("value", [True, np.bool_(True), "2", 2j, torch.tensor(2.0), [2.0]])
@pytest.mark.parametrize("name", ["softcap", "scale", "dropout_p"])
def test_what_is_no_number_is_refused(name: str, value: Any) -> None:
    q, k, v = random_qkv()
    with pytest.raises(jitattn.InvalidInputError, match=f"{name}="):
        jitattn.attention(q, k, v, **{name: value})


@pytest.mark.parametrize("value", [10**400, float("inf"), float("nan"), np.float32("inf")])
def test_numbers_without_end_are_refused(value: Any) -> None:
    q, k, v = random_qkv()
    for name in ("softcap", "scale", "dropout_p"):
        with pytest.raises(jitattn.InvalidInputError, match=f"{name}="):
            jitattn.attention(q, k, v, **{name: value})


TABLES = {
    "sinks": (4,),
    "alibi_slopes": (2, 4),
    "relative_bias": (4, 7),
    "head_scale": (4,),
    "bias": (2, 4, 5, 8),
}


def call(name: str, table: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    more = {"qk_norm": L2Norm(head_scale=table)} if name == "head_scale" else {name: table}
    result: Tensor = jitattn.attention(q, k, v, mask=Causal(), **more)
    return result


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("path", ["usual", "compiled"])
def test_tables_in_the_dtype_of_the_model(name: str, dtype: torch.dtype, path: str) -> None:
    q, k, v = random_qkv(2, 5, 8, 4, 2, 8, dtype=dtype)
    table = torch.rand(TABLES[name], generator=torch.Generator().manual_seed(1)).to(dtype)
    function = call
    if path == "compiled":
        torch._dynamo.reset()
        function = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for wide in (False, True):
        own_dtype = torch.promote_types(dtype, torch.float32) if wide else dtype
        own = table.to(own_dtype, copy=True).requires_grad_()
        out = function(name, own, q, k, v)
        (gradient,) = torch.autograd.grad(out.float().sin().sum(), own)
        assert gradient.dtype == own.dtype
        results.append((out, gradient.to(dtype)))
    assert torch.equal(results[0][0], results[1][0])
    torch.testing.assert_close(results[0][1], results[1][1])


@pytest.mark.parametrize("name", [*TABLES, "q", "k", "v"])
def test_gradcheck_in_fp64(name: str) -> None:
    q, k, v = random_qkv(2, 5, 8, 4, 2, 8, dtype=torch.float64)
    if name in "qkv":
        given = {"q": q, "k": k, "v": v}

        def function(x: Tensor) -> Any:
            return jitattn.attention(**{**given, name: x}, mask=Causal(), return_lse=True)

        own = given[name][:, :, :, :3].clone() if name == "v" else given[name]
    else:
        own = torch.rand(TABLES[name], dtype=torch.float64)

        def function(x: Tensor) -> Any:
            return call(name, x, q, k, v)

    assert torch.autograd.gradcheck(function, own.requires_grad_(), fast_mode=True)
    assert torch.autograd.gradgradcheck(function, own, fast_mode=True)


def test_all_of_it_in_fp64() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 140, 150, 2, 1, 4, dtype=torch.float64))
    seen: dict[str, Any] = {"mask": Window(40, 0, 2), "softcap": 3.0}

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        halves = [
            jitattn.attention(q, k[:, part], v[:, part], return_lse=True)
            for part in (slice(0, 60), slice(60, 150))
        ]
        merged = jitattn.merge(*zip(*halves, strict=True))
        return *merged, jitattn.l2norm(q), jitattn.attention(q, k, v, **seen)

    assert torch.autograd.gradcheck(function, (q, k, v), fast_mode=True)
    out, lse = jitattn.attention(q, k, v, return_lse=True)
    assert (out.dtype, lse.dtype) == (torch.float64, torch.float64)
    truth, lse_truth = reference(q, k, v, return_lse=True)
    torch.testing.assert_close(function(q, k, v)[:2], (truth, lse_truth))
    assert jitattn.attention(q, k, v, out_dtype=torch.float32).dtype == torch.float32
    assert jitattn.explain(q, k, v).problem["dtype"] == "fp64"
    seqs = Ragged.from_cu_seqlens(torch.tensor([0, 60, 140]))
    flat = q[0, :, :1].repeat(1, 2, 1)
    assert jitattn.attention(flat, flat, flat, q_seqs=seqs, kv_seqs=seqs).dtype == torch.float64


def test_a_cache_in_fp64() -> None:
    q, k, v = random_qkv(1, 2, 9, 2, 2, 8, dtype=torch.float64)
    tables = torch.arange(36.0, dtype=torch.float64).view(9, 4)
    rotary = jitattn.Rotary(tables.cos(), tables.sin(), interleaved=False)
    more = {"length": 5, "rotary": rotary}
    caches = [k.clone(), v.clone()]
    found = jitattn.attention_with_kvcache(q, *caches, k[:, :2], v[:, :2], **more)
    wanted, _, *caches_wanted = jitattn.reference.with_kvcache(q, k, v, k[:, :2], v[:, :2], **more)
    torch.testing.assert_close(caches, caches_wanted, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"bias": torch.zeros(1, 1, 1, 8).double()},
            r"float64 .*: it must be torch\.float32; cast",
        ),
        ({"bias": torch.zeros(4, 5, 8)}, r"shape \[4, 5, 8\].*of \[Hq, Lq, Lkv\] pass x\[None\]"),
        ({"bias": torch.zeros(5, 8)}, r"shape \[5, 8\].*of \[Lq, Lkv\] pass x\[None, None\]"),
        ({"sinks": torch.zeros(4).int()}, r"sinks is torch\.int32 \[4\]: .*cast it with \.float"),
        ({"mask": KeyPadding(torch.ones(2, 8).long())}, r"torch\.int64 .*cast it with \.bool\(\)"),
        ({"mask": KeyPadding(torch.ones(2, 8))}, r"torch\.float32 .*is a bias: pass it as bias="),
        ({"mask": KeyPadding(torch.ones(2, 1, 1, 8).bool())}, r"four dimensions is Dense\(keep\)"),
        ({"mask": Dense(torch.ones(4, 5, 8).bool())}, r"of \[B, Lq, Lkv\] x\[:, None\]"),
        ({"mask": Dense(torch.ones(2, 4, 5, 8).int())}, r"torch\.int32 .*cast it with \.bool\(\)"),
    ],
    ids=str,
)
def test_the_way_out_is_said(more: dict[str, Any], message: str) -> None:
    with pytest.raises(jitattn.InvalidInputError, match=message):
        jitattn.attention(*random_qkv(2, 5, 8, 4, 2, 8), **more)


INT = torch.int32


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"length": torch.tensor([3, 17], dtype=INT)}, r"length: sequence 1 would hold 17 rows"),
        ({"length": torch.tensor([-1, 3], dtype=INT)}, r"length: sequence 0 would hold -1 rows"),
        ({"length": 17}, r"length=17: the cache would hold 17 rows"),
        ({"length": 3, "batch_idx": torch.tensor([0, 2])}, r"batch_idx: sequence 1 is in row 2"),
        (
            {
                "length": torch.tensor([3, 4], dtype=INT),
                "left_pad": torch.tensor([0, 5], dtype=INT),
            },
            r"left_pad: sequence 1 begins with 5 rows that are no keys, but holds 4",
        ),
        (
            {"length": 9, "block_table": torch.tensor([[0], [2]])},
            r"block_table: sequence 1 .*page 2",
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("num_new", [0, 2])
def test_contents_of_indices_by_their_own_names(
    more: dict[str, Any], message: str, num_new: int
) -> None:
    q, k, v = random_qkv(2, 2, 16, 2)
    more = {**more, "length": more["length"] - num_new}
    message = message.replace("length=17", f"length={17 - num_new}")
    new = [x[:, :num_new] for x in (k, v)] if num_new else []
    with pytest.raises(jitattn.InvalidInputError, match=message):
        jitattn.attention_with_kvcache(q, k.clone(), v.clone(), *new, **more)


def test_the_door_names_its_own_argument() -> None:
    from jitattn.compat.flash_attn import flash_attn_with_kvcache

    q, k, v = random_qkv(2, 2, 16, 2)
    lengths = torch.tensor([3, 17], dtype=INT)
    for new in ((), (k[:, :2], v[:, :2])):
        with pytest.raises(ValueError, match=r"cache_seqlens: sequence 1 would hold 1[79] rows"):
            flash_attn_with_kvcache(q, k.clone(), v.clone(), *new, cache_seqlens=lengths)


@pytest.mark.parametrize("warn_only", [False, True])
def test_torchs_switch_for_determinism(warn_only: bool) -> None:
    q, k, v = random_qkv()
    places = [
        idx
        for idx, pair in enumerate(
            zip(*(encode(bind(q, k, v, {"deterministic": x})[1]).ints for x in (0, 1)), strict=True)
        )
        if pair[0] != pair[1]
    ]
    assert len(places) == 1
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        assert encode(bind(q, k, v, {})[1]).ints[places[0]] == 1
        leaf = q.clone().requires_grad_()
        jitattn.attention(leaf, k, v, mask=Causal()).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert encode(bind(q, k, v, {})[1]).ints[places[0]] == 0
