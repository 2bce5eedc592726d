"""Tests the tools without a GPU."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
        cwd=ROOT,
    )


@pytest.mark.slow
def test_demo_without_a_gpu() -> None:
    done = run("tools/demo.py", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[10/10]" in done.stdout
    assert "A second process: 0 compiled, 10 read from disk" in done.stdout
    assert "All checks passed." in done.stdout
    for arch in ("sm_80", "sm_86", "sm_90"):
        assert len(re.findall(rf"{arch} +fwd ", done.stdout)) == 3
    assert len(re.findall(r"sm_90a +fwd_sm90 ", done.stdout)) == 1


def test_help_of_the_demo_runs_no_demo() -> None:
    for command in (["tools/demo.py"], ["-m", "jitattn.demo"]):
        done = run(*command, "--help", CUDA_VISIBLE_DEVICES="")
        assert done.returncode == 0, done.stderr
        assert done.stdout.startswith("usage: demo.py")
        assert "compiling" not in done.stdout.partition("Without one")[0]
        assert "[1/" not in done.stdout
        assert run(*command, "--quick", CUDA_VISIBLE_DEVICES="").returncode == 2


def test_a_section_that_needs_a_gpu_is_refused_without_one() -> None:
    done = run("tools/bench.py", "--section", "forward,compile", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith(
        "--section: forward needs a GPU, and torch sees none; here: compile,service,doors"
    )
    assert done.stdout == ""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A small tree with what the GPU record covers."""
    for folder in ("jitattn", "tests/gpu", "tests/support", "cuda_src/notes", "tests/data"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "jitattn" / "a.py").write_text("a = 1\n")
    (tmp_path / "cuda_src" / "k.cuh").write_text("// kernel\n")
    return tmp_path


def record_now(checkout: Path) -> None:
    code = (
        "import sys, json, pathlib; sys.path.insert(0, 'tools'); import gpu_check as g\n"
        "root = pathlib.Path(sys.argv[1]); hashes = g.file_hashes(root)\n"
        "(root / g.RECORD).write_text(json.dumps("
        "{'sha256': g.digest(hashes), 'files': hashes, 'gpu': 'X', 'date': 'D'}))"
    )
    assert run("-c", code, checkout).returncode == 0


def test_status_of_the_gpu_record(checkout: Path) -> None:
    missing = run("tools/gpu_check.py", "--status", "--root", checkout)
    assert missing.returncode == 1
    record_now(checkout)
    assert run("tools/gpu_check.py", "--status", "--root", checkout).returncode == 0
    (checkout / "cuda_src" / "notes" / "n.md").write_text("notes do not count\n")
    (checkout / "jitattn" / "__pycache__").mkdir()
    (checkout / "jitattn" / "__pycache__" / "a.pyc").write_text("nor do these")
    assert run("tools/gpu_check.py", "--status", "--root", checkout).returncode == 0
    (checkout / "jitattn" / "a.py").write_text("a = 2\n")
    (checkout / "tests" / "gpu" / "new.py").write_text("")
    stale = run("tools/gpu_check.py", "--status", "--root", checkout)
    assert stale.returncode == 1
    assert "changed  jitattn/a.py" in stale.stdout
    assert "added    tests/gpu/new.py" in stale.stdout


def test_report_fails_over_budget(tmp_path: Path) -> None:
    spec = {
        "family": "combine", "arch": "sm_80", "out_dtype": "bf16", "head_dim_v": 16,
    }  # fmt: skip
    figures = tmp_path / "figures.json"
    budget = tmp_path / "budget.json"
    figures.write_text(json.dumps([{"spec": spec, "registers": 255, "spill_bytes": 12}]))

    def check(allowed: int) -> int:
        entry = {"match": {"family": "combine"}, "spill_bytes": allowed, "reason": "a test"}
        budget.write_text(json.dumps({"spills": [entry]}))
        arguments = ("--check", "--from", figures, "--budget", budget)
        return run("tools/resource_report.py", *arguments).returncode

    assert check(12) == 0
    assert check(11) == 1


def test_memcheck_counts_pytest_and_not_its_own_summary() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_check as g\n"
        "memcheck = '========= ERROR SUMMARY: 0 errors\\n'\n"
        "print(g.pytest_summary('3 passed, 1 skipped in 1.20s\\n' + memcheck))\n"
        "print(g.pytest_summary('==== 2 failed in 61.00s (0:01:01) ====\\n' + memcheck))\n"
        "print(g.pytest_summary(memcheck))"
    )
    lines = run("-c", code).stdout.splitlines()
    assert lines == ["3 passed, 1 skipped in 1.20s", "2 failed in 61.00s (0:01:01)", "none ran"]


def test_errors_of_both_sanitizers_are_counted() -> None:
    code = (
        "import sys; sys.path.insert(0, 'tools'); import gpu_check as g\n"
        "race = '========= RACECHECK SUMMARY: 2 hazards displayed (1 errors, 1 warnings)\\n'\n"
        "print(g.error_count('========= ERROR SUMMARY: 3 errors\\n'), g.error_count(race))\n"
        "print(g.error_count('it was killed'))"
    )
    assert run("-c", code).stdout.splitlines() == ["3 1", "None"]


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_ci_finds_the_test_command_of_the_readme() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    commands = [line for line in lines if '".[cu13,test]"' in line]
    assert commands == ['pip install -e ".[cu13,test]" -c tools/constraints.txt && pytest']


def test_the_guide_says_what_goes_with_what() -> None:
    done = run("tools/combinations.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(" yes |") > 150
    page = ROOT / "tools" / "guide" / "masks.md"
    assert done.stdout.strip() in page.read_text(encoding="utf-8")
