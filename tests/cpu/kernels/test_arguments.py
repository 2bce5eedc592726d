"""Tests argument tables: layout, rendering, packing by name, and their part in cache keys."""

from __future__ import annotations

import ctypes
import itertools
import random
import re
import struct
from collections.abc import Iterator
from enum import StrEnum
from typing import Annotated, NamedTuple

import pytest

from jitattn.errors import InternalError, LaunchError
from jitattn.jit import build, codegen, sources
from jitattn.kernels.append import AppendSpec
from jitattn.kernels.fwd_arguments import FWD, FWD_TABLES
from jitattn.spec import enums
from jitattn.spec.arguments import (
    Argument,
    ArgumentStruct,
    ArgumentTable,
    fast_divisor,
    strides,
    struct_of,
)
from jitattn.spec.enums import MatrixSize
from jitattn.spec.kernel_spec import KernelSpec, families

TABLES = {
    f"{name}-{number}": table
    for name, kind in families().items()
    for number, table in enumerate(kind.tables())
}
_CODES = {"int64_t": "q", "int32_t": "i", "uint32_t": "I", "float": "f"}


def one_of(family: str) -> KernelSpec:
    """A kernel of a family."""
    shorts = (
        spec
        for arch in ("sm_80", "sm_90")
        for kind in families().values()
        for spec in kind.matrix(arch, MatrixSize.TUNED)
    )
    return next(spec for spec in shorts if spec.family == family)


def values_of(table: ArgumentTable) -> dict[str, int]:
    """A value of its own for every argument."""
    return {name: 3 + 2 * number for number, name in enumerate(table.names)}


@pytest.mark.parametrize("family", families())
def test_structs_are_rendered_as_they_are_packed(family: str) -> None:
    spec = one_of(family)
    text = codegen.render(spec)
    rendered = {}
    for name, base, body in re.findall(
        r"struct (\w+)(?: : ([\w<>]+))? \{\n(  \w[^}]*?;\n|)\};", text
    ):
        if name == "Spec":
            continue
        lines = [re.fullmatch(r"  (.*?) (\w+);", line).groups() for line in body.splitlines()]
        rendered[name] = [
            (field, "Q" if kind[-1] == "*" else _CODES[kind]) for kind, field in lines
        ]
        assert base in ("", "Base", "BwdParams<Base>", *rendered)  # declared before it
    assert list(rendered) == [one.name for one in spec.structs]
    for table in type(spec).tables():
        declared = [field for one in table.structs for field in rendered[one.name]]
        assert declared == [(name, code) for name, (_, code) in table.offsets().items()]
    assert spec.arguments in type(spec).tables()
    assert f"int kParamsBytes = {spec.arguments.size};" in text


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_neither_side_pads(table: ArgumentTable) -> None:
    """Where a C compiler puts the fields: each struct behind its base, and nothing between."""
    begin = 0
    for one in table.structs:
        kinds = {"Q": ctypes.c_uint64, "q": ctypes.c_int64, "i": ctypes.c_int32,
                 "I": ctypes.c_uint32, "f": ctypes.c_float}  # fmt: skip
        fields = [(field.name, kinds[field.code]) for field in one.in_order]
        twin = type(one.name, (ctypes.Structure,), {"_fields_": fields})
        for name, _ in fields:
            assert table.offsets()[name][0] == begin + getattr(twin, name).offset
        assert ctypes.sizeof(twin) % 8 == 0
        begin += ctypes.sizeof(twin)
    assert table.size == begin


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_arguments_come_by_name_in_any_order(table: ArgumentTable) -> None:
    values = values_of(table)
    packed = table.pack(values)
    for name, (offset, code) in table.offsets().items():
        assert struct.unpack_from(f"={code}", packed, offset) == (values[name],)
    assert table.pack(dict(random.Random(1).sample(list(values.items()), len(values)))) == packed


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_missing_unknown_and_doubled_names_are_errors(table: ArgumentTable) -> None:
    values, last = values_of(table), table.names[-1]
    fewer = {name: value for name, value in values.items() if name != last}
    for faulty, text in (
        (fewer, rf"{table.name}: missing \['{last}'\]"),
        ({**values, "nothing": 1}, r"unknown \['nothing'\]"),
        ({**fewer, "nothing": 1}, rf"missing \['{last}'\], unknown \['nothing'\]"),
    ):
        with pytest.raises(LaunchError, match=text):
            table.pack(faulty)
        with pytest.raises(LaunchError, match=text):
            table.layout(faulty, ())
    with pytest.raises(LaunchError, match=rf"given twice \['{last}'\]"):
        table.layout(values, [last])
    with pytest.raises(LaunchError, match=rf"given twice \['{last}'\]"):
        table.layout(fewer, [last, last])


