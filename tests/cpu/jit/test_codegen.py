"""Tests the generated header against its C++ counterparts."""

from __future__ import annotations

from dataclasses import fields

import pytest

from jitattn.jit import codegen
from tests.cpu.specs import combine_spec, forward_spec


@pytest.mark.parametrize(
    ("name", "expected"),
    [("head_dim", "kHeadDim"), ("f32_acc", "kF32Acc"), ("tf32x3", "kTf32x3"), ("arch", "kArch")],
)
def test_camel(name: str, expected: str) -> None:
    assert codegen.camel(name) == expected


def test_every_field_of_a_forward_spec_is_rendered() -> None:
    one = forward_spec("sm_90", 40)
    text = codegen.render(one)
    for part in (one.problem, one.tile):
        for field in fields(part):
            name = "has_function" if field.name == "function" else field.name
            assert f" {codegen.camel(name)} = " in text
    assert "int kArch = 90;" in text
    assert "int kHeadDim = 40;" in text
    assert "jitattn::MaskKind kMask = jitattn::MaskKind::kFull;" in text
    assert f"int kSmemBytes = {one.smem_bytes};" in text


def test_merge_spec_is_rendered() -> None:
    text = codegen.render(combine_spec("sm_86", 72))
    assert "int kArch = 86;" in text
    assert "int kHeadDimV = 72;" in text
    assert "jitattn::Dtype kOutDtype = jitattn::Dtype::kBf16;" in text


def test_enums_of_the_fields_are_declared_in_the_order_of_python() -> None:
    text = codegen.render(combine_spec())
    assert "enum class Dtype { kFp16, kBf16, kFp32 };" in text
    assert text.count("enum class") == 1


def test_key_is_canonical_and_tells_specs_apart() -> None:
    one = forward_spec()
    assert one.to_key() == forward_spec().to_key()
    assert " " not in one.to_key()
    others = [forward_spec("sm_86"), forward_spec(head_dim=32), combine_spec()]
    assert len({one.to_key(), *(other.to_key() for other in others)}) == 4
