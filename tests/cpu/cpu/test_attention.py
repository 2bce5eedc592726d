"""Tests `attention` on CPU tensors, its docstring, and the exception hierarchy."""

from __future__ import annotations

import doctest
import json

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import jitattn
from jitattn import attention as attention_function
from jitattn.cpu.mkl_warmup import mkl_warmup
from tests.support.check import check_case
from tests.support.grids import EDGE, Case
from tests.support.inputs import random_qkv

#: Every seventh case: the grid's own order spreads dims, lengths, heads, memory and splits.
SAMPLE = [case for case in EDGE[::7] if case.variant != "wide_row"]


@pytest.mark.parametrize("case", SAMPLE, ids=[case.name for case in SAMPLE])
def test_sample_of_the_edge_grid(case: Case) -> None:
    check_case(case, jitattn.attention)


def test_first_vector_functions_run_on_one_element() -> None:
    first: dict[str, int] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            name = func.overloadpacket.__name__
            if name in ("exp", "log", "tanh"):
                first.setdefault(name, args[0].numel())
            return func(*args, **(kwargs or {}))

    mkl_warmup.cache_clear()
    with Record():
        jitattn.attention(*random_qkv(1, 64, 64, 2, 1, 16), softcap=2.0)
    assert first == {"exp": 1, "log": 1, "tanh": 1}


def test_docstring_example() -> None:
    import sys

    module = sys.modules["jitattn.api.attention"]
    finder = doctest.DocTestFinder(recurse=False)
    (test,) = finder.find(attention_function, module=module, globs={})
    results = doctest.DocTestRunner().run(test)
    assert results.attempted >= 4
    assert results.failed == 0


def test_gradients_flow() -> None:
    q, k, v = (x.requires_grad_() for x in random_qkv(1, 6, 9, 2, 1, 16))
    jitattn.attention(q, k, v, mask=jitattn.Causal()).square().sum().backward()
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    jitattn.reference.reference(q, k, v, mask=jitattn.Causal()).square().sum().backward()
    for grad, x in zip(grads, (q, k, v), strict=True):
        torch.testing.assert_close(grad, x.grad, rtol=1e-4, atol=1e-5)


def test_explain_names_the_cpu_path() -> None:
    record = jitattn.explain(*random_qkv(1, 6, 9, 2, 1, 16))
    assert record.path == "cpu"
    assert record.kernel == {}
    assert json.loads(json.dumps(record.to_dict()))["problem"]["len_kv"] == 9
    assert "CPU" in str(record)


def test_gears_0_to_2_are_one_for_fp32() -> None:
    q, k, v = random_qkv()
    results = [jitattn.attention(q, k, v, gear=gear) for gear in (None, 0, 1, 2)]
    assert all(torch.equal(result, results[0]) for result in results)


def test_exception_tree() -> None:
    assert issubclass(jitattn.InvalidInputError, (jitattn.JitAttnError, ValueError))
    assert issubclass(jitattn.UnsupportedError, NotImplementedError)
    for name in ("UnsupportedError", "CompileError", "CacheError", "LaunchError", "InternalError"):
        assert issubclass(getattr(jitattn, name), jitattn.JitAttnError)
    assert issubclass(jitattn.CacheMissError, jitattn.CacheError)


@pytest.mark.parametrize("return_lse", [False, True])
@pytest.mark.parametrize("out_dtype", [None, torch.float32])
@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_out_is_written_where_it_lies(
    layout: str, out_dtype: torch.dtype | None, return_lse: bool
) -> None:
    tensors = random_qkv(2, 5, 7, 4, 2, 16, 24, dtype=torch.bfloat16)
    truth, lse_truth = jitattn.attention(*tensors, out_dtype=out_dtype, return_lse=True)
    buffer = torch.full((2, 5, 4, 40), float("nan"), dtype=truth.dtype)
    out = buffer[..., 8:32]
    if layout == "bhsd":
        tensors, out = [x.transpose(1, 2) for x in tensors], out.transpose(1, 2)
    result = jitattn.attention(
        *tensors, layout=layout, out=out, out_dtype=out_dtype, return_lse=return_lse
    )
    assert (result[0] if return_lse else result) is out
    assert torch.equal(buffer[..., 8:32], truth)
    if return_lse:
        assert torch.equal(result[1], lse_truth)
    out.fill_(float("nan"))
    assert buffer.isnan().all()
