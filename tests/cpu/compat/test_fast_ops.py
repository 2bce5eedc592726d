"""Tests the fast-ops door against a dense reference of its documentation."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import jitattn
from jitattn.compat.fast_ops.flash_attention.attention_ref import attention_ref
from jitattn.compat.fast_ops.flash_attention.flash_attention import (
    FlashAttentionFunction,
    multi_head_attention,
)
from jitattn.compat.fast_ops.flash_attention.flash_attention_triton import (
    flash_attn_triton,
    triton_dropout_mask,
)
from tests.support.compare import rel_l2
from tests.support.compat_fast_ops import (
    LENGTHS_KV,
    LENGTHS_Q,
    D,
    H,
    dense_inputs,
    nested,
    parts,
)

FP32 = torch.float32
#: What torch says once of every strided nested tensor.
pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")


def bias(*shape: int) -> torch.Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(9))
    return made.requires_grad_()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "shape", [None, (1, 1, 1, 50), (2, 1, 33, 50), (1, H, 33, 50), (2, H, 1, 50)], ids=str
)
def test_triton_values_and_gradients(shape: tuple[int, ...] | None, causal: bool) -> None:
    own = dense_inputs(FP32, "cpu")
    added = None if shape is None else bias(*shape)
    leaves = own if added is None else [*own, added]
    out = flash_attn_triton(*own, added, causal)
    truth, weights = attention_ref(
        *(x.double() for x in own), causal=causal, bias=added, upcast=False
    )
    assert out.shape == own[0].shape
    assert rel_l2(out, truth) < 1e-5
    assert weights.shape == (2, H, 33, 50)
    if causal:  # aligned to the top left
        assert not weights[..., 0, 1:].any()
    got = torch.autograd.grad(out.sum(), leaves)
    wanted = torch.autograd.grad(truth.sum(), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert one.shape == other.shape
        assert rel_l2(one, other) < 1e-3


def test_scale_and_arguments_by_position_only() -> None:
    own = dense_inputs(FP32, "cpu")
    usual = flash_attn_triton(*own)
    assert torch.equal(flash_attn_triton(*own, None, False, 0.0, 0.0), usual)
    other = flash_attn_triton(*own, None, False, 0.0, 0.5)
    assert rel_l2(other, jitattn.reference.reference(*own, scale=0.5)) < 1e-5
    with pytest.raises(TypeError):
        flash_attn_triton(*own, causal=True)  # type: ignore[call-arg]


def test_errors_are_the_originals() -> None:
    q, k, v = dense_inputs(FP32, "cpu")
    state = torch.get_rng_state()
    for given, kind, match in (
        ((q[0], k, v), AssertionError, r"q is nested or has 3 dimensions"),
        ((q, k, nested(parts((3, 4), FP32, "cpu", 1), torch.strided)), AssertionError, "v is nest"),
        ((q, k, v, bias(33, 50)), AssertionError, "bias is nested or has 2 dim"),
        ((q, k, v, bias(1, 1, 33, 1)), RuntimeError, r"bias has shape .* \(1, 50\) or \(33, 50\)"),
    ):
        with pytest.raises(kind, match=match) as found:
            flash_attn_triton(*given)
        assert isinstance(found.value, jitattn.InvalidInputError)
    assert torch.equal(torch.get_rng_state(), state)  # nothing was drawn
    for given, match in (
        ((q, k[..., :8], v), r"k has head_dim 8 .* the layout is \[B, L, H, D\]"),
        ((q, k.double(), v), "k is float64"),
        ((q, k, v, None, False, 0.0, float("nan")), "softmax_scale=nan"),
        ((q, k, v, bias(5, 1, 33, 50)), "bias"),
        ((q, k, v, None, False, 1.5), "dropout_p"),
    ):
        with pytest.raises(AssertionError, match=match):
            flash_attn_triton(*given)
    with pytest.raises(AssertionError, match="dropout_p"):
        triton_dropout_mask(1.5, 2, H, 33, 50, "cpu")


def test_errors_of_the_class_are_runtime_errors() -> None:
    own = [x.transpose(1, 2) for x in dense_inputs(FP32, "cpu")]
    sides = [nested(parts((3, 4), FP32, "cpu", 1), torch.jagged)] * 3
    for given, match in (
        ((own[0], own[1][..., :8], own[2]), r"K has head_dim 8 but Q has 24.*\[B, H, L, D\]"),
        ((*own, bias(2, H, 5, 50)), "attn_bias has shape"),
        ((*sides, bias(2, H, 4, 2)), "attn_bias has shape"),
        ((*sides, sides[0]), "attn_bias is nested"),
        ((sides[0], *[x.double() for x in sides[1:]]), "Q is float32, K is float64"),
    ):
        with pytest.raises(RuntimeError, match=match) as found:
            FlashAttentionFunction.apply(*given)
        assert isinstance(found.value, jitattn.InvalidInputError)


def test_the_mask_is_the_one_used() -> None:
    own = dense_inputs(FP32, "cpu")
    torch.manual_seed(11)
    out = flash_attn_triton(*own, None, True, 0.25)
    torch.manual_seed(11)
    mask = triton_dropout_mask(0.25, 2, H, 33, 50, "cpu")
    assert mask.float().mean().sub(0.75).abs() < 0.03
    truth, _ = attention_ref(*own, dropout_p=0.25, dropout_mask=mask, causal=True)
    assert rel_l2(out, truth) < 1e-5
    again = flash_attn_triton(*own, None, True, 0.25)
    assert not torch.equal(out, again)


def test_expanded_heads_and_rows_that_see_nothing() -> None:
    q, k, v = dense_inputs(FP32, "cpu")
    one_k, one_v = (x[:, :, :1].expand(-1, -1, H, -1) for x in (k, v))
    truth, _ = attention_ref(q, one_k, one_v)
    assert rel_l2(flash_attn_triton(q, one_k, one_v), truth) < 1e-5
    hidden = torch.full((1, 1, 33, 50), float("-inf"))
    assert not flash_attn_triton(q, k, v, hidden).any()


def test_attention_ref_pads() -> None:
    own = dense_inputs(torch.bfloat16, "cpu")
    queries, keys = torch.arange(33).expand(2, -1) < 20, torch.arange(50).expand(2, -1) >= 10
    out, weights = attention_ref(*own, queries, keys, reorder_ops=True)
    assert out.dtype is weights.dtype is torch.bfloat16
    assert not out[:, 20:].any()
    assert not weights[:, :, 20:].any()
    assert not weights[..., :10].any()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_nested_tensors(layout: torch.layout, causal: bool) -> None:
    sides = [
        parts(LENGTHS_Q, FP32, "cpu", 1),
        parts(LENGTHS_KV, FP32, "cpu", 2),
        parts(LENGTHS_KV, FP32, "cpu", 3),
    ]
    added = bias(1, H, max(LENGTHS_Q), max(LENGTHS_KV))
    out = FlashAttentionFunction.apply(*(nested(side, layout) for side in sides), added, causal)
    assert out.is_nested
    assert out.layout is layout
    results = out.unbind()
    truths = [
        attention_ref(
            *(x.transpose(0, 1)[None] for x in (q, k, v)),
            causal=causal,
            bias=added[:, :, : q.shape[1], : k.shape[1]],
        )[0][0].transpose(0, 1)
        for q, k, v in zip(*sides, strict=True)
    ]
    for result, truth in zip(results, truths, strict=True):
        assert rel_l2(result, truth) < 1e-5
    leaves = [*sides[0], *sides[1], *sides[2], added]
    got = torch.autograd.grad(sum(x.square().sum() for x in results), leaves)
    wanted = torch.autograd.grad(sum(x.square().sum() for x in truths), leaves)
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < 1e-4


def test_dense_heads_first() -> None:
    own = [x.transpose(1, 2) for x in dense_inputs(FP32, "cpu")]
    out = multi_head_attention(*own)
    truth, _ = attention_ref(*(x.transpose(1, 2) for x in own))
    assert rel_l2(out, truth.transpose(1, 2)) < 1e-5
    with pytest.raises(jitattn.InvalidInputError, match="must all be nested"):
        FlashAttentionFunction.apply(nested(parts((3, 4), FP32, "cpu", 1), torch.strided), *own[1:])


def jagged(
    lengths: tuple[int, ...], like: torch.Tensor | None = None, seed: int = 0, dim: int = D
) -> torch.Tensor:
    """A leaf [B, j, H, D], with offsets of its own or of another."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(lengths), H, dim, generator=generator)
    offsets = torch.tensor([0, *lengths]).cumsum(0) if like is None else like.offsets()
    return torch.nested.nested_tensor_from_jagged(values, offsets).detach().requires_grad_()


