"""Tests block lists on a GPU: streams, captures, inference mode, many patterns."""

from __future__ import annotations

import pytest
import torch

import jitattn
from jitattn.reference import reference
from jitattn.request import block_lists

from ..support.capture import capture
from ..support.compare import rel_l2


def inputs(length: int = 256) -> tuple[torch.Tensor, ...]:
    return tuple(torch.randn(1, length, 2, 64, dtype=torch.float16, device="cuda") for _ in "qkv")


def random_rule(blocks: int = 16) -> jitattn.BlockSparse:
    pattern = torch.rand(2, blocks, blocks, device="cuda") < 0.4
    return jitattn.BlockSparse(pattern, 16)


def assert_right(out: torch.Tensor, qkv: tuple[torch.Tensor, ...], rule: jitattn.Mask) -> None:
    truth = reference(*(x.double() for x in qkv), mask=rule)
    assert rel_l2(out, truth) < 1e-3


@pytest.mark.real_gpu
def test_lists_dropped_while_another_stream_needs_them_are_not_given_away() -> None:
    qkv = inputs(2048)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    rule = random_rule(128)
    jitattn.attention(*qkv, mask=rule)  # compiled and loaded
    truths, outs = [], []
    torch.cuda.synchronize()
    for idx in range(60):
        rule = random_rule(128)
        with torch.cuda.stream(streams[idx % 2]):
            out = jitattn.attention(*qkv, mask=rule)
        with torch.cuda.stream(streams[1 - idx % 2]):
            torch.cuda._sleep(2_000_000)
            other = jitattn.attention(*qkv, mask=rule)
        truths.append(rule.pattern.clone())
        outs.append((out, other))
        del rule
        scribble = [torch.full((1 << 16,), -1, dtype=torch.int32, device="cuda") for _ in range(4)]
        del scribble
    torch.cuda.synchronize()
    for (out, other), pattern in zip(outs, truths, strict=True):
        assert torch.equal(out, other)
        assert torch.equal(out, jitattn.attention(*qkv, mask=jitattn.BlockSparse(pattern, 16)))


def test_a_hundred_patterns_are_built_once(monkeypatch: pytest.MonkeyPatch) -> None:
    qkv = inputs()
    rules = [random_rule() for _ in range(100)]
    builds = 0
    build = block_lists._build

    def counted(*args: object) -> block_lists.BlockLists:
        nonlocal builds
        builds += 1
        return build(*args)

    monkeypatch.setattr(block_lists, "_build", counted)
    for _ in range(2):
        for rule in rules:
            jitattn.attention(*qkv, mask=rule)
    assert builds == len(rules)


@pytest.mark.real_gpu
def test_a_hundred_patterns_are_captured_after_one_call() -> None:
    qkv = inputs()
    rules = [random_rule() for _ in range(100)]
    expected = [jitattn.attention(*qkv, mask=rule) for rule in rules]
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        found = [jitattn.attention(*qkv, mask=rule) for rule in rules]
    del rules
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_a_pattern_written_to_under_inference_mode() -> None:
    qkv = inputs()
    with torch.inference_mode():
        rule = random_rule()
        jitattn.attention(*qkv, mask=rule)
        rule.pattern.logical_not_()
        assert_right(jitattn.attention(*qkv, mask=rule), qkv, rule)


@pytest.mark.real_gpu
@pytest.mark.slow
def test_compiled_calls_under_inference_mode_take_patterns() -> None:
    qkv = inputs()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: torch.Tensor):
        return jitattn.attention(q, k, v, mask=jitattn.BlockSparse(pattern, 16))

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    with torch.inference_mode():
        rule = random_rule()
        out = compiled(*qkv, rule.pattern)
        assert_right(out, qkv, rule)
        rule.pattern.logical_not_()
        assert_right(compiled(*qkv, rule.pattern), qkv, rule)
