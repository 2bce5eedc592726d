"""Tests placeholders: meta and fake tensors give results of that kind, others are refused."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import jitattn
from jitattn.cpu.mkl_warmup import mkl_warmup
from tests.support.entries import ENTRIES, facts, lose_memory, real_tensors
from tests.support.inputs import random_qkv


def call(name: str, tensors: dict[str, Tensor]) -> Any:
    return ENTRIES[name][0](**tensors)


@pytest.mark.parametrize("name", ENTRIES)
def test_meta_tensors(name: str) -> None:
    real = real_tensors(name)
    found = call(name, {word: x.to("meta") for word, x in real.items()})
    assert facts(found) == facts(call(name, real))
    results = found if isinstance(found, tuple) else [found]
    assert all(x.is_meta for x in results)


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("in_mode", [True, False], ids=["in_mode", "out_of_mode"])
def test_fake_tensors(name: str, in_mode: bool) -> None:
    real = real_tensors(name)
    mode = FakeTensorMode()
    fake = {word: mode.from_tensor(x) for word, x in real.items()}
    if in_mode:
        with mode:
            found = call(name, fake)
    else:
        found = call(name, fake)
    assert facts(found) == facts(call(name, real))
    results = found if isinstance(found, tuple) else [found]
    assert all(isinstance(x, FakeTensor) for x in results)


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_fake_tensors_of_a_gpu_that_is_not_there(layout: str) -> None:
    with FakeTensorMode():
        q, k, v = (torch.empty(1, 8, 2, 64, dtype=torch.float16, device="cuda") for _ in "qkv")
        out, lse = jitattn.attention(q, k, v, layout=layout, softcap=2.0, return_lse=True)
        again = jitattn.attention_with_kvcache(q, k, v, length=2, layout=layout)
    for result in (out, again):
        assert isinstance(result, FakeTensor)
        assert (result.shape, result.stride(), result.dtype) == (q.shape, q.stride(), q.dtype)
        assert result.device.type == "cuda"
    assert lse.shape == ((1, 2, 8) if layout == "bshd" else (1, 8, 2))


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_gradients(kind: str) -> None:
    mode = FakeTensorMode()
    own = [mode.from_tensor(x) if kind == "fake" else x.to("meta") for x in random_qkv(1, 5, 7, 2)]
    own = [x.requires_grad_() for x in own]
    sinks = torch.zeros_like(own[0][0, 0, :, 0], dtype=torch.bfloat16).requires_grad_()
    jitattn.attention(*own, mask=jitattn.Causal(), sinks=sinks).sum().backward()
    for x in (*own, sinks):
        assert type(x.grad) is type(own[0].detach())
        assert (x.grad.shape, x.grad.dtype, x.grad.device) == (x.shape, x.dtype, x.device)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_a_wrong_call_is_refused_as_any_other(kind: str) -> None:
    mode = FakeTensorMode()
    q, k, v = (mode.from_tensor(x) if kind == "fake" else x.to("meta") for x in random_qkv())
    for message, more in (
        (r"layout='x'", {"layout": "x"}),
        (r"mask is a NoneType", {"mask": None}),
        (r"bias has shape", {"bias": q}),
        (r"out has shape", {"out": k[:, :1]}),
        (r"out_dtype=3", {"out_dtype": 3}),
        (r"q_seqs is a int", {"q_seqs": 3}),
        (r"qk_norm is a int", {"qk_norm": 3}),
        (r"num_splits=0", {"num_splits": 0}),
    ):
        with pytest.raises(jitattn.InvalidInputError, match=message):
            jitattn.attention(q, k, v, **more)
    with pytest.raises(jitattn.InvalidInputError, match=r"must match|differ"):
        jitattn.attention(q, k, v[:, :2])
    with pytest.raises(jitattn.InvalidInputError, match="room for"):
        jitattn.attention_with_kvcache(q, k, v, length=k.shape[1] + 1)


def test_lengths_that_are_not_known_yet() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=False)
    q, k, v = (mode.from_tensor(x) for x in random_qkv(1, 5, 7, 2))
    out, lse = jitattn.attention(q, k, v, mask=jitattn.Window(3, 0), return_lse=True)
    assert str(out.shape) == str(q.shape[:3] + v.shape[3:])
    assert lse.shape[2] is q.shape[1] or lse.shape[2] == q.shape[1]


@pytest.mark.parametrize(
    ("name", "word"), [(name, word) for name in ENTRIES for word in ENTRIES[name][1]]
)
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_memory_that_is_gone_is_refused(name: str, word: str, is_view: bool) -> None:
    tensors = real_tensors(name)
    lose_memory(tensors, word, is_view=is_view)
    with pytest.raises(jitattn.InvalidInputError, match="but no memory: its storage was resized"):
        call(name, tensors)


def test_a_subclass_without_memory_is_refused() -> None:
    class Wrapper(Tensor):
        @staticmethod
        def __new__(cls, inner: Tensor) -> Any:
            return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

        @classmethod
        def __torch_dispatch__(
            cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
        ) -> Any:
            raise NotImplementedError

    q, k, v = random_qkv()
    with pytest.raises(jitattn.InvalidInputError, match=r"k is a Wrapper.*memory of its own"):
        jitattn.attention(q, Wrapper(k), v)


def test_a_subclass_with_memory_is_computed() -> None:
    class Named(Tensor):
        pass

    q, k, v = random_qkv()
    found = jitattn.attention(q, k.as_subclass(Named), v)
    assert torch.equal(torch.Tensor(found), jitattn.attention(q, k, v))


def test_what_is_done_once_is_done_for_real() -> None:
    mkl_warmup.cache_clear()
    seen = []
    with FakeTensorMode():
        mkl_warmup()
        seen.append(mkl_warmup.cache_info().currsize)
    assert seen == [1]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_caches_are_refused_with_a_way_out(layout: torch.layout) -> None:
    parts = [torch.randn(length, 2, 8) for length in (3, 5)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that they are new
        nested = torch.nested.nested_tensor(parts, layout=layout)
    plain = torch.randn(2, 5, 2, 8)
    for q, k in ((nested, nested), (plain, nested), (nested, plain)):
        with pytest.raises(jitattn.InvalidInputError, match=r"nested tensor of layout .* q_seqs"):
            jitattn.attention_with_kvcache(q, k, k, length=1)