def turned(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return [x.transpose(1, 2) for x in tensors]


def dense_by_sequence(*sides: torch.Tensor, causal: bool = False) -> list[torch.Tensor]:
    """[L, H, D] of each."""
    parts = zip(*(x.unbind() for x in sides), strict=True)
    return [attention_ref(*(x[None] for x in one), causal=causal)[0][0] for one in parts]


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged], ids=str)
def test_keys_and_values_of_other_lengths_are_refused(layout: torch.layout) -> None:
    """With the same total: nothing else would tell."""
    q, k, v = (
        nested(parts(lengths, FP32, "cpu", seed), layout)
        for seed, lengths in enumerate(((2, 5), (3, 4), (4, 3)))
    )
    with pytest.raises(RuntimeError, match="sequence 0 has length 3 in K and 4 in V") as found:
        FlashAttentionFunction.apply(q, k, v)
    assert isinstance(found.value, jitattn.InvalidInputError)


def test_offsets_are_compared_only_if_they_are_not_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = jagged((2, 5)), jagged((4, 3), seed=1)
    shared, own = jagged((4, 3), like=y, seed=2), jagged((4, 3), seed=2)
    wanted = FlashAttentionFunction.apply(*turned(x, y, own))
    aliased = torch.nested.nested_tensor_from_jagged(own.values(), y.offsets().view(-1))
    monkeypatch.setattr(torch, "equal", None)
    for v in (shared, aliased, own):  # the last was compared
        out = FlashAttentionFunction.apply(*turned(x, y, v))
        torch.testing.assert_close(out.values(), wanted.values())
    with pytest.raises(TypeError):  # asks
        FlashAttentionFunction.apply(*turned(x, y, jagged((4, 3), seed=2)))


