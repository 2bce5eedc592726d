"""Tests that torch.set_default_device and set_default_dtype have no effect on internal tensors."""

from __future__ import annotations

import ast
import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn

PACKAGE = Path(__file__).parents[3] / "jitattn"
FACTORIES = {
    "arange", "as_tensor", "asarray", "bartlett_window", "empty", "empty_strided", "eye", "full",
    "linspace", "logspace", "normal", "ones", "rand", "randint", "randn", "randperm", "range",
    "scalar_tensor", "tensor", "tril_indices", "triu_indices", "zeros",
}  # fmt: skip
#: Factories of int64, whatever the default dtype, where they are given integers.
OF_INTEGERS = {"arange", "randint", "randperm"}


def factories(path: Path) -> list[tuple[int, str, set[str]]]:
    """Lines, names and keywords of the calls that make a tensor out of nothing."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        is_call = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
        if not is_call or getattr(node.func.value, "id", "") != "torch":
            continue
        if node.func.attr in FACTORIES:
            words = {str(word.arg) for word in node.keywords}
            found.append((node.lineno, node.func.attr, words))
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_factories_name_device_and_dtype(path: Path) -> None:
    for line, name, words in factories(path):
        needed = {"device"} if name in OF_INTEGERS else {"device", "dtype"}
        assert needed <= words, f"{path}:{line} names {words or 'nothing'}"


def tensors() -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(3)
    shapes = {"q": (2, 9, 4, 8), "k": (2, 12, 2, 8), "v": (2, 12, 2, 8), "new": (2, 3, 2, 8)}
    return {
        name: torch.randn(shape, generator=made, device="cpu", dtype=torch.float32)
        for name, shape in shapes.items()
    }


def on_cpu(values: Any, dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, device="cpu", dtype=dtype)


def with_cache(length: int | Tensor, **more: Any) -> list[Tensor]:
    x = tensors()
    q, cache = x["q"][:, :3], x["k"].clone()
    tables = torch.ones(2, 24, 4, device="cpu", dtype=torch.float32).unbind()
    rotary = jitattn.Rotary(*tables, interleaved=True)
    found = jitattn.attention_with_kvcache(
        q, cache, cache, x["new"], x["new"], length=length, rotary=rotary, **more
    )
    return [found, cache]


def all_masks() -> list[Tensor]:
    x = tensors()
    keep = x["k"][:, :, 0, 0] > -1.0
    pattern = torch.ones(2, 2, dtype=torch.bool, device="cpu")
    window, stride = jitattn.Window(3, 1), jitattn.LocalStride(8, 1, 2)
    masks = [
        jitattn.Causal() & jitattn.KeyPadding(keep),
        window & jitattn.Dense(keep[:, None, None]),
        stride,
        jitattn.BlockSparse(pattern, 8),
        jitattn.PerHead([window, stride, jitattn.Full(), jitattn.BlockSparse(pattern, 8)]),
    ]
    tables = {"alibi_slopes": x["q"][0, 0, 0, :4], "relative_bias": x["q"][0, 0, :, :5]}
    more = {**tables, "softcap": 3.0}
    state = on_cpu([1, 2], torch.int64)
    call = (x["q"], x["k"], x["v"])
    found = [jitattn.attention(*call, mask=mask, **more) for mask in masks]
    found += [jitattn.reference.reference(*call, mask=mask, **more) for mask in masks]
    found += [jitattn.attention(*call, dropout_p=0.5, dropout_state=state)]
    found += [jitattn.reference.reference(*call, dropout_p=0.5, dropout_state=state)]
    return found


def sequences() -> list[Tensor]:
    x = tensors()
    flat = {name: value.flatten(0, 1) for name, value in x.items()}
    ours = jitattn.Ragged.from_cu_seqlens(on_cpu([0, 10, 18], torch.int32))
    pages = jitattn.Paged(on_cpu([[1], [0]], torch.int32), on_cpu([12, 7], torch.int32))
    given = (flat["q"], x["k"], x["v"])
    found = jitattn.attention(*given, q_seqs=ours, kv_seqs=pages)
    return [found, jitattn.reference.reference(*given, q_seqs=ours, kv_seqs=pages)]


def the_rest() -> list[Tensor]:
    x = tensors()
    lse = x["q"][..., 0].transpose(1, 2)
    blocks = jitattn.patterns.from_tokens(x["q"][0, :, 0] > 0, 4)
    return [
        *jitattn.merge([x["q"]] * 2, [lse, lse + 1.0]),
        jitattn.l2norm(x["q"]),
        jitattn.dropout_mask(on_cpu([1, 2], torch.int64), 0.5, 1, 2, 3, 4),
        *jitattn.patterns.to_csr(blocks),
        jitattn.patterns.to_tokens(blocks, 4, 9, 8, causal=True),
    ]


CALLS = {
    "cache, int": lambda: with_cache(4),
    "cache, lengths": lambda: with_cache(on_cpu([4, 2], torch.int64)),
    "cache, pages": lambda: with_cache(4, block_table=on_cpu([[1], [0]], torch.int32)),
    "cache, nothing new": lambda: [
        jitattn.attention_with_kvcache(*list(tensors().values())[:3], length=5)
    ],
    "masks": all_masks,
    "sequences": sequences,
    "the rest": the_rest,
}


@contextlib.contextmanager
def changed(how: str) -> Iterator[None]:
    """Let torch make tensors elsewhere, or of another dtype, where nothing is said."""
    if how == "device":
        torch.set_default_device("meta")
    else:
        torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("how", ["device", "dtype"])
@pytest.mark.parametrize("name", CALLS)
def test_results_are_the_same(name: str, how: str) -> None:
    wanted = CALLS[name]()
    with changed(how):
        found = CALLS[name]()
    for got, one in zip(found, wanted, strict=True):
        assert torch.equal(got, one)
