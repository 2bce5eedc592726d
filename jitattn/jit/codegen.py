"""Renders jitattn_spec.h, the header that specializes the templates to a `KernelSpec`.

It declares only what its kernel uses: the enums of the spec's fields, the parameter structs, and
the spec itself, one line per field. Names of fields and enum values change from snake_case to
kCamelCase.
"""

from __future__ import annotations

import functools
from enum import StrEnum
from itertools import chain
from typing import TYPE_CHECKING

from jitattn.jit.functions import render_function, render_mask
from jitattn.spec.kernel_spec import KernelSpec, arch_number
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Iterator

#: Name by which the templates include the generated text.
HEADER_NAME = "jitattn_spec.h"


def render(spec: KernelSpec) -> str:
    """Return the generated header of `spec`."""
    kinds = dict.fromkeys(type(value) for _, value in spec.flat_fields())
    function = str(dict(spec.flat_fields()).get("function", ""))
    lines = [
        f"// Generated: the {spec.family} kernel for {spec.arch}.",
        "#pragma once",
        "",
        '#include "jitattn/types.cuh"',
        *(('#include "jitattn/attention/function_math.cuh"',) if function else ()),
        "",
        "namespace jitattn {",
        "",
        *(_enum(kind) for kind in kinds if issubclass(kind, StrEnum)),
        "",
        *chain.from_iterable((*struct.render(), "") for struct in spec.structs),
        *_function(spec, function),
        "}  // namespace jitattn",
        "",
        "struct Spec {",
        *(f"  static constexpr {line}" for line in _members(spec)),
        *(("  using Function = jitattn::ScoreFunction;",) if function else ()),
        "};",
    ]
    return "\n".join(lines) + "\n"


def _function(spec: KernelSpec, text: str) -> Iterator[str]:
    if text:
        program = parse(text)
        lines = render_function(program, captured=spec.derives_captured)
        yield from render_mask(program) if spec.sees_only else lines
        yield ""


@functools.cache
def camel(name: str) -> str:
    """Convert a name: 'head_dim' → 'kHeadDim', 'f32_acc' → 'kF32Acc'."""
    return "k" + "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _enum(kind: type[StrEnum]) -> str:
    return f"enum class {kind.__name__} {{ {', '.join(camel(one.value) for one in kind)} }};"


def _members(spec: KernelSpec) -> Iterator[str]:
    yield _member("arch", arch_number(spec.arch))
    for name, value in spec.flat_fields():
        if isinstance(value, str) and not isinstance(value, StrEnum):
            yield f"bool {camel(f'has_{name}')} = {'true' if value else 'false'};"
        else:
            yield _member(name, value)
    for name in (*spec.derived, "num_threads", "smem_bytes"):
        yield _member(name, getattr(spec, name))
    yield _member("params_bytes", spec.arguments.size)


def _member(name: str, value: StrEnum | int) -> str:
    if isinstance(value, StrEnum):
        kind = f"jitattn::{type(value).__name__}"
        return f"{kind} {camel(name)} = {kind}::{camel(value.value)};"
    return f"int {camel(name)} = {value};"
