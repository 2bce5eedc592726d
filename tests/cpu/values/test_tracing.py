"""Tests tracing: what functions become, what is refused, and when a function is traced anew."""

from __future__ import annotations

import functools
import math
import random
from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

import jitattn
from jitattn import InvalidInputError, MaskMod, UnsupportedError
from jitattn.cpu.functions import Chunk, evaluate, evaluate_program
from jitattn.jit.functions import render_function
from jitattn.spec.derivative import derivatives
from jitattn.spec.program import Program, parse
from jitattn.values.function_cache import function_of
from jitattn.values.functions import Function, traced
from jitattn.values.pairs import over_pairs
from tests.support.compare import rel_l2
from tests.support.expressions import Captured, random_function
from tests.support.functions import FUNCTIONS

SIZES = (2, 4, 31, 40)
WIDTH = 5
TABLE = torch.arange(12.0)


def scores(dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(SIZES, generator=torch.Generator().manual_seed(3), dtype=dtype)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_are_those_of_the_function(name: str) -> None:
    score_mod, mask_mod = FUNCTIONS[name]("cpu", *SIZES)
    function = traced(score_mod, None if mask_mod is None else MaskMod(mask_mod))
    given = scores()
    found, visible = evaluate(function, given, Chunk(0, 0, SIZES[3] - SIZES[2]))
    if score_mod is not None and found is not None:
        wanted = over_pairs(score_mod, given, SIZES, "cpu")  # numbers without a score are fp32
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5, check_dtype=False)
    if mask_mod is not None and visible is not None:
        assert torch.equal(visible, over_pairs(mask_mod, None, SIZES, "cpu").expand(SIZES))


def derived(function: Function, given: torch.Tensor) -> torch.Tensor:
    """The derivative with respect to the score, by the program that kernels compile."""
    program = parse(function.program)
    begins = [idx for idx, node in enumerate(program.nodes) if node.op == "score"]
    found = derivatives(program, begins)
    node = found.of(begins[0]) if begins else None
    if node is None:
        return torch.zeros_like(given)
    slope = Program(program.numbers, program.tensors, found.nodes, node, None)
    result, _ = evaluate_program(slope, function, given, Chunk(0, 0, 9))
    assert result is not None
    return result


@pytest.mark.parametrize("seed", range(120))
def test_random_expressions(seed: int) -> None:
    """Values against torch.vmap, derivatives against autograd's."""
    mod = random_function(seed, Captured("cpu", SIZES[0], SIZES[1], SIZES[3]))
    function = traced(mod, None)
    given = scores().requires_grad_()
    found, _ = evaluate(function, given, Chunk(0, 0, 9))
    assert found is not None
    wanted = over_pairs(mod, given, SIZES, "cpu").to(given.dtype)
    assert rel_l2(found, wanted) < 1e-6  # captured numbers are fp32 and bf16
    if wanted.requires_grad:
        (slope,) = torch.autograd.grad(wanted.sum(), given)
        ours = derived(function, given.detach())
        assert rel_l2(ours, slope) < 1e-6 or (ours - slope).abs().max() < 1e-9


def test_numbers_are_arguments_and_not_text() -> None:
    def within(width: int) -> Any:
        return MaskMod(lambda b, h, q, k: q - k <= width)

    one, other = traced(None, within(64)), traced(None, within(65))
    assert one.program == other.program
    assert (one.numbers, other.numbers) == ((64,), (65,))
    wide = traced(None, within(2**40))
    assert parse(wide.program).numbers == ("i64",)


