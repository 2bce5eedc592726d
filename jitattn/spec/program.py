"""Programs: score and mask functions as lists of typed operations, part of a spec as text.

A program reads the score of a pair (fp32) and the pair's indices (int32), numbers, which are
arguments of the kernel, and captured tensors at computed indices. It yields a score, or whether the
pair is visible, or both. Its text is the only thing of a user's function that reaches a spec, a
cache key and a source, so `parse` accepts nothing but well-typed operations.

The text has five parts, separated by "|": kinds of the numbers; kinds and dimensions of the
tensors; the nodes; the nodes of the score and of the visibility, or "-". A node is an operation,
its kind, and its operands: earlier nodes, after data of its own::

    f32,i32|f16:2|score.f32;head.i32;key.i32;read.f16 0 1 2;cast.f32 3;add.f32 0 4|5|-

This module imports no torch.
"""

from __future__ import annotations

import functools
import re
from typing import Final, NamedTuple

#: Kinds of values, and of the elements of captured tensors.
BOOL: Final = "b1"
INTEGERS: Final = ("u8", "i8", "i16", "i32", "i64")
FLOATS: Final = ("f16", "bf16", "f32")
KINDS: Final = (BOOL, *INTEGERS, *FLOATS)
#: Element kinds of tensors alone: a read converts them to fp32.
WIDE: Final = ("f64",)
#: Kinds of the numbers that a kernel is given.
NUMBER_KINDS: Final = ("i32", "i64", "f32")
#: What a program begins from, and its kind.
LEAVES: Final = {
    "score": "f32", "batch": "i32", "head": "i32", "row": "i32", "key": "i32",
    "shift": "i32",  # Lkv - Lq of the sequence
}  # fmt: skip
#: Operations on values of one kind, by the number of operands: for floats, integers, bools.
_FLOAT_OPS: Final = {
    1: ("neg", "abs", "sign", "floor", "ceil", "round", "trunc", "exp", "exp2", "expm1", "log",
        "log2", "log1p", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "sin", "cos", "tan",
        "sinh", "cosh", "atan", "erf"),
    2: ("add", "sub", "mul", "div", "floordiv", "truncdiv", "mod", "fmod", "pow", "min", "max",
        "atan2"),
}  # fmt: skip
_INTEGER_OPS: Final = {
    1: ("neg", "abs", "sign", "not"),
    2: ("add", "sub", "mul", "floordiv", "truncdiv", "mod", "fmod", "pow", "min", "max", "and",
        "or", "xor", "shl", "shr"),
}  # fmt: skip
_BOOL_OPS: Final = {1: ("not",), 2: ("and", "or", "xor")}
#: Those that divide.
DIVISIONS: Final = ("floordiv", "truncdiv", "mod", "fmod")
#: Comparisons of two values of one kind; their own kind is bool.
COMPARISONS: Final = ("lt", "le", "gt", "ge", "eq", "ne")
_TESTS: Final = ("isnan", "isinf")
#: Most nodes, numbers and tensors of a program, and dimensions of a tensor.
MOST_NODES: Final = 4096
MOST_NUMBERS: Final = 256
MOST_TENSORS: Final = 32
MOST_DIMENSIONS: Final = 8
_NODE: Final = re.compile(r"([a-z0-9]{1,12})\.([a-z0-9]{2,4})((?: [0-9]{1,10})*)")
_TENSOR: Final = re.compile(r"([a-z0-9]{2,4}):([0-8])")
_OUTPUT: Final = re.compile(r"-|[0-9]{1,4}")


class Node(NamedTuple):
    """An operation. `args`: for "number", which; for "const", its bits; for "read", the tensor."""

    op: str
    kind: str
    args: tuple[int, ...] = ()

    @property
    def operands(self) -> tuple[int, ...]:
        """Nodes that it reads."""
        if self.op in ("number", "const"):
            return ()
        return self.args[1:] if self.op == "read" else self.args


class Program(NamedTuple):
    """A traced function; all operands of a node come before it."""

    numbers: tuple[str, ...]
    tensors: tuple[tuple[str, int], ...]  #: kind and number of dimensions
    nodes: tuple[Node, ...]
    score: int | None  #: node of the new score
    mask: int | None  #: node of whether the pair is visible

    def text(self) -> str:
        """Return the canonical text."""
        nodes = (
            f"{node.op}.{node.kind}" + "".join(f" {arg}" for arg in node.args)
            for node in self.nodes
        )
        outputs = ("-" if found is None else str(found) for found in (self.score, self.mask))
        tensors = (f"{kind}:{dims}" for kind, dims in self.tensors)
        return "|".join((",".join(self.numbers), ",".join(tensors), ";".join(nodes), *outputs))

    def divisors(self) -> tuple[int, ...]:
        """Return the numbers by which integers are divided, in order."""
        return tuple(sorted({found for node in self.nodes if (found := self.divisor(node)) >= 0}))

    def divisor(self, node: Node) -> int:
        """Return the number by which a node of this program divides an int32; else -1."""
        if node.op not in DIVISIONS or node.kind != "i32":
            return -1
        by = self.nodes[node.args[1]]
        return by.args[0] if by.op == "number" else -1

    def reads(self) -> tuple[int, ...]:
        """Return the nodes that read a tensor."""
        return tuple(idx for idx, node in enumerate(self.nodes) if node.op == "read")


