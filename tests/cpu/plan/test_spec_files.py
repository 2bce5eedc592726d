"""Tests spec files: errors name file, entry and field, and affect that entry only."""

from __future__ import annotations

import importlib
import itertools
import json
import random
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import jitattn
from jitattn.errors import InvalidInputError
from jitattn.jit.codegen import render
from jitattn.jit.device import Device
from jitattn.kernels.matrix import SLOPES_AND_TABLE
from jitattn.kernels.problem_spec import ProblemSpec
from jitattn.plan import choices, spec_files
from jitattn.plan.choices import expand, specs_of
from jitattn.spec.kernel_spec import KernelSpec, families, spec_from_dict
from tests.cpu.commands import run
from tests.cpu.specs import combine_spec

GOOD = [json.dumps(combine_spec(head_dim_v=dim).to_choice()) for dim in (16, 32, 48)]
BAD_LINES = [
    "{broken", GOOD[0][:30], GOOD[0][:30] + GOOD[1], "7", "[]", "null", '"x"', "\udcff\udcfe",
    '{"a": "\udcff"}', "[" * 50_000, '{"head_dim": ' + "9" * 5000 + "}",
]  # fmt: skip


def write(path: Path, lines: list[str]) -> Path:
    path.write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return path


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: line[:16].encode("ascii", "replace"))
@pytest.mark.parametrize("at", [0, 1, 3])
def test_bad_line_costs_that_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, bad: str, at: int
) -> None:
    lines = [*GOOD[:at], bad, *GOOD[at:]]
    path = write(tmp_path / "used.jsonl", lines)
    found = spec_files.read(path)
    assert [json.dumps(choice) for _, choice in found.entries] == GOOD
    (fault,) = found.faults
    assert fault.startswith(f"spec file {path}, line {at + 1}: ")
    assert found.entries[-1][0] == f"spec file {path}, line {4 if at < 3 else 3}"
    assert len(choices.read_file(path)) == 3
    assert f"line {at + 1}: " in caplog.text


def test_prebuild_makes_the_rest_of_a_record(tmp_path: Path) -> None:
    path = write(
        tmp_path / "used.jsonl", [GOOD[0], "{broken", GOOD[1].replace("32", '"x"'), GOOD[2]]
    )
    done = run("prebuild", "--spec", str(path), "-j", "1", "--json")
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    assert (counts["compiled"], counts["failed"], counts["refused"]) == (2, 0, 2)
    first, second = (line for line in done.stderr.splitlines() if "refused" in line)
    assert f"spec file {path}, line 2: " in first
    assert f"spec file {path}, line 3: head_dim_v: head dim 'x'" in second
    assert "(2 more refused)" in run("prebuild", "--spec", str(path), "-j", "1").stdout
    planned = run("prebuild", "--spec", str(path), "--dry-run")
    assert planned.exit_code == 1
    assert "0 to make, 2 cached" in planned.stdout


def test_one_bad_spec_never_ends_a_prebuild(tmp_path: Path) -> None:
    path = tmp_path / "kernels.toml"
    path.write_text(
        '[[kernels]]\nhead_dim = "x"\narch = 80\n'
        '[[kernels]]\nfamily = "norm"\nhead_dim = 64\ngroups = 48\narch = 80\n'
        '[[kernels]]\nfamily = "combine"\nhead_dim = 16\ndtype = "bf16"\narch = [80, 199]\n'
    )
    done = run("prebuild", "--spec", str(path), "-j", "1", "--json")
    assert done.exit_code == 1
    counts = json.loads(done.stdout)
    assert (counts["compiled"], counts["failed"], counts["refused"]) == (1, 1, 2)
    assert "kernel 1: head_dim: head dim 'x'" in done.stderr
    assert "kernel 2: groups=48: it must divide head_dim=64" in done.stderr
    assert "sm_199 is not known" in done.stderr


@pytest.fixture
def warmed(monkeypatch: pytest.MonkeyPatch) -> list[KernelSpec]:
    """What `warmup` would load on an sm_80, which is not there."""
    module, found = importlib.import_module("jitattn.api.warmup"), []
    device = Device(index=0, name="", arch="sm_80", num_sms=1)
    monkeypatch.setattr(module, "_index", lambda _: 0)
    monkeypatch.setattr(module, "device_of", lambda _: device)
    monkeypatch.setattr(module, "_warm", lambda specs, *_: found.extend(specs))
    return found


def test_warmup_passes_over_a_bad_line(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, warmed: list[KernelSpec]
) -> None:
    path = write(tmp_path / "used.jsonl", [GOOD[0], "{broken", GOOD[1].replace("sm_80", "sm_90")])
    jitattn.warmup(spec_file=path)
    assert warmed == [combine_spec(head_dim_v=16), combine_spec(head_dim_v=32)]
    assert f"{path}, line 2: " in caplog.text


@pytest.mark.usefixtures("warmed")
def test_warmup_names_file_entry_and_field(tmp_path: Path) -> None:
    path = write(tmp_path / "used.jsonl", [GOOD[0], "{broken", GOOD[1].replace("combine", "purge")])
    with pytest.raises(InvalidInputError, match=rf"spec file {path}, line 3: family='purge'"):
        jitattn.warmup(spec_file=str(path))
    with pytest.raises(InvalidInputError, match=r"specs\[1\]: unknown field 'colour'"):
        jitattn.warmup(specs=[{"head_dim": 64}, {"colour": "red"}])
    with pytest.raises(InvalidInputError, match=r"specs\[0\] is a str: it must be a mapping"):
        jitattn.warmup(specs=["llama"])


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"kernels": [\n{"head_dim": 64},\n{"head_dim": 128}\n'),
        ("a.json", '[\n{"head_dim": 64},\n{"head_dim": 128},\n]'),
        ("a.json", '[{"head_dim": 64},\n{"head_dim": 128}'),
        ("a", '{"kernels": [\n{"head_dim": 64}\n}'),
        ("a.json", '{"a": 1}\n{broken'),
        ("a.jsonl", "{broken\n[]\n7"),
        ("a.jsonl", ""),
        ("a.toml", "\udcff"),
    ],
)
def test_broken_document_is_no_record(tmp_path: Path, name: str, text: str) -> None:
    path = write(tmp_path / name, [text])
    with pytest.raises(InvalidInputError, match="spec file"):
        spec_files.read(path)


