"""Renders traced programs as C++, for the generated header.

A program is one struct with a static function a result. Every node is a constant, made by one
function of `cuda_src/jitattn/attention/function_math.cuh`; a read checks its indices. Nothing of
the text of a user's function is in it: names are numbers of nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.spec.derivative import captured_derivatives, derivatives
from jitattn.spec.program import COMPARISONS, LEAVES

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from jitattn.spec.program import Node, Program

_TYPES: Final = {
    "b1": "bool", "u8": "int", "i8": "int", "i16": "int", "i32": "int", "i64": "long long",
    "f16": "float", "bf16": "float", "f32": "float",
}  # fmt: skip
#: Kinds whose results are wrapped or rounded, by the name of the function that does it.
_NARROW: Final = ("u8", "i8", "i16", "f16", "bf16")
#: Names of operations that are words of C++.
_NAMES: Final = {"and": "bit_and", "or": "bit_or", "xor": "bit_xor", "not": "bit_not"}
#: C++ types of the elements of captured tensors.
_ELEMENTS: Final = {
    "b1": "uint8_t", "u8": "uint8_t", "i8": "signed char", "i16": "short", "i32": "int",
    "i64": "long long", "f16": "uint16_t", "bf16": "uint16_t", "f32": "float", "f64": "double",
}  # fmt: skip


def render_function(program: Program, *, captured: bool = False) -> Iterator[str]:
    """Yield the lines of `struct ScoreFunction`: what a pair's score becomes, and its slope.

    `captured`: also the derivatives with respect to what it reads of captured tensors.
    """
    if captured:
        yield "// On what the place of a read depends, of a query and a key of one batch and head."
        yield "enum class Varies { kNever, kByRow, kByKey, kByPair };"
    yield "// What a function of the caller's makes of scores; see attention/function.cuh."
    yield "struct ScoreFunction {"
    yield f"  static constexpr bool kHasScore = {_literal(program.score is not None)};"
    yield f"  static constexpr bool kHasMask = {_literal(program.mask is not None)};"
    if program.score is not None:
        yield from _function("float score", program, program.nodes, program.score)
        beginning = [idx for idx, node in enumerate(program.nodes) if node.op == "score"]
        found = derivatives(program, beginning)
        slope = found.of(beginning[0]) if beginning else None
        yield from _function("float slope", program, found.nodes, slope)
    if program.mask is not None:
        yield from _function("bool sees", program, program.nodes, program.mask)
    if captured:
        yield from _captured(program)
    yield "};"


def render_mask(program: Program) -> Iterator[str]:
    """Yield the lines of `struct ScoreFunction` of a kernel that looks at all pairs of a block.

    What depends on one of them alone is computed apart (prepare/mask_lists.cuh).
    """
    nodes, result = program.nodes, program.mask or 0
    needed = _needed(nodes, result)
    sides = {idx: _side(nodes, idx) for idx in needed}
    used = {result, *(arg for idx in needed if sides[idx] == "pair" for arg in nodes[idx].operands)}
    yield "// What a mask function of the caller's sees: values of a row, of a key, and of both."
    yield "struct ScoreFunction {"
    for side in ("row", "key"):
        kept = [idx for idx in needed if sides[idx] == side and idx in used]
        name = f"{side.capitalize()}Values"
        yield f"  struct {name} {{"
        yield from (f"    {_TYPES[nodes[idx].kind]} v{idx};" for idx in kept)
        yield "  };"
        yield "  template <class Params>"
        yield f"  __device__ __forceinline__ static {name} {side}_values("
        yield "      const Params& params, const ScorePlace& place) {"
        own = {one for idx in kept for one in _needed(nodes, idx)}
        yield from _computed(program, sorted(own))
        yield f"    return {{{', '.join(f'v{idx}' for idx in kept)}}};"
        yield "  }"
    yield "  template <class Params>"
    yield "  __device__ __forceinline__ static bool sees("
    yield "      const Params& params, const ScorePlace& place, const RowValues& row,"
    yield "      const KeyValues& key) {"
    for idx in needed:
        if sides[idx] != "pair" and idx in used:
            yield f"    const {_TYPES[nodes[idx].kind]} v{idx} = {sides[idx]}.v{idx};"
    yield from _computed(program, [idx for idx in needed if sides[idx] == "pair"])
    yield f"    return v{result};"
    yield "  }"
    yield "};"


def _side(nodes: Sequence[Node], idx: int) -> str:
    """Return what a value depends on: a key alone, both of a pair, or at most the row."""
    leaves = {nodes[one].op for one in _needed(nodes, idx)} & {"row", "key"}
    return "pair" if len(leaves) == 2 else "key" if leaves == {"key"} else "row"


class _Read(NamedTuple):
    """A read of a captured tensor of which the score has a derivative."""

    node: int
    tensor: int
    derivative: int  #: a node
    varies: str  #: a value of the C++ enum `Varies`


def _captured(program: Program) -> Iterator[str]:
    """Yield the lines by which gradients of captured tensors are summed (bwd/sm80/captured.cuh)."""
    found = captured_derivatives(program)
    reads = [
        _Read(node, program.nodes[node].args[0], derivative, _varies(program, node))
        for node, derivative in found.of_nodes.items()
    ]
    uses_score = any(
        found.nodes[idx].op == "score"
        for read in reads
        for idx in _needed(found.nodes, read.derivative)
    )
    yield f"  static constexpr int kReads = {len(reads)};"
    yield f"  static constexpr bool kDerivesFromScore = {_literal(uses_score)};"
    yield "  __device__ static constexpr Varies varies(int read) {"
    for idx, read in enumerate(reads):
        yield f"    if (read == {idx}) return Varies::{read.varies};"
    yield "    return Varies::kNever;"
    yield "  }"
    yield "  __device__ static constexpr int tensor_of(int read) {"
    for idx, read in enumerate(reads):
        yield f"    if (read == {idx}) return {read.tensor};"
    yield "    return 0;"
    yield "  }"
    yield "  template <class Params, class Sums>"
    yield "  __device__ __forceinline__ static void captured("
    yield "      const Params& params, const ScorePlace& place, float given, Sums& sums) {"
    needed = {
        idx
        for read in reads
        for start in (read.derivative, *program.nodes[read.node].args[1:])
        for idx in _needed(found.nodes, start)
    }
    yield from _computed(program, sorted(needed), found.nodes)
    yield "    int64_t begin = 0;"
    for tensor in sorted({read.tensor for read in reads}):
        dims = program.tensors[tensor][1]
        sizes = [f"params.tensor{tensor}_size_{axis}" for axis in range(dims)]
        for number, read in enumerate(reads):
            if read.tensor == tensor:
                at = _dense_offset(program.nodes[read.node].args[1:], sizes)
                varies = f"Varies::{read.varies}"
                yield (
                    f"    sums.template add<{number}, {varies}>(begin + {at}, v{read.derivative});"
                )
        size = " * ".join(("int64_t{1}", *sizes))
        yield f"    if (params.captured_wanted >> {tensor} & 1) begin += {size};"
    yield "  }"


def _dense_offset(index: Sequence[int], sizes: Sequence[str]) -> str:
    """Return the offset of an element in a dense tensor."""
    found = "int64_t{0}"
    for idx, size in zip(index, sizes, strict=True):
        found = f"({found} * {size} + fn::place(v{idx}, {size}))"
    return found


def _varies(program: Program, read: int) -> str:
    """Return what the index of a read depends on, of a query and a key of one batch and head."""
    index = [idx for arg in program.nodes[read].args[1:] for idx in _needed(program.nodes, arg)]
    leaves = {program.nodes[idx].op for idx in index} & {"row", "key", "score"}
    if len(leaves) != 1:
        return "kByPair" if leaves else "kNever"
    return {"row": "kByRow", "key": "kByKey", "score": "kByPair"}[leaves.pop()]


def _literal(value: bool) -> str:
    return "true" if value else "false"


def _function(
    head: str, program: Program, nodes: Sequence[Node], result: int | None
) -> Iterator[str]:
    """Yield the lines of a function; `result`: the node that it returns, None for 0."""
    yield "  template <class Params>"
    yield f"  __device__ __forceinline__ static {head}("
    yield "      const Params& params, const ScorePlace& place, float given) {"
    if result is None:
        yield "    return 0.f;"
    else:
        yield from _computed(program, _needed(nodes, result), nodes)
        yield f"    return v{result};"
    yield "  }"


def _computed(
    program: Program, needed: Sequence[int], nodes: Sequence[Node] | None = None
) -> Iterator[str]:
    """Yield the lines that compute these nodes, of the program or what continues it."""
    nodes = program.nodes if nodes is None else nodes
    for idx in needed:
        node = nodes[idx]
        yield f"    const {_TYPES[node.kind]} v{idx} = {_value(program, nodes, node)};"


def _needed(nodes: Sequence[Node], result: int) -> list[int]:
    """Return the nodes that a result depends on, in order."""
    found, left = set(), [result]
    while left:
        idx = left.pop()
        if idx not in found:
            found.add(idx)
            left += nodes[idx].operands
    return sorted(found)


def _value(program: Program, nodes: Sequence[Node], node: Node) -> str:
    op, kind, args = node
    if op == "score":
        return "given"
    if op in LEAVES:
        return f"place.{op}"
    if op == "number":
        return f"params.number{args[0]}"
    if op == "const":
        return _literal(bool(args[0])) if kind == "b1" else f"__uint_as_float({args[0]}u)"
    if op == "read":
        return _read(program, nodes, node)
    divisor = program.divisor(node)
    if divisor >= 0:
        parts = (f"v{args[1]}", *(f"params.number{divisor}_{part}" for part in ("mul", "shift")))
        return f"fn::{op}(v{args[0]}, fn::Divisor{{{', '.join(parts)}}})"
    values = ", ".join(f"v{arg}" for arg in args)
    if op == "cast":
        return f"fn::to_{kind}(v{args[0]})"
    if op == "detach":
        return values
    if op == "where":
        return f"v{args[0]} ? v{args[1]} : v{args[2]}"
    name = f"is_{op}" if op in COMPARISONS else _NAMES.get(op, op)
    found = f"fn::{name}({values})"
    return f"fn::to_{kind}({found})" if kind in _NARROW else found


def _read(program: Program, nodes: Sequence[Node], node: Node) -> str:
    tensor, *index = node.args
    element, _ = program.tensors[tensor]
    offset = " + ".join(
        f"fn::place(v{idx}, params.tensor{tensor}_size_{axis}) * "
        f"params.tensor{tensor}_stride_{axis}"
        for axis, idx in enumerate(index)
    )
    base = f"static_cast<const {_ELEMENTS[element]}*>(params.tensor{tensor})"
    address = f"{base} + ({offset})" if offset else base
    return f"fn::load_{element}({address})"
