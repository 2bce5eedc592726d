"""Tests what the doors keep between calls: never contents of tensors, nor much memory."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from jitattn.compat._kept_sequences import _MOST_KEPT, _kept, sequences_of
from jitattn.compat.dkernel import LocalStrideSparseAttention, SparseAttention, _module, _sequences
from jitattn.compat.flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)
from jitattn.compat.flash_attn._kept_rotary import _checked

L, H, D, PAGE = 12, 2, 16, 4
whole: Any = flash_attn_func
with_cache: Any = flash_attn_with_kvcache


def ends(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.int32)


def varlen(x: Tensor, cu: Tensor, **more: Any) -> Tensor:
    out: Tensor = flash_attn_varlen_func(x, x, x, cu, cu, L, L, causal=True, **more)
    return out


def by_parts(x: Tensor, *places: int) -> Tensor:
    parts = pairwise(places)
    return torch.cat([whole(*[x[None, i:j]] * 3, causal=True)[0] for i, j in parts])


def test_index_tensors_that_are_written_to_count_as_they_are() -> None:
    x, cu = torch.randn(L, H, D), ends(0, 5, L)
    torch.testing.assert_close(varlen(x, cu), by_parts(x, 0, 5, L))
    cu[1] = 8
    torch.testing.assert_close(varlen(x, cu), by_parts(x, 0, 8, L))
    cu.resize_(4).copy_(ends(0, 2, 9, L))
    torch.testing.assert_close(varlen(x, cu), by_parts(x, 0, 2, 9, L))


def test_pages_that_are_moved_or_too_few() -> None:
    x, cu = torch.randn(L, H, D), ends(0, 5, L)
    pages = torch.randn(8, PAGE, H, D)
    table = torch.arange(6, dtype=torch.int32).reshape(2, 3)

    def attend() -> Tensor:
        given = (x, pages, pages, cu, cu, L, L)
        out: Tensor = flash_attn_varlen_func(*given, causal=True, block_table=table)
        return out

    before = attend()
    assert torch.equal(attend(), before)
    table += 2
    after = attend()
    assert not torch.equal(after, before)
    table = table.clone()
    assert torch.equal(attend(), after)
    table.resize_(1, 3)
    with pytest.raises(RuntimeError, match="it needs a row for each"):
        attend()


def test_few_index_tensors_are_kept() -> None:
    x, refs = torch.randn(L, H, D), []
    for place in range(1, 10):
        cu = ends(0, place, L)
        refs.append(weakref.ref(cu))
        varlen(x, cu)
    del cu
    gc.collect()
    assert 0 < sum(ref() is not None for ref in refs) <= _MOST_KEPT


def test_another_bound_is_another_value() -> None:
    cu = ends(0, L)
    long = sequences_of(cu, cu, L, L)
    q_seqs, kv_seqs = sequences_of(cu, cu, L, 5)
    assert (q_seqs.max_length(), kv_seqs._max_length) == (L, 5)
    assert sequences_of(cu, cu, L, 5) == (q_seqs, kv_seqs)
    assert sequences_of(cu, cu, L, L) == long
    assert long[0] is long[1]


def test_index_tensors_of_a_capture_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their memory is the graph's. Those of a call before it serve it."""
    cu = ends(0, L)
    before = sequences_of(cu, cu, L, L)
    own = ends(0, L)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert sequences_of(cu, cu, L, L) is before
    assert sequences_of(own, own, L, L)[0] is not sequences_of(own, own, L, L)[0]


def appended(cos: Tensor, sin: Tensor) -> Tensor:
    cache = torch.zeros(2, 1, 8, H, D)
    generator = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, 2, H, D, generator=generator)
    out: Tensor = with_cache(q, *cache, k, v, cos, sin, cache_seqlens=3)
    return out