@pytest.mark.parametrize("table", TABLES.values(), ids=TABLES)
def test_constant_and_varying_arguments_are_the_whole(table: ArgumentTable) -> None:
    values = values_of(table)
    for varying in (table.names[:1], table.names[2:0:-1], table.names[::-3], table.names, ()):
        rest = {name: value for name, value in values.items() if name not in varying}
        layout = table.layout(rest, varying)
        buffer = bytearray(layout.size)
        given = [one if isinstance(one, bytes) else values[varying[one]] for one in layout.parts]
        layout.pack_into(buffer, 0, *given)
        assert buffer == table.pack(values)


def test_wide_fields_lie_first() -> None:
    one = ArgumentStruct(
        "A", (Argument("n", "int32_t"), Argument("x", "float*"), *strides("x", "row"))
    )
    assert [field.name for field in one.in_order] == ["x", "x_stride_row", "n"]
    assert ArgumentTable(one).size == 24


def test_a_name_is_declared_once() -> None:
    with pytest.raises(InternalError, match="twice"):
        ArgumentTable(FWD, ArgumentStruct("More", (Argument("q", "void*"),), base="FwdParams"))


# ---- A family's key holds its own things


def own_words(spec: KernelSpec) -> set[str]:
    kinds = {type(value).__name__ for _, value in spec.flat_fields() if isinstance(value, StrEnum)}
    return kinds | {one.name for one in spec.structs}


@pytest.mark.parametrize("family", families())
def test_sources_name_no_struct_or_enum_of_another_family(family: str) -> None:
    """But those that its own generated header declares: nothing else could be compiled."""
    known = {name for name, kind in vars(enums).items() if isinstance(kind, type)}
    known |= {one.name for kind in families().values() for t in kind.tables() for one in t.structs}
    source = sources.closure(family)
    text = re.sub(r"//.*", "", "\n".join((source.entry, *source.headers.values())))
    named = known & set(re.findall(r"\b[A-Z]\w+", text))
    allowed = own_words(one_of(family))
    if family in ("combine", "combine_grad", "norm", "norm_grad"):  # two in a file
        pair = {"combine": "combine_grad", "norm": "norm_grad"}
        other = pair.get(family, family.removesuffix("_grad"))
        allowed |= own_words(one_of(other))
    assert named <= allowed


class Fields3(NamedTuple):
    first: Annotated[int, "int32_t", "rows"]
    second: Annotated[Annotated[float, "float"], "a scale"]
    third: Annotated[int, "const float*"]


def test_a_struct_of_a_named_tuple_has_its_fields_in_order() -> None:
    struct = struct_of("P", Fields3, Argument("more", "int32_t"), base="FwdParams")
    assert struct.fields == (
        Argument("first", "int32_t", "rows"),
        Argument("second", "float", "a scale"),
        Argument("third", "const float*"),
        Argument("more", "int32_t"),
    )
    assert struct.render()[0] == "struct P : FwdParams {"
    with pytest.raises(InternalError, match=r"Untyped\.first has no C"):
        struct_of("P", Untyped)


class Untyped(NamedTuple):
    first: int


def test_a_table_is_in_no_other_key(monkeypatch: pytest.MonkeyPatch) -> None:
    specs = {family: one_of(family) for family in families()}
    before = {family: build.key_of(spec) for family, spec in specs.items()}
    more = ArgumentStruct("MoreParams", (Argument("more", "int32_t"),), base="AppendParams")
    monkeypatch.setattr(AppendSpec, "arguments", AppendSpec.arguments.extended(more))
    after = {family: build.key_of(spec) for family, spec in specs.items()}
    assert {family for family in specs if before[family] != after[family]} == {"append"}


def test_a_meaning_is_in_no_key() -> None:
    reworded = ArgumentStruct("FwdParams", tuple(one._replace(meaning="?") for one in FWD.fields))
    assert reworded.render() == FWD.render()
    assert any(one.meaning for one in FWD_TABLES[0].fields)


def divisors() -> Iterator[int]:
    yield from (1, 2, 3, 5, 7, 8, 31, 64, 127, 1000, 2**30, 2**31 - 1, 2**31)


def test_fast_divisor_is_exact() -> None:
    draw = random.Random(3)
    for divisor in divisors():
        mul, shift = fast_divisor(divisor)
        assert 0 < mul < 2**32
        edges = [0, 1, divisor - 1, divisor, divisor + 1, 2 * divisor - 1, 2**31 - 1, 2**31]
        for n in itertools.chain(edges, (draw.randrange(2**31) for _ in range(200))):
            if n <= 2**31:
                assert (((n * mul) >> 32) + n) >> shift == n // divisor
                assert ((n * mul) >> 32) + n < 2**32  # the sum must not wrap in 32 bits