def test_offsets_that_are_written_to_are_compared_again() -> None:
    x, y, own = jagged((2, 5)), jagged((4, 3), seed=1), jagged((4, 3), seed=2)
    FlashAttentionFunction.apply(*turned(x, y, own))
    own.offsets()[1] = 2
    with pytest.raises(RuntimeError, match="sequence 0 has length 4 in K and 2 in V"):
        FlashAttentionFunction.apply(*turned(x, y, own))


def test_a_jagged_result_is_added_to_its_input() -> None:
    """A layer with a residual connection, its gradients, and another one on top."""
    x, y = jagged((5, 33, 1)), jagged((4, 30, 7), seed=1)
    out = FlashAttentionFunction.apply(*turned(x, y, y), None, True)
    assert out.shape == x.transpose(1, 2).shape
    layer = out.transpose(1, 2) + x
    again = FlashAttentionFunction.apply(*turned(layer, y, y)).transpose(1, 2) + layer
    wanted = [
        one + own
        for one, own in zip(dense_by_sequence(x, y, y, causal=True), x.unbind(), strict=True)
    ]
    for one, own in zip(layer.unbind(), wanted, strict=True):
        assert rel_l2(one, own) < 1e-5
    twice = [
        attention_ref(one[None], own[None], own[None])[0][0] + one
        for one, own in zip(wanted, y.unbind(), strict=True)
    ]
    torch.testing.assert_close(again.values(), torch.cat(twice))
    got = torch.autograd.grad(again.values().square().sum(), [x, y])
    true = torch.autograd.grad(torch.cat(twice).square().sum(), [x, y])
    for one, other in zip(got, true, strict=True):
        assert rel_l2(one.values(), other.values()) < 1e-4


def test_a_jagged_result_with_another_head_dim_keeps_the_lengths() -> None:
    x, v = jagged((5, 3)), jagged((5, 3), dim=8)
    out = FlashAttentionFunction.apply(*turned(x, x, v)).transpose(1, 2)
    assert out.shape[1] == x.shape[1]
    assert out.values().shape == (8, H, 8)


def test_the_largest_length_is_known_from_then_on() -> None:
    x = jagged((5, 33, 1))
    q, k, v = turned(x, x, x)
    out = FlashAttentionFunction.apply(q, k, v)
    assert v._maybe_max_seqlen is None  # nobody needs it
    assert q._maybe_max_seqlen == out._maybe_max_seqlen == 33
    assert (out.transpose(1, 2) + x)._maybe_max_seqlen == 33