def test_rotary_tables_are_checked_again_when_they_are_others() -> None:
    cos, sin = torch.rand(2, 8, D // 2)
    before = appended(cos, sin)
    assert torch.equal(appended(cos, sin), before)
    assert torch.equal(appended(cos.clone(), sin.clone()), before)
    assert not torch.equal(appended(sin, cos), before)
    cos += 1
    assert torch.equal(appended(cos, sin), appended(cos.clone(), sin.clone()))
    for other in (sin[:4], sin.half(), sin[0]):
        with pytest.raises(RuntimeError, match="rotary_cos and rotary_sin"):
            appended(cos, other)
    sin.resize_(4, D // 2)
    with pytest.raises(RuntimeError, match="they must be alike"):
        appended(cos, sin)


def test_tables_whose_data_changed_kind_are_checked_again() -> None:
    cos, sin = torch.rand(2, 8, D // 2)
    appended(cos, sin)
    cos.data = cos.data.half()
    with pytest.raises(RuntimeError, match="they must be alike"):
        appended(cos, sin)


def test_index_tensors_that_changed_shape_are_checked_again() -> None:
    x, cu = torch.randn(L, H, D), ends(0, 5, 9, L)
    varlen(x, cu)
    cu.data = cu.data.view(2, 2)
    with pytest.raises(RuntimeError, match="cu_seqlens"):
        varlen(x, cu)


def test_index_tensors_of_a_transform_are_not_kept() -> None:
    kept = dict(_kept)
    torch.vmap(lambda cu: (sequences_of(cu, cu, L, L), cu.sum())[1])(torch.stack([ends(0, L)] * 2))
    assert _kept == kept


def test_masks_of_an_old_pattern_are_dropped_for_all_shapes() -> None:
    layer = pattern_layer()
    for length in (48, 32, 16):
        x = torch.randn(1, length, H, D)
        layer(x, x, x)
    assert len(layer._facts) == 3
    layer.sparse_pattern.copy_(torch.eye(3, dtype=torch.bool))
    layer(x, x, x)
    assert len(layer._facts) <= 1


def test_rotary_tables_are_not_held() -> None:
    cos, sin = torch.rand(8, D // 2), torch.rand(8, D // 2)
    appended(cos, sin)
    key, refs = (id(cos), id(sin)), [weakref.ref(cos), weakref.ref(sin)]
    assert key in _checked
    del cos, sin
    gc.collect()
    assert [ref() for ref in refs] == [None, None]
    assert [ref() for ref in _checked[key][:2]] == [None, None]


@pytest.mark.parametrize("length", [0, 1, 2, 3, 5])
@pytest.mark.parametrize("window", [(-1, -1), (0, 0), (2, 1)])
def test_rows_that_see_nothing_by_a_length_of_the_host(
    length: int, window: tuple[int, int]
) -> None:
    """Their LSE is +inf, as by a length on a GPU."""
    q, cache = torch.randn(2, 3, H, D), torch.randn(2, 2, 8, H, D)

    def attend(length: Any) -> Any:
        more: Any = {"causal": True, "window_size": window, "return_softmax_lse": True}
        return with_cache(q, *cache, cache_seqlens=length, **more)

    wanted = attend(torch.full((2,), length, dtype=torch.int32))
    assert torch.isposinf(wanted[1]).sum() == 2 * H * max(0, 3 - length)
    for one, other in zip(attend(length), wanted, strict=True):
        assert torch.equal(one, other)


def test_padding_hides_keys_of_a_length_of_the_host() -> None:
    q, cache = torch.randn(2, 1, H, D), torch.randn(2, 2, 8, H, D)
    more: Any = {"cache_leftpad": ends(5, 0), "return_softmax_lse": True}
    _, lse = with_cache(q, *cache, cache_seqlens=5, **more)
    assert torch.isposinf(lse[0]).all()
    assert torch.isfinite(lse[1]).all()


class SeenByTheCore:
    """The arguments that the core gets of tensors that say that they are on a GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[str, Any] = {}
        monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda _: True))
        monkeypatch.setattr(_module, "attention", self._attention)

    def _attention(self, q: Tensor, *_: Tensor, **given: Any) -> Tensor:
        self.given = given
        return q

    def kv_seqs(self) -> Any:
        return self.given["kv_seqs"]


def rule() -> LocalStrideSparseAttention:
    return LocalStrideSparseAttention(H, 128, 16, 2, 3)


def test_layers_share_values_of_index_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    core = SeenByTheCore(monkeypatch)
    x, used, left = torch.randn(2, L, H, D), ends(5, 7), ends(1, 0)
    flat, cu = x.flatten(0, 1), ends(0, L, 2 * L)
    padded = ({"seqlens": used}, {"seqlens": used, "left_paddings": left})
    packed = ({"cu_seqlen_k": cu}, {"cu_seqlen_k": cu, "cu_seqlen_q": cu.clone()})
    for given, y in (*((one, x) for one in padded), *((one, flat) for one in packed)):
        rule()(y, y, y, **given)
        before = core.kv_seqs()
        rule()(y, y, y, **given)
        assert core.kv_seqs() is before
        others = {name: index.clone() for name, index in given.items()}
        rule()(y, y, y, **others)
        assert core.kv_seqs() is not before
    assert 0 < len(_sequences._kept) <= _sequences._MOST_KEPT


def test_values_of_contents_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lengths that follow from paddings alone, and paddings of another dtype."""
    core = SeenByTheCore(monkeypatch)
    x, left = torch.randn(2, L, H, D), ends(1, 0)
    ways: tuple[dict[str, Tensor], ...] = ({}, {"seqlens": torch.tensor([5, 7])})
    for more in ways:
        rule()(x, x, x, left_paddings=left, **more)
        before = core.kv_seqs()
        left += 1
        rule()(x, x, x, left_paddings=left, **more)
        assert core.kv_seqs() is not before
        assert core.kv_seqs().start.tolist() == left.tolist()
    rule()(x, x, x, left_paddings=left)
    assert core.kv_seqs().length.tolist() == (L - left).tolist()


def test_index_tensors_of_the_host_are_checked_at_every_call() -> None:
    layer, x, used = rule(), torch.randn(2, L, H, D), ends(5, 7)
    layer(x, x, x, seqlens=used)
    used[1] = L + 1
    with pytest.raises(AssertionError, match=r"seqlens\[1\]=13"):
        layer(x, x, x, seqlens=used)
    flat, cu = x.flatten(0, 1), ends(0, L, 2 * L)
    short = LocalStrideSparseAttention(H, 16, 16, 1, 2)
    short(*[flat[:16]] * 3, cu_seqlen_k=ends(0, 8, 16))
    layer(flat, flat, flat, cu_seqlen_k=cu)
    cu[1] = 20
    torch.testing.assert_close(
        layer(flat, flat, flat, cu_seqlen_k=cu),
        torch.cat([layer(*[flat[None, i:j]] * 3)[0] for i, j in ((0, 20), (20, 24))]),
    )


def pattern_layer() -> SparseAttention:
    return SparseAttention(16, torch.ones(1, 3, 3, dtype=torch.bool).tril())


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
)
def test_a_copied_module_follows_writes_to_its_own_pattern(copied: Any) -> None:
    x = torch.randn(1, 48, H, D)
    layer = pattern_layer()
    layer.sparse_pattern[0, 2, 0] = False  # its version is that of the copy's after one write
    layer(x, x[:, :24], x[:, :24])  # also of a pattern that is moved
    before = layer(x, x, x)
    other = copied(layer)
    assert torch.equal(other(x, x, x), before)
    other.sparse_pattern[0, 2, 1] = False
    fresh = SparseAttention(16, other.sparse_pattern.clone())
    for k in (x, x[:, :24]):
        assert torch.equal(other(x, k, k), fresh(x, k, k))
    assert not torch.equal(other(x, x, x), before)
    assert torch.equal(layer(x, x, x), before)


def test_masks_of_a_pattern_are_known_until_it_is_written_to() -> None:
    x, layer = torch.randn(1, 48, H, D), pattern_layer()
    wanted = layer(x, x, x)
    (facts,) = layer._facts.values()
    known = facts.known
    layer(x, x, x)
    assert facts.known is known is not None
    layer.sparse_pattern.copy_(torch.eye(3, dtype=torch.bool))
    assert not torch.equal(layer(x, x, x), wanted)
    assert facts.known is not known
