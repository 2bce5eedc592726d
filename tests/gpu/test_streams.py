"""Tests streams, threads, graphs and devices."""

from __future__ import annotations

import threading

import pytest
import torch

import jitattn
from jitattn.run import forward
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.inputs import random_qkv

pytestmark = pytest.mark.real_gpu

BF16 = torch.bfloat16


def test_another_stream() -> None:
    q, k, v = random_qkv(2, 300, 900, 8, 2, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        # The call must queue behind what this stream does to its inputs.
        torch.cuda._sleep(50_000_000)
        doubled = q * 2
        out = jitattn.attention(doubled, k, v, scale=0.5 * 64**-0.5)
    stream.synchronize()
    assert torch.equal(out, truth)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_graph_replays_with_new_inputs(num_splits: int) -> None:
    q, k, v = random_qkv(2, 4, 900, 8, 2, 64, dtype=BF16, device="cuda")
    jitattn.attention(q, k, v, num_splits=num_splits)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, num_splits=num_splits)
    for seed in (1, 2, 3):
        fresh = random_qkv(2, 4, 900, 8, 2, 64, dtype=BF16, device="cuda", seed=seed)
        for old, new in zip((q, k, v), fresh, strict=True):
            old.copy_(new)
        graph.replay()
        assert torch.equal(out, jitattn.attention(*fresh, num_splits=num_splits))


@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
def test_cold_kernel_during_capture_is_refused_and_the_stream_survives() -> None:
    q, k, v = random_qkv(1, 4, 100, 2, 2, 48, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v)
    forward.forget_kernels()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.raises(jitattn.LaunchError, match=r"jitattn\.warmup"),
        capture(graph),
    ):
        jitattn.attention(q, k, v)
    jitattn.warmup(q, k, v)  # as the error says
    assert torch.equal(jitattn.attention(q, k, v), truth)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v)
    graph.replay()
    assert torch.equal(out, truth)


def test_first_split_may_come_during_capture() -> None:
    q, k, v = random_qkv(1, 4, 900, 2, 2, 48, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v, num_splits=4)
    forward.forget_kernels()
    jitattn.attention(q, k, v, num_splits=1)  # makes counters ready too
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, num_splits=4)
    graph.replay()
    assert torch.equal(out, truth)


def test_thread_whose_first_cuda_call_is_the_launch() -> None:
    q, k, v = random_qkv(2, 100, 200, 2, 2, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v, num_splits=1)
    out = torch.full_like(q, float("nan"))  # given, so torch allocates nothing in the thread
    torch.cuda.synchronize()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with torch.no_grad():
                jitattn.attention(q, k, v, out=out, num_splits=1)
        except jitattn.JitAttnError as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    torch.cuda.synchronize()
    assert errors == []
    assert torch.equal(out, truth)


def test_fresh_thread() -> None:
    q, k, v = random_qkv(2, 100, 900, 8, 2, 64, dtype=BF16, device="cuda")
    truth = jitattn.attention(q, k, v)
    torch.cuda.synchronize()
    results: list[torch.Tensor] = []

    def work() -> None:
        with torch.no_grad():
            results.extend(jitattn.attention(q, k, v) for _ in range(20))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert len(results) == 80
    assert all(torch.equal(result, truth) for result in results)


def test_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    q, k, v = random_qkv(2, 100, 900, 8, 2, 64, dtype=BF16, device="cuda:1")
    out = jitattn.attention(q, k, v)  # the current device is 0
    assert out.device == q.device
    assert torch.cuda.current_device() == 0
    assert rel_l2(out, jitattn.reference.reference(q, k, v)) < 5e-3
    with pytest.raises(jitattn.InvalidInputError, match="one device"):
        jitattn.attention(q, k.to("cuda:0"), v)
