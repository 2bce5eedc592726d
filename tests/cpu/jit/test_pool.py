"""Tests parallel builds, recording of used kernels, and warm-up."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import jitattn
from jitattn.api.attention import bind
from jitattn.api.warmup import specs_of_call
from jitattn.errors import CacheMissError, InvalidInputError, UnsupportedError
from jitattn.jit import build, pool
from jitattn.plan import choices
from jitattn.spec.enums import RowClass
from tests.cpu.processes import FORK, together
from tests.cpu.specs import combine_spec, forward_spec

FOUR = [combine_spec(head_dim_v=dim) for dim in (16, 32, 48, 64)]


def test_workers_build_and_this_process_has_the_kernels(cache_dir: Path) -> None:
    outcomes = list(pool.build_all(FOUR, jobs=2))
    assert {outcome.spec for outcome in outcomes} == {*FOUR}
    assert {outcome.origin for outcome in outcomes} == {"compiled"}
    assert build.stats().compiled == 4
    for spec in FOUR:
        build.build(spec)
    assert build.stats() == build.Stats(compiled=4, disk_hits=0, memory_hits=4)
    assert len(list(cache_dir.glob("v1/*/*.cubin"))) == 4


def test_workers_need_no_directory(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> None:
    monkeypatch.setenv("JITATTN_CACHE", "off")
    assert all(outcome.built for outcome in pool.build_all(FOUR[:2], jobs=2))
    assert not cache_dir.exists()


def test_failure_of_one_is_its_outcome_alone() -> None:
    specs = [combine_spec("sm_199"), *FOUR[:2]]
    for jobs in (1, 3):
        build.clear_memory()
        outcomes = {outcome.spec: outcome for outcome in pool.build_all(specs, jobs)}
        assert [bool(outcomes[spec].error) for spec in specs] == [True, False, False]
        failed = outcomes[specs[0]]
        assert "sm_199 is not known" in failed.error
        assert type(failed.exception()) is UnsupportedError


def test_worker_that_dies_is_an_outcome(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the kernel's memory killer had come; the other kernels are built by a new worker."""
    real = pool._Worker._running
    killed = []

    def running(worker: pool._Worker) -> subprocess.Popen[str] | None:
        process = real(worker)
        if process is not None and not killed:
            killed.append(process.pid)
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        return process

    monkeypatch.setattr(pool._Worker, "_running", running)
    outcomes = list(pool.build_all(FOUR, jobs=2))
    failed = [outcome for outcome in outcomes if outcome.error]
    assert len(outcomes) == 4
    assert len(failed) == len(killed) == 1
    assert "a worker process died" in failed[0].error


def test_caller_that_stops_early_leaves_no_process_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    real, started = pool.subprocess.Popen, []

    def popen(*arguments: object, **options: object) -> object:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(pool.subprocess, "Popen", popen)
    outcomes = pool.build_all(FOUR, jobs=2)
    next(outcomes)
    assert started
    outcomes.close()
    assert all(process.returncode is not None for process in started)


def test_script_without_a_main_guard(tmp_path: Path) -> None:
    """Workers never run the caller's main module, so this does not start itself again."""
    script = tmp_path / "script.py"
    script.write_text(
        "print('started')\n"
        "from jitattn.jit import pool\nfrom jitattn.plan import choices\n"
        "choice = {'dtype': 'bf16', 'head_dim': 16, 'mask': 'full', 'arch': 80}\n"
        "print([o.origin for o in pool.build_all(choices.specs_of([choice]), 2)])\n"
    )
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "started"
    assert done.stdout.count("started") == 1
    assert done.stdout.count("compiled") == len(RowClass)


@FORK
@pytest.mark.filterwarnings("ignore:This process .*is multi-threaded:DeprecationWarning")
def test_record_of_several_processes_makes_exactly_those(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "used.jsonl"
    monkeypatch.setenv("JITATTN_RECORD", str(path))
    used = [*FOUR, forward_spec()]

    def use(number: int) -> None:
        for spec in used[number : number + 2] * 2:
            build.build(spec)

    together(use, 4)
    lines = path.read_text().splitlines()
    assert len(lines) == 8  # each process notes each kernel once
    assert all(isinstance(json.loads(line), dict) for line in lines)
    assert {*choices.specs_of(choices.read_file(path))} == {*used}


def test_record_that_cannot_be_written_is_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("JITATTN_RECORD", str(tmp_path / "missing" / "file"))
    for spec in FOUR[:2]:
        build.build(spec)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_warmup_of_a_call_needs_all_its_kernels() -> None:
    q = torch.randn(1, 4, 2, 64).bfloat16()
    specs = specs_of_call(q, q, q, bind(q, q, q, {})[1], "sm_80", has_wgmma=False, gradients=False)
    assert forward_spec("sm_80", 64) in specs
    choice = {"dtype": "bf16", "head_dim": 64, "mask": "full"}
    assert {*specs} == {*choices.specs_of([choice], ["80"])}


def test_warmup_on_the_cpu_has_nothing_to_do() -> None:
    q = torch.randn(1, 4, 2, 16)
    assert jitattn.warmup(q, q, q, mask=jitattn.Causal()).kernels == 0
    assert build.stats().compiled == 0
    with pytest.raises(InvalidInputError, match="gear=7"):
        jitattn.warmup(q, q, q, gear=7)
    with pytest.raises(TypeError, match="colour"):
        jitattn.warmup(q, q, q, colour="red")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "got nothing"),
        ({"preset": "llama", "specs": []}, "got preset, specs"),
        ({"preset": "llama", "mask": jitattn.Full()}, "takes no mask"),
    ],
)
def test_warmup_wants_one_way(arguments: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        jitattn.warmup(**arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_warmup_of_a_preset_without_a_gpu() -> None:
    with pytest.raises(UnsupportedError, match="jitattn-cache prebuild"):
        jitattn.warmup(preset="llama")


def test_forbidden_compile_in_a_worker_keeps_its_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JITATTN_NO_COMPILE", "1")
    outcomes = list(pool.build_all(FOUR[:2], jobs=2))
    assert [type(outcome.exception()) for outcome in outcomes] == [CacheMissError] * 2


def test_memo_saves_reading_the_templates(monkeypatch: pytest.MonkeyPatch) -> None:
    from jitattn.cache import memo
    from jitattn.jit import sources

    sources.digest.cache_clear()
    first = sources.digest("combine")
    memo._loaded.clear()
    sources.digest.cache_clear()
    monkeypatch.setattr(sources, "_read", lambda *_: pytest.fail("a template was read"))
    start = time.perf_counter()
    assert sources.digest("combine") == first
    assert time.perf_counter() - start < 5
