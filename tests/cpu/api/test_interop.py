"""Tests DLPack exchange with numpy, and its errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import jitattn
from jitattn.api import interop
from tests.support.inputs import random_qkv


def arrays(dtype: torch.dtype = torch.float32) -> list[np.ndarray]:
    return [x.numpy() for x in random_qkv(1, 5, 7, 2, 2, 16, dtype=dtype)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_numpy_in_numpy_out(dtype: torch.dtype) -> None:
    out, lse = jitattn.attention(*arrays(dtype), return_lse=True)
    truth, lse_truth = jitattn.attention(
        *random_qkv(1, 5, 7, 2, 2, 16, dtype=dtype), return_lse=True
    )
    assert isinstance(out, np.ndarray)
    assert np.array_equal(out, truth.numpy())
    assert np.array_equal(lse, lse_truth.numpy())


def test_read_only_inputs_are_fine() -> None:
    inputs = arrays()
    for one in inputs:
        one.flags.writeable = False
    assert np.isfinite(jitattn.attention(*inputs)).all()


def test_out_of_the_same_kind_is_written() -> None:
    q, k, v = arrays()
    out = np.full_like(q, np.nan)
    assert jitattn.attention(q, k, v, out=out) is out
    assert np.array_equal(out, jitattn.attention(q, k, v))


def test_read_only_out_is_refused() -> None:
    q, k, v = arrays()
    out = np.zeros_like(q)
    out.flags.writeable = False
    with pytest.raises(jitattn.InvalidInputError, match="out is a read-only numpy"):
        jitattn.attention(q, k, v, out=out)


def test_mixed_libraries_are_refused() -> None:
    q, k, v = arrays()
    with pytest.raises(jitattn.InvalidInputError, match="one library"):
        jitattn.attention(torch.from_numpy(q), k, v)


def test_what_speaks_no_dlpack_is_refused() -> None:
    q, k, v = arrays()
    with pytest.raises(jitattn.InvalidInputError, match=r"q is a list.*DLPack"):
        jitattn.attention(q.tolist(), k, v)


def test_negative_strides_are_refused() -> None:
    q, k, v = arrays()
    with pytest.raises(jitattn.InvalidInputError, match="negative strides"):
        jitattn.attention(q[:, ::-1], k, v)


def test_result_that_the_library_cannot_hold() -> None:
    with pytest.raises(jitattn.InvalidInputError, match="numpy cannot hold it"):
        interop.to_kind_of(torch.zeros(2, dtype=torch.bfloat16), np.zeros(2))