def test_a_warm_function_is_not_called() -> None:
    calls = []
    offset = 3

    def score(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        calls.append(1)
        return s + offset

    class Counted:
        width = 2

        def score(self, s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
            calls.append(1)
            return s * self.width

    def plain(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s * math.pi + TABLE[k % 12] + offset

    function_of(score, None)  # holds a list, which may change: called at every call
    function_of(score, None)
    assert len(calls) == 2
    counted = Counted()
    assert function_of(counted.score, None).numbers == (2,)
    counted.width = 7
    assert function_of(counted.score, None).numbers == (7,)
    first = function_of(plain, None)
    assert function_of(plain, None).numbers == first.numbers
    offset = 4
    assert function_of(plain, None).numbers[-1] == 4


def test_what_torch_makes_of_masks_is_told_apart() -> None:
    """Closures of torch's, whose memory the next one takes."""

    def within(width: int) -> Any:
        return lambda b, h, q, k: q - k <= width

    for width in range(30):
        assert function_of(None, MaskMod(and_masks(within(width)))).numbers == (width,)
    for factor in (2, 3):
        made: dict[str, Any] = {"factor": factor}
        exec("def score(s, b, h, q, k): return s * factor", made)
        assert function_of(made.pop("score"), None).numbers == (factor,)


def test_functions_of_every_kind() -> None:
    def biased(table: Any, s: Any, b: Any, h: Any, q: Any, k: Any, *, factor: float = 2.0) -> Any:
        for _ in range(2):
            s = s + table[k % 12] * factor
        return s

    part = functools.partial(biased, TABLE, factor=0.5)
    found, _ = evaluate(traced(part, None), scores(), Chunk(0, 0, 0))
    assert found is not None
    torch.testing.assert_close(found, scores() + TABLE[torch.arange(40) % 12])
    both = MaskMod(and_masks(noop_mask, or_masks(lambda b, h, q, k: q >= k, noop_mask)))
    assert parse(traced(None, both).program).mask is not None


def _branch(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    return s if q > k else -s


def _written(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
    TABLE[k] = 1.0
    return s


REFUSED: dict[str, tuple[Any, str]] = {
    "branch": (_branch, "torch.where"),
    "write": (_written, "write"),
    "random": (lambda s, b, h, q, k: s + torch.rand(()), "random"),
    "item": (lambda s, b, h, q, k: s + TABLE[0].item(), "item"),
    "in place": (lambda s, b, h, q, k: s.add_(1), "add_"),
    "int": (lambda s, b, h, q, k: s + [1, 2][q], "not known"),
    "whole": (lambda s, b, h, q, k: s + TABLE, "index"),
    "float index": (lambda s, b, h, q, k: s + TABLE[s], "float32"),
    "unknown": (lambda s, b, h, q, k: torch.fft.fft(s), "not traced"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_traced_is_refused_with_its_line(name: str) -> None:
    function, words = REFUSED[name]
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(UnsupportedError, match=words) as found:
        jitattn.attention(q, q, q, score_mod=function)
    assert "test_tracing.py, line" in str(found.value)


def test_what_is_no_function_is_refused() -> None:
    q = torch.randn(1, 3, 1, 8)
    with pytest.raises(InvalidInputError, match="score_mod=3"):
        jitattn.attention(q, q, q, score_mod=3)
    with pytest.raises(InvalidInputError, match="NoneType"):
        jitattn.attention(q, q, q, score_mod=lambda *args: None)
    with pytest.raises(InvalidInputError, match="MaskMod"):
        MaskMod(7)  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="q_offset"):
        MaskMod(noop_mask, q_offset="top")  # type: ignore[arg-type]


BAD_TEXTS = [
    "", "||score.f32|0|-|", "||score.f32;evil() 0|1|-", "||score.f32;add.f32 0 1|1|-",
    "||score.f32;add.i32 0 0|1|-", "f32||number.f32 1|0|-", "|f32:1|score.f32;read.f32 0 0|1|-",
    "||score.f32|-|-", "||score.f32|-|0", '||score.f32"|0|-', "||score.f32 |0|-",
    "|f16:9|score.f32|0|-", "||const.f32 4294967296|0|-", "f99||score.f32|0|-",
]  # fmt: skip


@pytest.mark.parametrize("text", BAD_TEXTS)
def test_texts_that_are_no_programs(text: str) -> None:
    with pytest.raises(ValueError, match="program"):
        parse(text)


def test_nothing_of_a_function_is_in_the_source() -> None:
    """Names and reprs of what it holds may be anything."""

    class Evil(float):
        def __repr__(self) -> str:
            return '"); system("rm -rf /'

    evil = Evil(2.0)
    function = traced(lambda s, b, h, q, k: s * float(evil), None)
    text = "\n".join(render_function(parse(function.program)))
    assert "system" not in text
    rng = random.Random(1)
    pieces = [
        "score.f32",
        "add.f32 0 0",
        "|",
        ";",
        "number.f32 0",
        '"',
        "}",
        "//",
        "\n",
        "f32",
        "0",
    ]
    for _ in range(2000):
        mixed = "".join(rng.choice(pieces) for _ in range(rng.randrange(1, 9)))
        try:
            program = parse(mixed)
        except ValueError:
            continue
        assert program.text() == mixed


def test_masks_are_compared_and_combined() -> None:
    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    assert MaskMod(causal) == MaskMod(causal)
    assert MaskMod(causal) & MaskMod(noop_mask) == MaskMod(causal) & MaskMod(noop_mask)
    assert MaskMod(causal) != MaskMod(causal, q_offset=1)
    q = torch.randn(1, 9, 2, 8)
    keep = torch.ones(1, 9, dtype=torch.bool)
    keep[:, 6:] = False
    mask = jitattn.Window(3, 0) & jitattn.KeyPadding(keep) & (MaskMod(causal) | ~MaskMod(causal))
    plain = jitattn.attention(q, q, q, mask=jitattn.Window(3, 0) & jitattn.KeyPadding(keep))
    assert torch.equal(jitattn.attention(q, q, q, mask=mask), plain)


def test_gradients_of_captured_tensors_on_the_cpu() -> None:
    table = torch.randn(4, 79, dtype=torch.float64, requires_grad=True)
    q = torch.randn(1, 40, 4, 8, dtype=torch.float64)

    def moved(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + table[h, k - q + 39]

    assert torch.autograd.gradcheck(
        lambda t: jitattn.attention(
            q[:, :5], q[:, :5], q[:, :5], score_mod=lambda s, b, h, q, k: s + t[h, k - q + 4]
        ),
        torch.randn(4, 9, dtype=torch.float64, requires_grad=True),
    )
    (found,) = torch.autograd.grad(jitattn.attention(q, q, q, score_mod=moved).sum(), table)
    assert found.isfinite().all()


def test_caches_take_functions() -> None:
    """Indices count a sequence's keys, without its padding."""
    k_cache, v_cache = torch.randn(2, 2, 20, 2, 8).unbind()
    q, k, v = torch.randn(3, 2, 1, 2, 8).unbind()
    given = {"length": torch.tensor([5, 9]), "left_pad": torch.tensor([0, 2])}

    def recent(b: Any, h: Any, q: Any, k: Any) -> Any:
        return k >= 3

    def nearer(s: Any, b: Any, h: Any, q: Any, k: Any) -> Any:
        return s + 0.1 * k

    found = jitattn.attention_with_kvcache(
        q, k_cache.clone(), v_cache.clone(), k, v, mask=MaskMod(recent), score_mod=nearer, **given
    )
    bias = (0.1 * torch.arange(20.0)).masked_fill(torch.arange(20) < 3, -math.inf)
    wanted = jitattn.attention_with_kvcache(
        q, k_cache, v_cache, k, v, mask=jitattn.Full(), bias=bias.expand(1, 1, 1, 20), **given
    )
    torch.testing.assert_close(found, wanted)