def test_gaps_between_sequences() -> None:
    offsets, lengths = torch.tensor([0, 6, 12]), torch.tensor([4, 6])
    values = torch.randn(3, 12, H, D)

    def gapped(idx: int, *where: torch.Tensor) -> torch.Tensor:
        return torch.nested.nested_tensor_from_jagged(values[idx], *where)

    q, k, v = (gapped(idx, offsets, lengths) for idx in range(3))
    out = FlashAttentionFunction.apply(*turned(q, k, v)).transpose(1, 2)
    for one, own in zip(out.unbind(), dense_by_sequence(q, k, v), strict=True):
        assert rel_l2(one, own) < 1e-5
    assert (out + q).shape == q.shape
    elsewhere = gapped(2, torch.tensor([2, 6, 12]), lengths)
    with pytest.raises(RuntimeError, match="other gaps"):
        FlashAttentionFunction.apply(*turned(q, k, elsewhere))
    with pytest.raises(RuntimeError, match="sequence 0 has length 4 in K and 6 in V"):
        FlashAttentionFunction.apply(*turned(q, k, gapped(2, offsets)))


@pytest.mark.parametrize("lengths", [(5, 3), (4, 4)])
def test_a_jagged_tensor_that_is_not_turned_is_refused(lengths: tuple[int, ...]) -> None:
    """With equal lengths, too, which torch's sequences do not tell from heads."""
    x = jagged(lengths)
    with pytest.raises(
        RuntimeError, match=r"Q is a jagged tensor \[2, j, 3, 24\].*transpose\(1, 2\)"
    ):
        FlashAttentionFunction.apply(x, x, x)
    (q,) = turned(x)
    with pytest.raises(RuntimeError, match="V is a jagged tensor"):
        FlashAttentionFunction.apply(q, q, x)


def test_nested_tensors_that_do_not_fit_are_refused() -> None:
    apply = FlashAttentionFunction.apply
    x = nested(parts((3, 4), FP32, "cpu", 1), torch.strided)
    three = nested(parts((3, 4, 5), FP32, "cpu", 1), torch.strided)
    other = nested(parts((3, 4), FP32, "cpu", 1), torch.jagged)
    untransposed = torch.nested.as_nested_tensor([torch.randn(n, H, D) for n in (3, 4)])
    flat = torch.nested.as_nested_tensor([torch.randn(n, D) for n in (3, 4)])
    empty = torch.nested.as_nested_tensor([], layout=torch.strided)
    for given, match in (
        ((x, three, three), "2, 3 and 3 sequences"),
        ((x, x, other), "K is nested as torch.strided and V as torch.jagged"),
        ((untransposed, x, x), r"Q has sequences of shapes \[3, 3, 24\], \[4, 3, 24\]"),
        ((flat, flat, flat), "3 dimensions"),
        ((empty, empty, empty), "dimensions"),
        ((x, x, x.to_padded_tensor(0.0)), "V is not nested"),
    ):
        with pytest.raises(RuntimeError, match=match) as found:
            apply(*given)
        assert isinstance(found.value, jitattn.InvalidInputError)
    out = apply(other, x, x)  # Q may be of the other layout
    assert out.layout is torch.jagged
    assert rel_l2(out.values(), apply(other, other, other).values()) < 1e-5


def test_jagged_tensors_compile() -> None:
    def layer(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out = FlashAttentionFunction.apply(*turned(x, y, y), None, True)
        return out.transpose(1, 2) + x

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in ((5, 33, 1), (7, 2, 20), (9, 9, 9), (1, 50, 3)):
        x, y = jagged(lengths), jagged((4, 30, 7), seed=1)
        out, wanted = compiled(x, y), layer(x, y)
        assert out.shape == x.shape
        torch.testing.assert_close(out.values(), wanted.values())
        got = torch.autograd.grad(out.values().square().sum(), [x, y])
        true = torch.autograd.grad(wanted.values().square().sum(), [x, y])
        for one, other in zip(got, true, strict=True):
            torch.testing.assert_close(one.values(), other.values())
    assert counter.frame_count <= 2


def test_compiled_calls_cannot_compare_offsets() -> None:
    q, k, v = (x.detach() for x in turned(jagged((2, 5)), jagged((4, 3)), jagged((4, 3))))
    torch._dynamo.reset()
    compiled = torch.compile(FlashAttentionFunction.apply, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="share one tensor"):
        compiled(q, k, v)
