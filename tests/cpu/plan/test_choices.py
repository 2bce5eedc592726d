"""Tests choices: expansion, parsing, errors, and the round trip from specs."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from jitattn.errors import InvalidInputError
from jitattn.kernels.combine import CombineSpec
from jitattn.kernels.fwd import FwdSpec
from jitattn.kernels.fwd_sm90 import FwdSm90Spec
from jitattn.plan import choices
from jitattn.spec.enums import Access, Dtype, Numerics, RowClass
from jitattn.spec.kernel_spec import spec_from_dict
from tests.cpu.specs import combine_spec, forward_spec

FP32_OUT = forward_spec(out_dtype=Dtype.FP32)
ODD = forward_spec(head_dim=20, access=Access.ELEMENT)
UNALIGNED = forward_spec(access=Access.ELEMENT)
SPECS = [combine_spec(), forward_spec(), forward_spec("sm_90", 128), FP32_OUT, ODD, UNALIGNED]


def test_choice_stands_for_all_that_its_calls_can_need() -> None:
    specs = choices.specs_of(
        [{"dtype": ["fp16", "bf16"], "head_dim": [64, "192:128"], "mask": "causal"}],
        ["86", "sm_90"],
    )
    forward = [spec for spec in specs if isinstance(spec, FwdSpec)]
    assert len(forward) == 2 * 2 * 2 * len(RowClass)
    on_wgmma = [spec for spec in specs if isinstance(spec, FwdSm90Spec)]
    assert len(on_wgmma) == 2 * (2 + 1)  # two tiles at D=64
    assert len(specs) == len(forward) + len(on_wgmma)
    assert {spec.arch for spec in forward} == {"sm_86", "sm_90"}
    assert {spec.arch for spec in on_wgmma} == {"sm_90a"}
    dims = {(spec.problem.head_dim, spec.problem.head_dim_v) for spec in forward}
    assert dims == {(64, 64), (192, 128)}
    assert {spec.problem.mask.value for spec in forward} == {"causal"}


def test_repetition_is_built_once() -> None:
    choice = {"dtype": "bf16", "head_dim": 64, "mask": "full", "arch": 80}
    assert choices.specs_of([choice, dict(choice)]) == choices.specs_of([choice])


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.to_key())
def test_choice_of_one_kernel_and_back(spec: FwdSpec | CombineSpec) -> None:
    choice = json.loads(json.dumps(spec.to_choice()))
    assert choices.specs_of([choice]) == [spec]
    assert spec_from_dict(json.loads(json.dumps(spec.to_dict()))) == spec


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.to_key())
def test_command_makes_the_kernel(
    spec: FwdSpec | CombineSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    from click.testing import CliRunner

    from jitattn.cli import main

    words = shlex.split(spec.command())
    assert words[0] == "jitattn-cache"
    done = CliRunner().invoke(main, [*words[1:], "-j", "1", "--json"])
    assert done.exit_code == 0, done.output
    monkeypatch.setenv("JITATTN_NO_COMPILE", "1")
    from jitattn.jit import build

    build.clear_memory()
    assert build.build(spec).origin == "disk"


def test_toml_json_and_lines_say_the_same(tmp_path: Path) -> None:
    table = {"dtype": ["bf16"], "head_dim": [64, "192:128"], "mask": "full", "arch": ["sm_80"]}
    (tmp_path / "a.toml").write_text(
        '[[kernels]]\ndtype = ["bf16"]\nhead_dim = [64, "192:128"]\nmask = "full"\n'
        'arch = ["sm_80"]\n[[kernels]]\nhead_dim = 128\narch = 90\n'
    )
    second = {"head_dim": 128, "arch": 90}
    (tmp_path / "b.json").write_text(json.dumps({"kernels": [table, second]}))
    (tmp_path / "c.json").write_text(json.dumps([table, second]))
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(table)}\n\n{json.dumps(second)}\n")
    read = [choices.read_file(path) for path in sorted(tmp_path.iterdir())]
    assert read == [[table, second]] * 4


def test_record_of_one_line(tmp_path: Path) -> None:
    (tmp_path / "one").write_text(json.dumps(combine_spec().to_choice()) + "\n")
    assert choices.specs_of(choices.read_file(tmp_path / "one")) == [combine_spec()]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.toml", "kernels = 7"),
        ("a.toml", "= broken"),
        ("a.json", '{"kernels": [7]}'),
        ("a.json", "{broken"),
        ("a.json", '{"a": 1}\n{broken'),
        ("a.json", "7"),
        ("a.json", "[" * 100_000),
    ],
)
def test_other_files_are_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(InvalidInputError, match=r"spec file .*a"):
        choices.read_file(tmp_path / name)
    with pytest.raises(InvalidInputError, match="cannot be read"):
        choices.read_file(tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ({"dtype": "int8"}, "dtype='int8'.*fp16, bf16"),
        ({"head_dim": 257}, "head dim '257'.*1 to 256"),
        ({"head_dim": True}, "head dim"),
        ({"head_dim": "64:0"}, "head dim '0'"),
        ({"head_dim": "64:32", "head_dim_v": 32}, "give one"),
        ({"mask": "diagonal"}, "mask='diagonal'"),
        ({"mask": []}, "mask is missing"),
        ({"arch": "x"}, "arch 'x'"),
        ({"arch": 75}, "sm_75 is older"),
        ({"colour": "red"}, "unknown field 'colour'.*head_dim"),
        ({"rows": "few"}, "rows='few'"),
        ({"family": "backward"}, "family='backward'"),
        ({"family": ["fwd", "backward"]}, "family='backward'"),
        ({"gear": 9}, "gear=9"),
        ({"access": "fast"}, "access='fast'"),
    ],
)
def test_wrong_values_are_named(choice: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=f"here.*{text}"):
        choices.specs_of([{"arch": 80, "head_dim": 64, **choice}], where="here")


def test_an_architecture_must_be_named() -> None:
    with pytest.raises(InvalidInputError, match="no architecture is named"):
        choices.specs_of([{"head_dim": 64}])


def test_gears_stand_for_numerics() -> None:
    specs = choices.specs_of([{"head_dim": 64, "arch": 80, "dtype": "bf16", "gear": [0, 1, 2]}])
    found = {spec.problem.numerics for spec in specs if isinstance(spec, FwdSpec)}
    assert found == {Numerics.SPLIT_P, Numerics.F32_ACC}


def numerics_of(choice: dict[str, Any]) -> set[tuple[str, str]]:
    """(family, numerics) of every kernel of a choice."""
    specs = choices.specs_of([{"head_dim": 128, "dtype": "fp16", "mask": "full", **choice}])
    return {(spec.family, str(spec.to_dict().get("numerics", ""))) for spec in specs}


PLAIN = {("fwd", "f32_acc"), ("fwd_sm90", "f32_acc")}
HELPERS = {("channel_stats", ""), ("quantize", "")}
SPLIT_FP32 = {("fwd", "f16x3"), ("fwd_sm90", "f16x3"), ("split_fp32", "")}
ROUNDED = {("fwd", "f16x1"), ("fwd_sm90", "f16x1"), ("split_fp32", "")}


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ({"arch": 86, "gear": 2}, {("fwd", "f32_acc")}),
        ({"arch": 80, "gear": 3}, {("fwd", "f32_acc")}),
        ({"arch": 86, "gear": 3}, {("fwd", "f32_acc"), ("fwd", "f16_acc")}),
        ({"arch": 89, "gear": 3, "dtype": "bf16"}, {("fwd", "f32_acc")}),
        ({"arch": 90, "gear": 4}, PLAIN),
        ({"arch": 80, "gear": 4}, {("fwd", "f32_acc"), ("fwd", "int8_f16"), *HELPERS}),
        ({"arch": 90, "gear": 4, "head_dim": 32}, PLAIN),
        ({"arch": 90, "gear": 4, "rows": "rows16"}, {("fwd", "f32_acc")}),
        ({"arch": 90, "gear": 4, "dtype": "fp32"}, {("fwd", "tf32"), *ROUNDED}),
        ({"arch": 90, "dtype": "fp32"}, {("fwd", "tf32x3"), *SPLIT_FP32}),
        ({"arch": 90, "dtype": "fp32", "gear": 2}, {("fwd", "tf32x3"), *SPLIT_FP32}),
        ({"arch": 90, "dtype": "fp32", "head_dim": 256}, {("fwd", "tf32x3")}),
        ({"arch": 90, "dtype": "fp32", "rows": "rows16"}, {("fwd", "tf32x3")}),
        ({"arch": 90, "dtype": "fp32", "numerics": "tf32x3"}, {("fwd", "tf32x3")}),
        ({"arch": 90, "gear": 4, "numerics": "f32_acc"}, PLAIN),
        ({"arch": 90, "family": "fwd_sm90"}, {("fwd_sm90", "f32_acc")}),
        (
            {"arch": 89, "gear": 4},
            {("fwd", "f32_acc"), ("fwd", "f16_acc"), ("fwd", "int8_f16"), *HELPERS},
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_gear_stands_for_all_that_its_calls_can_need(
    choice: dict[str, Any], expected: set[tuple[str, str]]
) -> None:
    assert numerics_of(choice) == expected


def test_presets_stand_for_kernels() -> None:
    known = choices.presets()
    assert {"llama", "mistral", "gpt2", "sd"} <= known.keys()
    for name, (about, _) in known.items():
        assert about
        assert len(choices.specs_of(choices.preset([name]), ["80"])) >= len(RowClass)
    everything = {*choices.specs_of(choices.preset(["all"]), ["80"])}
    single = [choices.specs_of(choices.preset([name]), ["80"]) for name in known]
    assert {spec for specs in single for spec in specs} == everything
    with pytest.raises(InvalidInputError, match=r"preset 'lama'.*llama"):
        choices.preset(["lama"])


@pytest.mark.parametrize(
    "change",
    [
        {"family": "other"},
        {"arch": None},
        {"dtype": "int8"},
        {"head_dim": "16"},
        {"head_dim": True},
        {"more": 1},
        {"mask": None},
    ],
)
def test_spec_of_strange_values_is_refused(change: dict[str, object]) -> None:
    flat = {**forward_spec().to_dict(), **change}
    with pytest.raises(ValueError, match=r"spec|is not a valid"):
        spec_from_dict({name: value for name, value in flat.items() if value is not None})