def test_entry_that_is_no_table_costs_that_entry(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", [f'{{"kernels": [{GOOD[0]}, 7, {GOOD[1]}]}}'])
    found = spec_files.read(path)
    assert len(found.entries) == 2
    assert found.faults == [f"spec file {path}, kernel 2: it is no table of fields"]


def test_names_of_files_are_shown_on_one_line(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[31m.json"
    done = run("prebuild", "--spec", str(path), "--arch", "80")
    assert done.stderr.count("\n") == 1
    path.write_text('[{"colour": 1, "arch": 80}]')
    done = run("prebuild", "--spec", str(path))
    assert "kernel 1: unknown field 'colour'" in done.stderr
    assert "a\\n\\x1b[31m.json" in done.stderr
    assert "\x1b" not in done.stderr


FIELDS: dict[str, list[Any]] = {
    **{name: words or [16, 64, 128, 192, 256, 24, "192:128"]
       for name, words in choices.problem_fields().items()},
    "family": list(families()), "arch": [80, 86, "90", "sm_100", "120"], "gear": [0, 1, 2, 3, 4],
    "rows": ["rows16", "many"], "deterministic": ["on", "off"], "target": ["matrix", "row"],
    "groups": [1, 2, 48, 128, 200], "chunk_rows": [512, 64], "paged": ["on"], "values": ["off"],
    "num_parts": [1, 2], "gradients": ["on"], "block_q": [0, 64],
    "num_warps": [0, 4], "warps_dq": [0, 2], "table_dtype": ["fp32"], "rotary": ["none"],
}  # fmt: skip
STRANGE: list[Any] = [
    None, True, False, 0, -1, 257, 10**30, 1.5, float("nan"), float("inf"), "", [], {}, [[]], [{}],
    [[64]], "64:", ":64", "64:64:64", "٦٤", "²", "1_6", "9" * 5000, "\ud800", "\x1b", "a\nb",
    {"a": 1}, [None], "x", "f16x1", "int8", "tf32",
]  # fmt: skip


#: Fields that kernels of a family have and that nothing stands in for.
NEEDED = {
    "bwd_postprocess": {"block_q": 64, "num_warps": 4, "warps_dq": 2},
    "channel_stats": {"chunk_rows": 512},
    "split_fp32": {"num_parts": 2},
}


@pytest.mark.parametrize("field", FIELDS)
def test_strange_value_is_an_error_that_names_the_field(field: str) -> None:
    family = next(
        (
            name
            for name, kind in families().items()
            if not issubclass(kind, ProblemSpec) and field in {one.name for one in fields(kind)}
        ),
        "fwd",
    )
    base = {"family": family, "arch": 80, "head_dim": 64, "dtype": "fp16", **NEEDED.get(family, {})}
    for value in STRANGE:
        place = "spec file a, kernel 3"
        specs, errors = expand([(place, {**base, field: value})])
        assert len(specs) == 0 or len(errors) == 0
        assert all(render(spec) for spec in specs)
        for text in map(str, errors):
            assert text.startswith(f"{place}: ")
            assert field.removesuffix("_v") in text


def test_no_choice_raises_anything_else() -> None:
    """Choices at random, some values of them strange: kernels that render, or an error by name."""
    chance, made = random.Random(7), 0
    for _ in range(1500):
        choice: dict[str, Any] = {"arch": 80}
        for name in chance.sample(list(FIELDS), chance.randint(1, 6)):
            is_strange = chance.random() < 0.1
            choice[name] = chance.choice(STRANGE if is_strange else FIELDS[name])
            if chance.random() < 0.1:
                choice[name] = [choice[name], chance.choice(FIELDS[name])]
        specs, errors = expand([("here", choice)])
        assert bool(specs) != bool(errors)
        for spec in specs:
            assert "struct Spec" in render(spec)
            assert spec_from_dict(spec.to_dict()) == spec
        made += len(specs)
    assert made > 500


def test_too_many_combinations_are_refused() -> None:
    fields = dict(itertools.islice(choices.problem_fields().items(), 18))
    everything = {name: words or list(range(1, 257)) for name, words in fields.items()}
    with pytest.raises(InvalidInputError, match="combinations: at most 100000"):
        specs_of([{**everything, "arch": 80}])


def test_every_kernel_that_may_be_recorded_can_be_read_back() -> None:
    asked = [
        {"family": family, "dtype": dtype, "head_dim": [64, 24], "mask": mask, "gear": gear}
        | ({} if mask == "full" else {"q_layout": "ragged", "kv_layout": ["ragged", "paged"]})
        for family, dtype, mask, gear in itertools.product(
            (["fwd", "bwd", "bwd_scores"],), ("fp16", "fp32"), ("full", "causal"), (0, 4)
        )
    ]
    asked.append({"family": ["bwd_captured", "mask_lists"], "function": SLOPES_AND_TABLE})
    plain = ["norm", "norm_grad", "append", "combine", "combine_grad", "rotary"]
    asked.append({"family": plain})
    specs = specs_of(asked, ["86", "90"])
    assert {spec.family for spec in specs} == set(families())
    for spec in specs:
        assert spec in specs_of([spec.to_choice()])
