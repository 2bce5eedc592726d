"""Tests validation: `Problem`, `Runtime`, and every error."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.layouts import parse
from jitattn.request.problem import Call, Runtime
from jitattn.request.scores import NO_CHANGES
from jitattn.spec.enums import Access, Dtype, MaskKind
from jitattn.spec.kernel_spec import Problem
from jitattn.values.masks import Causal, Full
from tests.support.inputs import random_qkv

BF16 = torch.bfloat16


def parse_default(q: Any, k: Any, v: Any, **changes: Any) -> tuple[Problem, Runtime]:
    arguments = {
        "mask": Full(),
        "scale": None,
        "layout": "bshd",
        "gear": None,
        "out": None,
        "out_dtype": None,
        "num_splits": None,
        "return_lse": False,
    }
    given = {**dict.fromkeys(Call._fields), "scores": NO_CHANGES, **arguments, **changes}
    return parse(q, k, v, Call(**given))


def test_facts_are_sorted_by_what_they_change() -> None:
    q, k, v = random_qkv(3, 5, 7, 4, 2, 64, 32, dtype=BF16)
    problem, runtime = parse_default(q, k, v, mask=Causal())
    assert (problem.dtype, problem.head_dim, problem.head_dim_v) == (Dtype.BF16, 64, 32)
    assert problem.mask is MaskKind.CAUSAL
    assert problem.access is Access.VEC16
    assert (runtime.batch, runtime.len_q, runtime.len_kv) == (3, 5, 7)
    assert (runtime.heads_q, runtime.heads_kv) == (4, 2)
    assert runtime.q_strides == (5 * 4 * 64, 4 * 64, 64)
    assert runtime.scale == 64**-0.5
    assert runtime.diagonal == 2
    assert parse_default(q, k, v, mask=Causal("top_left"))[1].diagonal == 0


def test_runtime_facts_leave_the_problem_alone() -> None:
    one, _ = parse_default(*random_qkv(1, 5, 7, 2, 2, 64, dtype=BF16))
    two, _ = parse_default(*random_qkv(4, 900, 3, 8, 1, 64, dtype=BF16), scale=3.0, num_splits=4)
    assert one is two


def test_bhsd_only_changes_strides() -> None:
    q, k, v = random_qkv(2, 5, 7, 4, 2, 64, dtype=BF16)
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    assert parse_default(*swapped, layout="bhsd") == parse_default(q, k, v)


def test_strides_that_no_index_passes_are_zero() -> None:
    q, k, v = random_qkv(1, 1, 7, 1, 1, 64, dtype=BF16)
    _, runtime = parse_default(q, k, v)
    assert runtime.q_strides == (0, 0, 0)
    assert runtime.k_strides == (0, 64, 0)


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_one_unaligned_tensor_decides_the_access(name: str) -> None:
    tensors = dict(zip("qkv", random_qkv(2, 8, 8, 2, 2, 64, dtype=BF16), strict=True))
    tensors["out"] = torch.empty_like(tensors["q"])
    assert parse_default(**tensors)[0].access is Access.VEC16
    old = tensors[name]
    tensors[name] = torch.empty(old.numel() + 1, dtype=BF16)[1:].view(old.shape)
    assert parse_default(**tensors)[0].access is Access.ELEMENT


@pytest.mark.parametrize(
    ("dtype", "head_dim", "access"),
    [
        (BF16, 40, "vec16"),
        (BF16, 36, "element"),
        (torch.float32, 36, "vec16"),
        (BF16, 1, "element"),
    ],
)
def test_head_dim_decides_the_access(dtype: torch.dtype, head_dim: int, access: str) -> None:
    q, k, v = random_qkv(2, 8, 8, 2, 2, head_dim, dtype=dtype)
    assert parse_default(q, k, v)[0].access == access


def bad(text: str, error: type[Exception] = InvalidInputError, **changes: Any) -> Any:
    return pytest.param(text, error, changes, id=text[:40])


@pytest.mark.parametrize(
    ("text", "error", "changes"),
    [
        bad("layout='bsdh'", layout="bsdh"),
        bad("q is a list", q=[1.0]),
        bad("must have one dtype", k=torch.zeros(2, 8, 2, 16, dtype=torch.float16)),
        bad("4 dimensions", q=torch.zeros(8, 2, 16)),
        bad("head_dim 32 but q has 16", k=torch.zeros(2, 8, 2, 32)),
        bad("batch 3 but q has 2", v=torch.zeros(3, 8, 2, 16)),
        bad("length 9 but k has 8", v=torch.zeros(2, 9, 2, 16)),
        bad("heads 1 but k has 2", v=torch.zeros(2, 8, 1, 16)),
        bad("q has 3 heads but k and v have 2", q=torch.zeros(2, 8, 3, 16)),
        bad("the last one must be 1", q=torch.zeros(2, 8, 16, 2).transpose(2, 3)),
        bad("head_dim is 257", UnsupportedError, q=torch.zeros(2, 8, 2, 257),
            k=torch.zeros(2, 8, 2, 257)),
        bad("q is int32", UnsupportedError, q=torch.zeros(2, 8, 2, 16).int(),
            k=torch.zeros(2, 8, 2, 16).int(), v=torch.zeros(2, 8, 2, 16).int()),
        bad("scale=inf", scale=float("inf")),
        bad("scale=nan", scale=float("nan")),
        bad("scale=True", scale=True),
        bad("scale=a tensor", scale=torch.tensor(1.0)),
        bad("num_splits=0", num_splits=0),
        bad("num_splits=257", num_splits=257),
        bad("num_splits=2.0", num_splits=2.0),
        bad("return_lse=1", return_lse=1),
        bad("wrap a tensor in KeyPadding", mask=torch.ones(8, 8, dtype=torch.bool)),
        bad("pass Causal()", mask=True),
        bad("leave mask out", mask=None),
        bad("write Full() or Causal()", mask=Causal),
        bad("gear=5", gear=5),
        bad("gear=2.0", gear=2.0),
        bad("out_dtype='fp32'", out_dtype="fp32"),
        bad("out_dtype=torch.float16", UnsupportedError, out_dtype=torch.float16),
        bad("out has shape [2, 8, 2, 17]", out=torch.zeros(2, 8, 2, 17)),
        bad("out is float16", out=torch.zeros(2, 8, 2, 16, dtype=torch.float16)),
        bad("must not overlap", out=torch.zeros(2, 8, 1, 16).expand(2, 8, 2, 16)),
        bad("out is a int", out=3),
    ],
)  # fmt: skip
def test_refusals(text: str, error: type[Exception], changes: dict[str, Any]) -> None:
    tensors = dict(zip("qkv", random_qkv(2, 8, 8, 2, 2, 16), strict=True))
    with pytest.raises(error, match=re.escape(text)):
        parse_default(**{**tensors, **changes})


def test_out_may_not_be_an_input() -> None:
    q, k, v = random_qkv(2, 8, 8, 2, 2, 16)
    with pytest.raises(InvalidInputError, match="memory of q"):
        parse_default(q, k, v, out=q)


def test_mask_refuses_an_unknown_corner() -> None:
    with pytest.raises(InvalidInputError, match="align='center'"):
        Causal("center")  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [1, 4])
def test_sparse_tensors_are_refused(size: int) -> None:
    q = torch.ones(1, size, size, 1).to_sparse()
    with pytest.raises(InvalidInputError, match=r"to_dense\(\)"):
        parse_default(q, q, q)
