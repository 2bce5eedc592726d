"""Every public function with all its tensor arguments, for tests with unusual tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import torch
from torch import Tensor

import jitattn
from jitattn import (
    BlockSparse,
    Causal,
    Dense,
    KeyPadding,
    L2Norm,
    Padded,
    Paged,
    PerHead,
    Ragged,
    Rotary,
    Window,
)

#: A function of named tensors, and the shape and dtype of each.
Entry: TypeAlias = tuple[Callable[..., Any], dict[str, tuple[tuple[int, ...], torch.dtype]]]
B, LQ, LKV, HQ, HKV, D, DV = 2, 6, 9, 4, 2, 16, 8
HALF, FLOAT, INT, BOOL = torch.float16, torch.float32, torch.int32, torch.bool
_QKV = {"q": ((B, LQ, HQ, D), HALF), "k": ((B, LKV, HKV, D), HALF), "v": ((B, LKV, HKV, DV), HALF)}
_FLAT = {"q": ((12, HQ, D), HALF), "k": ((18, HKV, D), HALF), "v": ((18, HKV, DV), HALF)}
_CACHE = {
    "q": ((B, 2, HQ, D), HALF),
    "k_cache": ((B, 16, HKV, D), HALF),
    "v_cache": ((B, 16, HKV, DV), HALF),
    "k": ((B, 2, HKV, D), HALF),
    "v": ((B, 2, HKV, DV), HALF),
}


def _attention(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
    return jitattn.attention(q, k, v, return_lse=True, **more)


def _masked(q: Tensor, k: Tensor, v: Tensor, padding: Tensor, dense: Tensor) -> Any:
    return _attention(q, k, v, mask=Window(4, 1) & KeyPadding(padding) & Dense(dense))


def _patterns(q: Tensor, k: Tensor, v: Tensor, one: Tensor, other: Tensor) -> Any:
    rules = [Causal(), BlockSparse(one, 8), Window(3, 0), BlockSparse(other, 16)]
    return _attention(q, k, v, mask=PerHead(rules))


def _normed(q: Tensor, k: Tensor, v: Tensor, head_scale: Tensor) -> Any:
    return _attention(q, k, v, qk_norm=L2Norm(head_scale=head_scale))


def _ragged(q: Tensor, k: Tensor, v: Tensor, start: Tensor, length: Tensor, cu: Tensor) -> Any:
    seqs = {"q_seqs": Ragged.from_cu_seqlens(cu), "kv_seqs": Ragged(start, length)}
    return _attention(q, k, v, **seqs)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, length: Tensor, start: Tensor, batch_idx: Tensor
) -> Any:
    keys = Padded(length, start, batch_idx=batch_idx)
    return _attention(q, k, v, q_seqs=Padded(length), kv_seqs=keys)


def _paged(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: Tensor, start: Tensor) -> Any:
    return _attention(q, k, v, kv_seqs=Paged(table, length, start=start))


def _cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor, **more: Any) -> Any:
    cos, sin = more.pop("cos"), more.pop("sin")
    rotary = Rotary(cos, sin, interleaved=False)
    return jitattn.attention_with_kvcache(
        q, k_cache, v_cache, k, v, rotary=rotary, return_lse=True, **more
    )


def _paged_cache(q: Tensor, k_cache: Tensor, v_cache: Tensor, table: Tensor, length: Tensor) -> Any:
    return jitattn.attention_with_kvcache(
        q, k_cache, v_cache, length=length, block_table=table, return_lse=True
    )


def _merge(one: Tensor, other: Tensor, one_lse: Tensor, other_lse: Tensor) -> Any:
    return jitattn.merge([one, other], [one_lse, other_lse])


_INDEX = ((B,), INT)
_LSE = ((B, HQ, LQ), FLOAT)
ENTRIES: dict[str, Entry] = {
    "attention": (_attention, {**_QKV, "out": ((B, LQ, HQ, DV), HALF)}),
    "scores": (
        _attention,
        {
            **_QKV,
            "bias": ((1, HQ, LQ, LKV), HALF),
            "relative_bias": ((HQ, 5), HALF),
            "alibi_slopes": ((B, HQ), HALF),
            "sinks": ((HQ,), HALF),
        },
    ),
    "dropout": (
        lambda **given: _attention(dropout_p=0.5, **given),
        {**_QKV, "dropout_state": ((2,), torch.int64)},
    ),
    "masks": (_masked, {**_QKV, "padding": ((B, LKV), BOOL), "dense": ((1, 1, LQ, LKV), BOOL)}),
    "patterns": (_patterns, {**_QKV, "one": ((2, 2), BOOL), "other": ((1, 1), BOOL)}),
    "L2Norm": (_normed, {**_QKV, "head_scale": ((HQ,), HALF)}),
    "ragged": (_ragged, {**_FLAT, "start": _INDEX, "length": _INDEX, "cu": ((B + 1,), INT)}),
    "padded": (_padded, {**_QKV, "length": _INDEX, "start": _INDEX, "batch_idx": _INDEX}),
    "paged": (
        _paged,
        {
            "q": ((B, LQ, HQ, D), HALF),
            "k": ((3, 8, HKV, D), HALF),
            "v": ((3, 8, HKV, DV), HALF),
            "table": ((B, 2), INT),
            "length": _INDEX,
            "start": _INDEX,
        },
    ),
    "cache": (
        _cache,
        {
            **_CACHE,
            "length": _INDEX,
            "cos": ((16, 4), HALF),
            "sin": ((16, 4), HALF),
            "left_pad": _INDEX,
            "batch_idx": _INDEX,
            "out": ((B, 2, HQ, DV), HALF),
        },
    ),
    "paged cache": (
        _paged_cache,
        {
            "q": ((B, 2, HQ, D), HALF),
            "k_cache": ((3, 8, HKV, D), HALF),
            "v_cache": ((3, 8, HKV, DV), HALF),
            "table": ((B, 2), INT),
            "length": _INDEX,
        },
    ),
    "merge": (
        _merge,
        {
            "one": ((B, LQ, HQ, DV), HALF),
            "other": ((B, LQ, HQ, DV), HALF),
            "one_lse": _LSE,
            "other_lse": _LSE,
        },
    ),
    "l2norm": (jitattn.l2norm, {"x": ((B, LQ, HQ, D), HALF)}),
    "dropout_mask": (
        lambda state: jitattn.dropout_mask(state, 0.5, B, HQ, LQ, LKV),
        {"state": ((2,), torch.int64)},
    ),
}
#: Valid values of index tensors whose contents matter.
_CONTENTS = {
    "cu": [0, 5, 12],
    "start": [0, 4],
    "length": [4, 5],
    "batch_idx": [1, 0],
    "left_pad": [1, 2],
    "table": [[0, 1], [2, 0]],
    "state": [5, 6],
    "dropout_state": [5, 6],
}


def real_tensors(name: str, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """Make the tensors of an entry."""
    generator = torch.Generator().manual_seed(1)
    found = {}
    for word, (shape, dtype) in ENTRIES[name][1].items():
        if word in _CONTENTS:
            tensor = torch.tensor(_CONTENTS[word], dtype=dtype)
        elif dtype is BOOL:
            tensor = torch.ones(shape, dtype=dtype)
        else:
            tensor = torch.randn(shape, generator=generator).to(dtype)
        found[word] = tensor.to(device)
    return found


def facts(result: Any) -> list[Any]:
    """Return shape, dtype and strides of each result."""
    results = result if isinstance(result, tuple | list) else [result]
    return [(x.shape, x.dtype, x.stride()) for x in results]


def lose_memory(tensors: dict[str, Tensor], word: str, *, is_view: bool) -> None:
    """Resize the storage of one of the tensors to nothing; a view's address is an offset then."""
    if is_view:
        tensors[word] = torch.cat([tensors[word][:1], tensors[word]])[1:]
    tensors[word].untyped_storage().resize_(0)
