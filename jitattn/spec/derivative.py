"""Differentiates programs: derivatives of the new score with respect to what it is made of.

Rules are torch's, ties and corners included: where a minimum or maximum has two equal operands each
gets half; |x| at 0, roundings and comparisons have derivative 0; a branch that is not taken has 0.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.spec.program import FLOATS, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from jitattn.spec.program import Program


class Derivatives(NamedTuple):
    """A program's nodes, continued by those of its derivatives, and where these are."""

    nodes: tuple[Node, ...]
    of_nodes: dict[int, int]  #: of the nodes asked for: where the derivative is not zero

    def of(self, node: int) -> int | None:
        """Return the node of a derivative; None: it is 0."""
        return self.of_nodes.get(node)


class _Builder:
    """Appends nodes of kind fp32 to a program."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)

    def add(self, op: str, *args: int, kind: str = "f32") -> int:
        self.nodes.append(Node(op, kind, args))
        return len(self.nodes) - 1

    def const(self, value: float) -> int:
        (bits,) = struct.unpack("<I", struct.pack("<f", value))
        return self.add("const", bits)

    def wide(self, node: int) -> int:
        """Return a node as fp32."""
        return node if self.nodes[node].kind == "f32" else self.add("cast", node)

    def choose(self, test: str, one: int, other: int, yes: int, no: int) -> int:
        return self.add("where", self.add(test, one, other, kind="b1"), yes, no)


def derivatives(program: Program, nodes: Sequence[int]) -> Derivatives:
    """Return the derivatives of the score with respect to nodes of a program, in fp32.

    Parameters
    ----------
    program : Program
        It has a score.
    nodes : sequence of int
        Floating nodes of it: the score that it begins from, reads of tensors.
    """
    builder = _Builder(program.nodes)
    if program.score is None:
        return Derivatives(program.nodes, {})
    leads = _leading_to(program, nodes)
    gradients: dict[int, int] = {program.score: builder.const(1.0)}
    for idx in range(program.score, -1, -1):
        gradient = gradients.get(idx)
        if gradient is None or not leads[idx]:
            continue
        node = program.nodes[idx]
        rule = _RULES.get(node.op)
        if rule is None:
            continue
        for operand, part in rule(builder, node, idx, gradient):
            if not leads[operand]:
                continue
            known = gradients.get(operand)
            gradients[operand] = part if known is None else builder.add("add", known, part)
    found = {idx: gradients[idx] for idx in nodes if idx in gradients}
    return Derivatives(tuple(builder.nodes), found)


def captured_derivatives(program: Program) -> Derivatives:
    """Return the derivatives of the score with respect to all that it reads of floating tensors."""
    reads = (idx for idx, node in enumerate(program.nodes) if node.op == "read")
    return derivatives(program, [idx for idx in reads if program.nodes[idx].kind in FLOATS])


def differentiable_tensors(program: Program) -> frozenset[int]:
    """Return the captured tensors of which the score has a derivative, by their numbers."""
    found = captured_derivatives(program)
    return frozenset(program.nodes[idx].args[0] for idx in found.of_nodes)


def _leading_to(program: Program, nodes: Sequence[int]) -> list[bool]:
    """Return which floating nodes depend on some of these."""
    found: list[bool] = []
    wanted = set(nodes)
    for idx, node in enumerate(program.nodes):
        depends = any(found[operand] for operand in node.operands)
        found.append(node.kind in FLOATS and (idx in wanted or (depends and node.op != "read")))
    return found


_Parts = list[tuple[int, int]]
_Rule = "Callable[[_Builder, Node, int, int], _Parts]"


def _two(b: _Builder, node: Node) -> tuple[int, int, int, int]:
    """Return both operands, and as fp32."""
    one, other = node.args
    return one, other, b.wide(one), b.wide(other)


def _add(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    return [(node.args[0], g), (node.args[1], g)]


def _sub(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    return [(node.args[0], g), (node.args[1], b.add("neg", g))]


def _mul(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    one, other, x, y = _two(b, node)
    return [(one, b.add("mul", g, y)), (other, b.add("mul", g, x))]


def _div(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    one, other, _, y = _two(b, node)
    of_one = b.add("div", g, y)
    of_other = b.add("neg", b.add("mul", of_one, b.add("div", b.wide(one), y)))
    return [(one, of_one), (other, of_other)]


def _mod(rounding: str) -> Callable[[_Builder, Node, int, int], _Parts]:
    def rule(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
        one, other, x, y = _two(b, node)
        quotient = b.add(rounding, b.add("div", x, y))
        return [(one, g), (other, b.add("neg", b.add("mul", g, quotient)))]

    return rule


def _pow(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    one, other, x, y = _two(b, node)
    zero, unit = b.const(0.0), b.const(1.0)
    power = b.add("pow", x, b.add("sub", y, unit))
    of_one = b.choose("eq", y, zero, zero, b.add("mul", g, b.add("mul", y, power)))
    logarithm = b.choose("eq", x, zero, zero, b.add("log", x))
    of_other = b.add("mul", g, b.add("mul", b.wide(idx), logarithm))
    return [(one, of_one), (other, of_other)]


def _extreme(loses: str) -> Callable[[_Builder, Node, int, int], _Parts]:
    def rule(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
        one, other, x, y = _two(b, node)
        zero, half = b.const(0.0), b.add("mul", g, b.const(0.5))
        tied = b.choose("eq", x, y, half, g)
        return [
            (one, b.choose(loses, x, y, zero, tied)),
            (other, b.choose(loses, y, x, zero, tied)),
        ]

    return rule


def _atan2(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    one, other, y, x = _two(b, node)
    square = b.add("add", b.add("mul", x, x), b.add("mul", y, y))
    over = b.add("div", g, square)
    return [(one, b.add("mul", over, x)), (other, b.add("neg", b.add("mul", over, y)))]


def _where(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    condition, one, other = node.args
    zero = b.const(0.0)
    return [
        (one, b.add("where", condition, g, zero)),
        (other, b.add("where", condition, zero, g)),
    ]


def _passed(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
    return [(node.args[0], g)]


def _unary(slope: Callable[[_Builder, int, int], int]) -> Callable[..., _Parts]:
    """Return the rule of a function, given its slope by builder, operand and result."""

    def rule(b: _Builder, node: Node, idx: int, g: int) -> _Parts:
        (one,) = node.args
        return [(one, b.add("mul", g, slope(b, b.wide(one), b.wide(idx))))]

    return rule


def _over(b: _Builder, node: int, factor: float = 1.0) -> int:
    return b.add("div", b.const(factor), node)


def _times(b: _Builder, node: int, factor: float) -> int:
    return b.add("mul", node, b.const(factor))


def _rest(b: _Builder, node: int) -> int:
    """Return 1 - x."""
    return b.add("sub", b.const(1.0), node)


_LN2: Final = math.log(2.0)
_RULES: Final[dict[str, Callable[[_Builder, Node, int, int], _Parts]]] = {
    "add": _add, "sub": _sub, "mul": _mul, "div": _div, "mod": _mod("floor"),
    "fmod": _mod("trunc"), "pow": _pow, "min": _extreme("gt"), "max": _extreme("lt"),
    "atan2": _atan2, "where": _where, "cast": _passed,
    "neg": lambda b, node, idx, g: [(node.args[0], b.add("neg", g))],
    "abs": _unary(lambda b, x, y: b.add("sign", x)),
    "exp": _unary(lambda b, x, y: y),
    "exp2": _unary(lambda b, x, y: _times(b, y, _LN2)),
    "expm1": _unary(lambda b, x, y: b.add("add", y, b.const(1.0))),
    "log": _unary(lambda b, x, y: _over(b, x)),
    "log2": _unary(lambda b, x, y: _over(b, x, 1.0 / _LN2)),
    "log1p": _unary(lambda b, x, y: _over(b, b.add("add", x, b.const(1.0)))),
    "sqrt": _unary(lambda b, x, y: _over(b, y, 0.5)),
    "rsqrt": _unary(lambda b, x, y: _times(b, b.add("mul", y, b.add("mul", y, y)), -0.5)),
    "reciprocal": _unary(lambda b, x, y: b.add("neg", b.add("mul", y, y))),
    "tanh": _unary(lambda b, x, y: _rest(b, b.add("mul", y, y))),
    "sigmoid": _unary(lambda b, x, y: b.add("mul", y, _rest(b, y))),
    "sin": _unary(lambda b, x, y: b.add("cos", x)),
    "cos": _unary(lambda b, x, y: b.add("neg", b.add("sin", x))),
    "tan": _unary(lambda b, x, y: b.add("add", b.const(1.0), b.add("mul", y, y))),
    "sinh": _unary(lambda b, x, y: b.add("cosh", x)),
    "cosh": _unary(lambda b, x, y: b.add("sinh", x)),
    "atan": _unary(lambda b, x, y: _over(b, b.add("add", b.const(1.0), b.add("mul", x, x)))),
    "erf": _unary(lambda b, x, y: _times(
        b, b.add("exp", b.add("neg", b.add("mul", x, x))), 2.0 / math.sqrt(math.pi))),
}  # fmt: skip