@functools.lru_cache(1024)
def parse(text: str) -> Program:
    """Return the program of a text.

    Raises
    ------
    ValueError
        It is none, or not a well-typed one.
    """
    parts = text.split("|")
    if len(parts) != 5 or not text.isascii():
        raise ValueError(f"program {text[:80]!r}: it must have five parts")
    numbers = tuple(parts[0].split(",")) if parts[0] else ()
    tensors = tuple(_tensor(one) for one in parts[1].split(",")) if parts[1] else ()
    if not set(numbers) <= set(NUMBER_KINDS):
        raise ValueError(f"program: numbers of kinds {parts[0][:80]!r}")
    nodes: list[Node] = []
    for one in parts[2].split(";"):
        found = _NODE.fullmatch(one)
        if found is None:
            raise ValueError(f"program: node {one[:80]!r}")
        node = Node(found[1], found[2], tuple(map(int, found[3].split())))
        if not _is_typed(node, nodes, numbers, tensors):
            raise ValueError(f"program: node {one[:80]!r} does not fit its operands")
        nodes.append(node)
    sizes = ((nodes, MOST_NODES), (numbers, MOST_NUMBERS), (tensors, MOST_TENSORS))
    if any(len(found) > most for found, most in sizes):
        raise ValueError("program: too many nodes, numbers or tensors")
    score, mask = (_output(one, len(nodes)) for one in parts[3:])
    is_typed = (score is None or nodes[score].kind == "f32") and (
        mask is None or nodes[mask].kind == BOOL
    )
    program = Program(numbers, tensors, tuple(nodes), score, mask)
    if not is_typed or score is mask is None or program.text() != text:
        raise ValueError("program: its results are no score and no bool, or it is not canonical")
    return program


def _tensor(text: str) -> tuple[str, int]:
    found = _TENSOR.fullmatch(text)
    if found is None or found[1] not in (*KINDS, *WIDE):
        raise ValueError(f"program: tensor {text[:80]!r}")
    return found[1], int(found[2])


def _output(text: str, num_nodes: int) -> int | None:
    if _OUTPUT.fullmatch(text) is None:
        raise ValueError(f"program: result {text[:80]!r}")
    if text == "-":
        return None
    if int(text) >= num_nodes:
        raise ValueError(f"program: result {text} of {num_nodes} nodes")
    return int(text)


def _is_typed(
    node: Node,
    before: list[Node],
    numbers: tuple[str, ...],
    tensors: tuple[tuple[str, int], ...],
) -> bool:
    """Return whether a node has the operands that its operation takes."""
    op, kind, args = node
    if kind not in KINDS:
        return False
    if op in LEAVES:
        return kind == LEAVES[op] and not args
    if op == "number":
        return len(args) == 1 and args[0] < len(numbers) and kind == numbers[args[0]]
    if op == "const":  # bits of a float, or a bool
        return len(args) == 1 and args[0] < {"f32": 2**32, BOOL: 2}.get(kind, 0)
    if any(arg >= len(before) for arg in node.operands):
        return False
    kinds = tuple(before[arg].kind for arg in node.operands)
    if op == "read":
        if not args or args[0] >= len(tensors):
            return False
        element, dims = tensors[args[0]]
        is_read = kind == ("f32" if element in WIDE else element)
        return is_read and len(kinds) == dims and set(kinds) <= {"i32", "i64"}
    if op == "cast":
        return len(kinds) == 1
    if op == "detach":  # the same, without a gradient
        return kinds == (kind,)
    if op in COMPARISONS:
        return kind == BOOL and len(kinds) == 2 and kinds[0] == kinds[1]
    if op in _TESTS:
        return kind == BOOL and len(kinds) == 1 and kinds[0] in FLOATS
    if op == "where":
        return kinds == (BOOL, kind, kind)
    allowed = _BOOL_OPS if kind == BOOL else _FLOAT_OPS if kind in FLOATS else _INTEGER_OPS
    return op in allowed.get(len(kinds), ()) and set(kinds) == {kind}
