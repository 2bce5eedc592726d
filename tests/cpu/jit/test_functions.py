"""Tests kernels of traced functions as the compiler service and the cache have them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jitattn.jit import build, codegen, record
from jitattn.kernels.fwd import FwdSpec, fwd_spec
from jitattn.kernels.problem_spec import usual_problem
from jitattn.plan import choices
from jitattn.spec.enums import Dtype, MaskKind, RowClass
from jitattn.spec.kernel_spec import spec_from_dict
from tests.cpu.commands import run

TEXT = (
    "f32|f16:1|score.f32;head.i32;read.f16 0 1;cast.f32 2;number.f32 0;mul.f32 3 4;add.f32 0 5;"
    "row.i32;key.i32;ge.b1 7 8|6|9"
)


def spec(text: str = TEXT) -> FwdSpec:
    problem = usual_problem(Dtype.FP16, 16, 16, MaskKind.FULL, function=text)
    return fwd_spec(problem, "sm_80", RowClass.ROWS16)


def test_it_is_found_on_disk(cache_dir: Path) -> None:
    first = build.build(spec())
    assert first.origin == "compiled"
    build.clear_memory()
    again = build.build(spec())
    assert again.origin == "disk"
    assert again.cubin == first.cubin


def test_the_text_is_in_the_key_and_in_the_record(
    cache_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = spec()
    assert spec_from_dict(json.loads(own.to_key())) == own
    assert "function" not in spec("").to_dict()  # as in specs before there were any
    noted = tmp_path / "record.jsonl"
    monkeypatch.setenv("JITATTN_RECORD", str(noted))
    record.note(own)
    assert own in choices.specs_of(choices.read_file(noted))
    done = run("prebuild", "--spec", str(noted))
    assert done.exit_code == 0, done.output
    assert "function" in done.output
    build.clear_memory()
    assert build.build(own).origin == "disk"


def test_a_text_that_is_no_program_is_refused() -> None:
    flat = {**spec().to_dict(), "function": "||score.f32;evil 0|0|-"}
    with pytest.raises(ValueError, match="program"):
        spec_from_dict(flat)
    with pytest.raises(choices.InvalidInputError, match="function"):
        choices.specs_of([{**spec().to_choice(), "function": "||evil|0|-"}])


def test_a_function_that_nothing_is_done_with_compiles() -> None:
    """One without a slope, without numbers and tensors."""
    text = codegen.render(spec("||score.f32;head.i32;cast.f32 1|2|-"))
    assert "return 0.f;" in text
    assert "kHasMask = false" in text
