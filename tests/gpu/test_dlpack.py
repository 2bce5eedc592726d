"""Tests arrays of other libraries through DLPack, returned as their own type."""

from __future__ import annotations

import pytest
import torch

import jitattn
from tests.support.inputs import random_qkv

pytestmark = pytest.mark.real_gpu


def test_cupy() -> None:
    cupy = pytest.importorskip("cupy")
    tensors = random_qkv(2, 30, 50, 4, 2, 64, dtype=torch.float16, device="cuda")
    arrays = [cupy.from_dlpack(x) for x in tensors]
    out, lse = jitattn.attention(*arrays, return_lse=True)
    truth, lse_truth = jitattn.attention(*tensors, return_lse=True)
    assert isinstance(out, cupy.ndarray)
    assert torch.equal(torch.from_dlpack(out), truth)
    assert torch.equal(torch.from_dlpack(lse), lse_truth)


def test_cupy_out() -> None:
    cupy = pytest.importorskip("cupy")
    tensors = random_qkv(1, 30, 50, 2, 2, 64, dtype=torch.float16, device="cuda")
    arrays = [cupy.from_dlpack(x) for x in tensors]
    out = cupy.empty((1, 30, 2, 64), dtype=cupy.float16)
    assert jitattn.attention(*arrays, out=out) is out
    assert torch.equal(torch.from_dlpack(out), jitattn.attention(*tensors))


def test_cupy_stream_is_waited_for_and_made_to_wait() -> None:
    """Arrays made in a CuPy stream go through torch's, and the result back, in order."""
    cupy = pytest.importorskip("cupy")
    tensors = random_qkv(2, 30, 50, 4, 2, 64, dtype=torch.float16, device="cuda")
    truth = jitattn.attention(*tensors)
    late = [torch.full_like(x, float("nan")) for x in tensors]
    result = torch.full_like(truth, float("nan"))
    torch.cuda.synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        arrays = [cupy.from_dlpack(x) for x in late]
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            torch.cuda._sleep(50_000_000)
            for x, values in zip(late, tensors, strict=True):
                x.copy_(values)
        out = jitattn.attention(*arrays)  # in torch's default stream
        with torch.cuda.stream(torch.cuda.ExternalStream(stream.ptr)):
            result.copy_(torch.from_dlpack(out))
    stream.synchronize()
    assert torch.equal(result, truth)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_jax(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = pytest.importorskip("jax")
    if jax.default_backend() != "gpu":
        pytest.skip("needs JAX with a GPU")
    tensors = random_qkv(2, 30, 50, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    arrays = [jax.dlpack.from_dlpack(x) for x in tensors]
    out = jitattn.attention(*arrays)
    assert isinstance(out, jax.Array)
    assert torch.equal(torch.from_dlpack(out), jitattn.attention(*tensors))


class _Foreign:
    """A torch tensor that shows nothing but DLPack."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __dlpack__(self, **arguments: object) -> object:
        return self.tensor.__dlpack__(**arguments)

    def __dlpack_device__(self) -> object:
        return self.tensor.__dlpack_device__()

    def __array_namespace__(self) -> object:
        return torch


def test_torch_through_the_door_gives_the_same_bits() -> None:
    tensors = random_qkv(2, 30, 50, 4, 2, 64, dtype=torch.bfloat16, device="cuda")
    out = jitattn.attention(*(_Foreign(x) for x in tensors))
    assert torch.equal(out, jitattn.attention(*tensors))
