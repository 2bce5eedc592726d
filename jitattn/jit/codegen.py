"""`KernelSpec` → the text of jitattn_spec.h, which the templates are specialised by.

One line a field, named by one rule: snake_case becomes kCamelCase, an enum value likewise.
"""

from __future__ import annotations

import functools
from dataclasses import fields
from enum import StrEnum

from jitattn.spec.kernel_spec import KernelSpec, arch_number
from jitattn.spec.params import STRUCTS

#: Name under which the templates include the generated text.
HEADER_NAME = "jitattn_spec.h"


def render(spec: KernelSpec) -> str:
    """Return the generated header of `spec`."""
    lines = [
        f"// Generated: the {spec.family} kernel for {spec.arch}.",
        "#pragma once",
        "",
        '#include "jitattn/enums.cuh"',
        "",
        "struct Spec {",
        *(f"  static constexpr {line}" for line in _members(spec)),
        "};",
    ]
    return "\n".join(lines) + "\n"


@functools.cache
def camel(name: str) -> str:
    """'head_dim' → 'kHeadDim', 'f32_acc' → 'kF32Acc'."""
    return "k" + "".join(part[:1].upper() + part[1:] for part in name.split("_"))


def _members(spec: KernelSpec) -> list[str]:
    members = [
        _member(field.name, getattr(part, field.name))
        for part in spec.parts
        for field in fields(part)
        if field.name != "arch"
    ]
    return [
        _member("arch", arch_number(spec.arch)),
        *members,
        *(_member(name, getattr(spec, name)) for name in spec.derived),
        _member("num_threads", spec.num_threads),
        _member("smem_bytes", spec.smem_bytes),
        _member("params_bytes", STRUCTS[spec.params].size),
    ]


def _member(name: str, value: StrEnum | int) -> str:
    if isinstance(value, StrEnum):
        kind = f"jitattn::{type(value).__name__}"
        return f"{kind} {camel(name)} = {kind}::{camel(value.value)};"
    return f"int {camel(name)} = {value};"
