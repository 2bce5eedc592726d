"""Tests nested tensors in `attention`, against their sequences one by one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import Causal, InvalidInputError, Ragged
from tests.support.compare import rel_l2

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
OF_Q, OF_KV = (3, 1, 6), (5, 2, 6)


def parts(lengths: tuple[int, ...], heads: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(length, heads, 8, generator=generator) for length in lengths]


def nested(sequences: list[Tensor], kind: torch.layout, layout: str) -> Tensor:
    if kind == torch.strided and layout == "bhsd":
        sequences = [one.transpose(0, 1).contiguous() for one in sequences]
    made: Tensor = torch.nested.nested_tensor(sequences, layout=kind)
    if kind == torch.jagged and layout == "bhsd":
        made = made.transpose(1, 2)
    return made.requires_grad_()


def in_sequences(x: Tensor, layout: str) -> list[Tensor]:
    return [one.transpose(0, 1) if layout == "bhsd" else one for one in x.unbind()]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
@pytest.mark.parametrize("kind", [torch.jagged, torch.strided], ids=str)
def test_self_and_cross_attention(kind: torch.layout, layout: str) -> None:
    """The result is nested like q; gradients reach the nested leaves."""
    q, k, v = parts(OF_Q, 4, 1), parts(OF_KV, 2, 2), parts(OF_KV, 2, 3)
    own = [nested(x, kind, layout) for x in (q, k)]
    if kind == torch.jagged:  # k and v share offsets
        values = torch.cat(v).requires_grad_()
        offsets = own[1].offsets()  # type: ignore[operator]
        value = torch.nested.nested_tensor_from_jagged(values, offsets)
        own.append(value.transpose(1, 2) if layout == "bhsd" else value)
    else:
        own.append(nested(v, kind, layout))
    out, lse = jitattn.attention(*own, mask=Causal(), layout=layout, return_lse=True)
    assert out.is_nested
    assert out.layout == kind
    assert lse.shape == (4, sum(OF_Q))
    leaves = [[x.clone().requires_grad_() for x in side] for side in (q, k)]
    wanted = [
        jitattn.attention(a[None], b[None], c[None], mask=Causal())[0]
        for a, b, c in zip(*leaves, v, strict=True)
    ]
    for one, other in zip(in_sequences(out, layout), wanted, strict=True):
        assert rel_l2(one, other) < 1e-6
    sum(one.sin().sum() for one in out.unbind()).backward()
    sum(one.sin().sum() for one in wanted).backward()
    for side, exact in zip(own[:2], leaves, strict=True):
        assert side.grad is not None
        for one, other in zip(in_sequences(side.grad, layout), exact, strict=True):
            assert rel_l2(one, other.grad) < 1e-5


def test_one_side_may_be_a_batch() -> None:
    q = torch.randn(3, 4, 4, 8)
    k = parts(OF_KV, 2, 2)
    keys = nested(k, torch.jagged, "bshd")
    out = jitattn.attention(q, keys, keys)
    for one, own, other in zip(out, q, k, strict=True):
        assert rel_l2(one, jitattn.attention(own[None], other[None], other[None])[0]) < 1e-6
    turned = jitattn.attention(keys, q[:, :, :2], q[:, :, :2])
    assert turned.is_nested


def test_offsets_that_are_equal_or_not() -> None:
    x = nested(parts(OF_KV, 2, 1), torch.jagged, "bshd")
    y = nested(parts(OF_KV, 2, 2), torch.jagged, "bshd")  # with offsets of its own
    assert jitattn.attention(x, x, y).is_nested
    z = nested(parts((6, 2, 5), 2, 2), torch.jagged, "bshd")
    with pytest.raises(InvalidInputError, match="sequence 0 has length 5 in k and 6 in v"):
        jitattn.attention(x, x, z)


def test_compiled() -> None:
    x = nested(parts(OF_KV, 2, 1), torch.jagged, "bshd").detach()
    expected = jitattn.attention(x, x, x, mask=Causal())
    compiled = torch.compile(
        lambda x: jitattn.attention(x, x, x, mask=Causal()), backend="aot_eager", fullgraph=True
    )
    assert rel_l2(compiled(x).values(), expected.values()) < 1e-6


REFUSED: dict[str, dict[str, Any]] = {
    "out": {"out": torch.empty(3, 5, 2, 8)},
    "q_seqs": {"q_seqs": Ragged(torch.tensor([0]), torch.tensor([3]))},
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_do_not_fit(name: str) -> None:
    x = nested(parts(OF_KV, 2, 1), torch.jagged, "bshd")
    with pytest.raises(InvalidInputError, match=f"{name} is given with nested"):
        jitattn.attention(x, x, x, **REFUSED[name])


def test_tensors_that_do_not_fit() -> None:
    x = nested(parts(OF_KV, 2, 1), torch.jagged, "bshd")
    plain = torch.randn(3, 5, 2, 8)
    with pytest.raises(InvalidInputError, match="nest both"):
        jitattn.attention(x, x, plain)
    with pytest.raises(InvalidInputError, match=r"q is a jagged tensor \[3, j, 2, 8\]"):
        jitattn.attention(x, x, x, layout="bhsd")
    flat = torch.nested.nested_tensor([torch.randn(3, 8)] * 2, layout=torch.jagged)
    with pytest.raises(InvalidInputError, match="3 dimensions"):
        jitattn.attention(flat, flat, flat)
    uneven = torch.nested.nested_tensor([torch.randn(3, 2, 8), torch.randn(3, 1, 8)])
    with pytest.raises(InvalidInputError, match="with one H and one D"):
        jitattn.attention(uneven, uneven, uneven)
