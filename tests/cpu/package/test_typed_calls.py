"""Calls whose types mypy checks too (`[tool.mypy] files`): what each returns, by its arguments."""

from __future__ import annotations

from typing import Any, assert_type

import numpy as np
import torch
from torch import Tensor

import jitattn


def test_attention() -> None:
    q = torch.zeros(1, 2, 1, 8)
    seqs = jitattn.Padded(torch.tensor([1]))
    assert_type(jitattn.attention(q, q, q), Tensor)
    assert_type(jitattn.attention(q, q, q, mask=jitattn.Causal(), gear=2, kv_seqs=seqs), Tensor)
    out, lse = jitattn.attention(q, q, q, return_lse=True, layout="bshd")
    assert_type(out, Tensor)
    assert_type(lse, Tensor)
    wants: bool = len(q) == 1
    both = jitattn.attention(q, q, q, return_lse=wants)
    assert_type(both, Tensor | tuple[Tensor, Tensor])
    assert isinstance(both, tuple)


def test_arrays_of_other_libraries() -> None:
    array = np.zeros((1, 2, 1, 8), dtype=np.float32)
    found = jitattn.attention(array, array, array)
    assert_type(found, Any)
    assert isinstance(found, np.ndarray)


def test_caches() -> None:
    q, cache = torch.zeros(1, 1, 1, 8), torch.zeros(1, 4, 1, 8)
    assert_type(jitattn.attention_with_kvcache(q, cache, cache, length=2), Tensor)
    out, lse = jitattn.attention_with_kvcache(q, cache, cache, length=2, return_lse=True)
    assert_type(out, Tensor)
    assert_type(lse, Tensor)


def test_values_show_their_fields() -> None:
    index = torch.tensor([3, 4])
    assert repr(jitattn.Ragged(index, index, 4)) == (
        "Ragged(max_length=4, start=int64[2], stop=int64[2], stop_is_length=True)"
    )
    assert repr(jitattn.Paged(index[None], index[:1])).startswith("Paged(block_table=int64[1, 2]")
    assert "stop=int64[2]" in repr(jitattn.Padded(index))
    table = torch.ones(5, 4)
    assert "cos=float32[5, 4]" in repr(jitattn.Rotary(table, table, interleaved=True))


def test_dir_is_what_is_public() -> None:
    assert dir(jitattn) == sorted(jitattn.__all__)
    assert all(hasattr(jitattn, name) for name in dir(jitattn))
