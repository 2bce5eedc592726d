"""Tests errors beside those of `test_problem.py`: memory, autograd, sizes, other libraries."""

from __future__ import annotations

import types
from typing import Any

import numpy as np
import pytest
import torch

from jitattn.api.interop import from_all, from_any, kind_of, to_kind_of
from jitattn.errors import InvalidInputError, UnsupportedError
from tests.cpu.request.test_problem import parse_default
from tests.support.inputs import random_qkv

HALF = torch.float16
OUT_SHAPE = (2, 5, 4, 24)


def inputs(**changes: Any) -> dict[str, Any]:
    """Return the inputs of one good call, with some of them replaced."""
    q, k, v = random_qkv(2, 5, 7, 4, 2, 16, 24, dtype=HALF)
    return {"q": q, "k": k, "v": v, **changes}


def empty(*shape: int, dtype: torch.dtype = HALF, device: str = "cpu") -> torch.Tensor:
    return torch.empty(*shape, dtype=dtype, device=device)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "k is an array": (inputs(k=np.zeros((2, 7, 2, 16))), r"k is a ndarray: .*torch tensors"),
    "two devices": (
        inputs(k=empty(2, 7, 2, 16, device="meta")),
        r"q is on cpu, k is on meta .*one device",
    ),
    "no kv heads": (
        inputs(k=empty(2, 7, 0, 16), v=empty(2, 7, 0, 24)),
        r"q has 4 heads but k and v have 0",
    ),
    "too many keys": (
        inputs(
            k=empty(2, 1, 2, 16).expand(2, 2**31, 2, 16),
            v=empty(2, 1, 2, 24).expand(2, 2**31, 2, 24),
        ),
        r"len_kv is 2147483648 .*below 2\*\*31",
    ),
    "too many rows": (
        inputs(q=empty(2, 1, 4, 16).expand(2, 2**30, 4, 16)),
        r"len_q \* \(heads_q / heads_kv\) is 2147483648.*below 2\*\*31",
    ),
    "scale overflows fp32": (inputs(scale=1e39), r"scale=1e\+39: .*finite in fp32"),
    "scale is text": (inputs(scale="1"), r"scale='1': .*number"),
    "splits are a bool": (inputs(num_splits=True), r"num_splits=True: .*int"),
    "out on another device": (
        inputs(out=empty(*OUT_SHAPE, device="meta")),
        r"out is on meta but q is on cpu",
    ),
    "out is too coarse": (
        inputs(out=empty(*OUT_SHAPE), out_dtype=torch.float32),
        r"out is float16 but the result is float32.*out_dtype",
    ),
    "out has columns apart": (
        inputs(out=empty(2, 5, 24, 4).transpose(2, 3)),
        r"out has strides .*(last one must be 1|must not overlap)",
    ),
    "out overlaps itself": (
        inputs(out=empty(1000).as_strided(OUT_SHAPE, (300, 60, 12, 1))),
        r"out has strides .*must not overlap",
    ),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refusals(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        parse_default(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (inputs(v=empty(2, 7, 2, 0)), r"head_dim of v is 0: .*from 1 to 256"),
        (inputs(q=empty(2, 5, 4, 0), k=empty(2, 7, 2, 0)), r"head_dim is 0: .*from 1 to 256"),
        (inputs(out_dtype=torch.float64), r"out_dtype=torch\.float64: .*float16.*float32"),
    ],
)
def test_unsupported(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedError, match=message):
        parse_default(**arguments)


@pytest.mark.parametrize("gear", [True, 2.0, "2", [2]])
def test_gear_is_an_int_even_where_it_equals_one(gear: object) -> None:
    parse_default(*random_qkv(), gear=2)  # problems are kept by gear, and 2.0 == 2
    parse_default(*random_qkv(), gear=1)  # and True == 1
    with pytest.raises(InvalidInputError, match=r"gear=.*an int from 0 .* to 4"):
        parse_default(*random_qkv(), gear=gear)


def test_lazy_negation_is_refused() -> None:
    # Its memory holds the values with the other sign.
    imaginary = torch.zeros(2, 5, 4, 1, dtype=torch.complex64).conj().imag
    assert imaginary.is_neg()
    k = torch.zeros(2, 7, 2, 1)
    with pytest.raises(InvalidInputError, match=r"q is a lazy negation.*resolve_neg\(\)"):
        parse_default(imaginary, k, k)
    assert parse_default(imaginary.resolve_neg(), k, k)[1].len_kv == 7


@pytest.mark.parametrize("name", ["q", "k", "v"])
@pytest.mark.parametrize("offset", [0, 8])
def test_out_in_the_memory_of_an_input_is_refused(name: str, offset: int) -> None:
    shape, count = (2, 5, 4, 16), 2 * 5 * 4 * 16
    buffer = torch.zeros(count + 8, dtype=HALF)
    tensors = {key: torch.zeros(shape, dtype=HALF) for key in "qkv"}
    tensors[name] = buffer[:count].view(shape)
    out = buffer[offset : offset + count].view(shape)
    with pytest.raises(InvalidInputError, match=f"out lies in the memory of {name}"):
        parse_default(**tensors, out=out)


def test_out_beside_the_inputs_in_one_buffer_is_fine() -> None:
    q, k, v, out = torch.zeros(2, 8, 2, 4, 16).unbind(3)
    assert parse_default(q, k, v, out=out)[1].len_q == 8


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_out_that_autograd_would_follow_is_refused(name: str) -> None:
    arguments = inputs(out=empty(*OUT_SHAPE))
    arguments[name].requires_grad_()
    with pytest.raises(InvalidInputError, match=r"out is given.*torch\.no_grad\(\)"):
        parse_default(**arguments)
    with torch.no_grad():
        assert parse_default(**arguments)[1].batch == 2


class Speaker:
    """An array of an unknown library: a torch tensor behind DLPack alone."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: Any) -> object:
        return self.tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> object:
        return self.tensor.__dlpack_device__()


class NamespacedSpeaker(Speaker):
    """The same with an array namespace that imports."""

    def __array_namespace__(self) -> object:
        return types.SimpleNamespace(
            __name__="speaker", from_dlpack=lambda x: NamespacedSpeaker(torch.from_dlpack(x))
        )


def test_any_namespace_that_imports_gets_its_kind_back() -> None:
    x = NamespacedSpeaker(torch.arange(3.0))
    assert kind_of(x) == "speaker"
    back = to_kind_of(from_any(x), x)
    assert type(back) is NamespacedSpeaker
    assert back.tensor.data_ptr() == x.tensor.data_ptr()


def test_a_library_that_imports_nothing_is_refused_on_the_way_back() -> None:
    x = Speaker(torch.arange(3.0))
    with pytest.raises(InvalidInputError, match=r"Speaker: its library has no from_dlpack"):
        to_kind_of(from_any(x), x)


@pytest.mark.parametrize("dtype", [">f4", "U8", object])
def test_arrays_that_torch_cannot_hold_are_refused(dtype: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"q is a numpy\.ndarray of dtype .*DLPack"):
        from_any(np.zeros((2, 3)).astype(dtype), name="q")


def test_out_of_another_library_is_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"one library .*out: torch"):
        from_all({"q": np.zeros((2, 3))}, out=torch.zeros(2, 3))
