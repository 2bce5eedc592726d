"""Tests torch.compile without graph breaks: operators, forward and backward, on the CPU path."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import BlockSparse, Causal, Full, LocalStride, Paged, PerHead, Ragged, Window
from jitattn.api.attention import bind
from jitattn.run.kvcache import KvCache
from jitattn.run.kvcache_operators import encode_with_kvcache
from jitattn.run.operator_encoding import (
    Writer,
    decode,
    encode,
    with_tensors,
    without_tensors,
)
from jitattn.values.functions import Function
from jitattn.values.masks import FunctionBlocks, Rule
from tests.support.compiled import CASES, H, L, extra, inputs


@pytest.mark.parametrize("name", list(CASES))
def test_one_graph_with_the_same_results(name: str) -> None:
    function, more = CASES[name]
    own = [*inputs(), *more]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(
        (out := compiled(*own), *torch.autograd.grad(out.sum(), own)),
        (out := function(*own), *torch.autograd.grad(out.sum(), own)),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted)


def test_sequences() -> None:
    cumulative = torch.tensor([0, 25, 80], dtype=torch.int32)

    def function(q: Tensor, k: Tensor, v: Tensor) -> Any:
        seqs = Ragged.from_cu_seqlens(cumulative, max_length=55)
        return jitattn.attention(q, k, v, mask=Causal(), q_seqs=seqs, kv_seqs=seqs, return_lse=True)

    own = [x.detach().flatten(0, 1).requires_grad_() for x in inputs()]
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    out, lse = compiled(*own)
    wanted, wanted_lse = function(*own)
    torch.testing.assert_close(out, wanted)
    torch.testing.assert_close(lse, wanted_lse)
    got = torch.autograd.grad(out.sum() + lse.sum(), own)
    true = torch.autograd.grad(wanted.sum() + wanted_lse.sum(), own)
    for one, other in zip(got, true, strict=True):
        torch.testing.assert_close(one, other)


def test_pages_with_lengths() -> None:
    table = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    length = torch.tensor([6, 9], dtype=torch.int32)

    def function(q: Tensor, k: Tensor) -> Tensor:
        return jitattn.attention(q, k, k, mask=Causal(), kv_seqs=Paged(table, length))

    q, pages = torch.randn(2, 3, 4, 16), torch.randn(4, 5, 2, 16)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, pages), function(q, pages))


def test_lengths_may_vary_without_new_graphs() -> None:
    count = 0

    def backend(graph: Any, examples: Any) -> Any:
        nonlocal count
        del examples
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(jitattn.attention, fullgraph=True, backend=backend, dynamic=True)
    for length in (17, 30, 55, 64):
        q, k, v = (torch.randn(1, length, 2, 8) for _ in range(3))
        torch.testing.assert_close(compiled(q, k, v), jitattn.attention(q, k, v))
    assert count == 1


def test_the_operators_keep_the_rules_of_operators() -> None:
    q, k, v = inputs()
    bias = extra(1, H, L, L)
    _, call = bind(q, k, v, {"bias": bias, "mask": Causal()})
    done = torch.library.opcheck(torch.ops.jitattn.attention.default, (q, k, v, *encode(call)))
    assert set(done.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", ["int", "tensor", "rows", "pages", "nothing new"])
def test_appending_to_a_cache(kind: str) -> None:
    generator = torch.Generator().manual_seed(1)
    k_cache, v_cache = torch.randn(2, 3, 16, 2, 8, generator=generator)
    q, k, v = (torch.randn(2, 3, 2, 8, generator=generator) for _ in range(3))
    tables = torch.randn(2, 48, 4, generator=generator)
    length = torch.tensor([4, 9], dtype=torch.int32)
    given: dict[str, Any] = {
        "int": {"length": 5},
        "tensor": {"length": length, "rotary": jitattn.Rotary(*tables, interleaved=True)},
        "rows": {"length": length, "batch_idx": torch.tensor([2, 0]), "softcap": 2.0},
        "pages": {"length": length, "block_table": torch.tensor([[2], [0]])},
        "nothing new": {"length": length, "left_pad": torch.tensor([1, 2], dtype=torch.int32)},
    }[kind]
    rows = 3 if "batch_idx" in given or kind == "pages" else 2

    def function(q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor, v: Tensor) -> Any:
        more = (k, v) if kind != "nothing new" else ()
        found = jitattn.attention_with_kvcache(
            q, k_cache, v_cache, *more, mask=Window(5, 0), return_lse=True, **given
        )
        return *found, k_cache[0] + 1.0

    results = []
    for run in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        torch._dynamo.reset()
        caches = [k_cache[:rows].clone(), v_cache[:rows].clone()]
        results.append([*run(q, *caches, k, v), *caches])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted)


def test_the_operator_that_appends_keeps_the_rules_of_operators() -> None:
    generator = torch.Generator().manual_seed(1)
    k_cache, v_cache = torch.randn(2, 2, 16, 2, 8, generator=generator)
    q, k, v = (torch.randn(2, 3, 2, 8, generator=generator) for _ in range(3))
    rotary = jitattn.Rotary(*torch.randn(2, 16, 4, generator=generator), interleaved=False)
    length = torch.tensor([4, 9], dtype=torch.int32)
    cache = KvCache(k, v, length, rotary, None, None, None, 16)
    _, call = bind(q, k_cache, v_cache, {"mask": Causal()})
    arguments = (q, k_cache, v_cache, *encode_with_kvcache(cache, call))
    operator = torch.ops.jitattn.attention_with_kvcache.default
    assert set(torch.library.opcheck(operator, arguments).values()) == {"SUCCESS"}


def test_a_call_comes_back_as_it_was() -> None:
    q, k, v = inputs()
    rules = [
        Full(),
        Causal(),
        Causal("top_left"),
        Window(None, 0, 4, True),
        Window(3, None),
        LocalStride(16, (2, 1), 3, causal=False),
        LocalStride(64, 2, 3, 1, 2, 1, True),
        PerHead([Full(), Causal(), Window(3, 0), LocalStride(8, 1, 2)]),
    ]
    for rule in rules:
        _, call = bind(q, k, v, {"mask": rule, "deterministic": True, "softcap": 2.0})
        assert decode(*encode(call)) == call._replace(return_lse=True)


def test_rules_are_written_as_ever() -> None:
    """Graphs that an earlier version exported hold these numbers."""
    pattern = torch.ones(1, 2, 2, dtype=torch.bool)
    none = -(2**40)
    written: list[tuple[Any, list[int]]] = [
        (Full(), [0]),
        (Causal(), [1, 1]),
        (Causal("top_left"), [1, 0]),
        (Window(None, 7, 4, True), [2, none, 7, 4, 1]),
        (LocalStride(16, (2, 1), 3, causal=False), [3, 16, 2, 1, 3, none, 0, 0, 0, 0]),
        (LocalStride(64, 2, 3, 1, 5, 6, True), [3, 64, 2, none, 3, 1, 5, 6, 1, 1]),
        (BlockSparse(pattern, 8, first_row=9), [4, 0, 8, 0, 9]),
        (PerHead([Causal(), Full()]), [5, 2, 1, 1, 0]),
    ]
    for rule, ints in written:
        writer = Writer()
        writer.rule(rule)
        assert writer.ints == ints
    numbered = {*get_args(Rule)} - {FunctionBlocks}
    assert {kind.graph_number for kind in numbered} == {ints[0] for _, ints in written}
    writer = Writer()
    writer.rule(FunctionBlocks(Function("", (), ()), 1, False, 300, 300))
    assert writer.ints == [0]  # its function says all that it does


@pytest.mark.parametrize("rule", [Window(3, 0), PerHead([Causal(), Window(1, 2)])])
def test_a_context_keeps_rules_of_numbers(rule: Any) -> None:
    q, k, v = inputs()
    _, call = bind(q, k, v, {"mask": rule, "sinks": torch.zeros(H)})
    found = with_tensors(*without_tensors(call))
    parts = (rule, found.mask) if isinstance(rule, Window) else (rule.rules[0], found.mask.rules[0])
    assert parts[0] is parts[1]
    assert found == call._replace(return_lse=True)


def test_out_is_refused() -> None:
    q, k, v = (x.detach() for x in inputs())
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda *given: jitattn.attention(*given, out=torch.empty_like(q)),
        backend="aot_eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="out is given under"):
        compiled(q, k, v)
