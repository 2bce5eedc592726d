"""Tests errors beside those of `test_problem.py`: memory, autograd, sizes, other libraries."""

from __future__ import annotations

import inspect
import re
import types
from typing import Any

import numpy as np
import pytest
import torch

import jitattn
from jitattn.api.interop import from_all, from_any, kind_of, to_kind_of
from jitattn.cache import files
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values import foreign
from jitattn.values.masks import BlockSparse, Causal, Dense, KeyPadding, PerHead
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


FOREIGN: dict[str, tuple[object, str]] = {
    "is_causal": (True, r'mask=jitattn\.Causal\("top_left"\), as torch aligns it'),
    "causal": (True, r"pass mask=jitattn\.Causal\(\)"),
    "attn_mask": (None, r"jitattn\.Dense\(attn_mask\) if it is bool, bias=attn_mask"),
    "softmax_scale": (0.1, r"pass scale="),
    "sm_scale": (0.1, r"pass scale="),
    "window_size": ((3, -1), r"jitattn\.Window\(3, None\)"),
    "dropout": (0.1, r"pass dropout_p="),
    "softkap": (30.0, r"is softcap= meant\?"),
    "colour": ("red", r"it takes mask, scale, layout, .* tile_rows$"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_keywords_of_other_functions_are_answered_with_ours(name: str) -> None:
    value, text = FOREIGN[name]
    q, k, v = random_qkv()
    for call in (jitattn.attention, jitattn.explain, jitattn.warmup):
        with pytest.raises(InvalidInputError, match=f"attention has no argument {name}: .*{text}"):
            call(q, k, v, **{name: value})
    with pytest.raises(TypeError, match=f"attention_with_kvcache has no argument {name}: "):
        jitattn.attention_with_kvcache(q, k, v, length=1, **{name: value})


def test_every_advice_names_what_there_is() -> None:
    """The keywords and classes that advice names exist, and none is an argument already."""
    own = inspect.signature(jitattn.attention).parameters.keys()
    of_cache = inspect.signature(jitattn.attention_with_kvcache).parameters.keys()
    for name, advice in foreign._OURS.items():
        assert name not in own
        for keyword in re.findall(r"\b(?:pass|or|and) ([a-z_]+)=", advice):
            assert keyword in {*own, *of_cache}, advice
        for public in re.findall(r"jitattn\.([A-Za-z_]+)", advice):
            assert getattr(jitattn, public) is not None


BOOLS = torch.ones(2, 7, dtype=torch.bool)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        (KeyPadding(BOOLS), "KeyPadding(keep=bool[2, 7])"),
        (Dense(BOOLS), "Dense(keep=bool[1, 1, 2, 7])"),
        (Causal("top_left") & KeyPadding(BOOLS),
         "Causal(align='top_left') & KeyPadding(keep=bool[2, 7])"),
        (BlockSparse(BOOLS, 16), "BlockSparse(pattern=bool[2, 7], block_size=16, causal=False)"),
        (PerHead([Causal()] * 9),
         "PerHead([" + "Causal(align='bottom_right'), " * 3 + "... 9 rules in all])"),
    ],
)  # fmt: skip
def test_masks_in_messages_are_kinds_and_shapes(mask: Any, text: str) -> None:
    assert repr(mask) == text


def test_a_refused_intersection_prints_no_tensor() -> None:
    big = KeyPadding(torch.ones(64, 4096, dtype=torch.bool))
    with pytest.raises(InvalidInputError) as refused:
        _ = Causal() & big & KeyPadding(BOOLS)
    message = str(refused.value)
    assert message.startswith("Causal(align='bottom_right') & KeyPadding(keep=bool[64, 4096]) & ")
    assert "tensor(" not in message
    assert len(message) < 200


def columns_apart(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, with strides whose last is not 1."""
    return tensor.transpose(-2, -1).contiguous().transpose(-2, -1)


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
def test_any_strides_at_the_cost_of_a_copy_and_one_warning(
    names: str, caplog: pytest.LogCaptureFixture
) -> None:
    files._warned.discard("strides")
    plain = dict(zip("qkv", random_qkv(2, 5, 7, 4, 2, 16, 24), strict=True))
    apart = {name: columns_apart(x) if name in names else x for name, x in plain.items()}
    assert all(apart[name].stride(-1) != 1 for name in names)
    for tensors in (plain, apart):
        for tensor in tensors.values():
            tensor.requires_grad_()
    truth = jitattn.attention(*plain.values(), mask=Causal())
    out = jitattn.attention(*apart.values(), mask=Causal())
    assert torch.equal(out, truth)
    for tensors, result in ((plain, truth), (apart, out)):
        grads = torch.autograd.grad(result.square().sum(), list(tensors.values()))
        tensors |= dict(zip(("dq", "dk", "dv"), grads, strict=True))
    assert all(torch.equal(apart[name], plain[name]) for name in ("dq", "dk", "dv"))
    (warning,) = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert "has strides" in warning
    assert "copied at each call" in warning


def test_any_strides_with_a_cache() -> None:
    files._warned.add("strides")
    q, k, v = random_qkv(1, 3, 3, 4, 2, 16, 16)
    caches = [torch.zeros(2, 1, 8, 2, 16).unbind(0) for _ in range(2)]
    truth = jitattn.attention_with_kvcache(q, *caches[0], k, v, length=2)
    apart = [columns_apart(one) for one in (q, k, v)]
    out = jitattn.attention_with_kvcache(apart[0], *caches[1], *apart[1:], length=2)
    assert torch.equal(out, truth)
    assert torch.equal(caches[0][0], caches[1][0])
    with pytest.raises(InvalidInputError, match="k has strides"):  # it is written in place
        jitattn.attention_with_kvcache(q, columns_apart(caches[0][0]), caches[0][1], length=2)


def test_any_strides_in_a_compiled_graph() -> None:
    q, k, v = random_qkv(1, 3, 5, 4, 2, 16, 16)
    compiled = torch.compile(jitattn.attention, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(columns_apart(q), k, v), jitattn.attention(q, k, v))


def test_a_dense_mask_of_two_dimensions_is_for_all_heads() -> None:
    q, k, v = random_qkv(2, 5, 7, 4, 2, 16, 16)
    keep = torch.rand(5, 7, generator=torch.Generator().manual_seed(3)) > 0.4
    for matrix in (keep, keep[:1]):
        whole = matrix.expand(2, 4, 5, 7).contiguous()
        got = jitattn.attention(q, k, v, mask=Causal() & Dense(matrix))
        assert torch.equal(got, jitattn.attention(q, k, v, mask=Causal() & Dense(whole)))
    with pytest.raises(InvalidInputError, match=r"Dense\(...\) has shape \[1, 1, 4, 7\]"):
        jitattn.attention(q, k, v, mask=Dense(keep[:4]))
