"""Tests NVRTC: loading, options, and error messages."""

from __future__ import annotations

import ctypes.util
import os
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from jitattn.cache.entry import is_cubin_for
from jitattn.cache.files import HAS_OWNERS
from jitattn.errors import CompileError, UnsupportedError
from jitattn.jit import build, compilers, nvrtc
from jitattn.jit.sources import closure
from tests.cpu.specs import combine_spec, forward_spec


@pytest.mark.parametrize("major", [12, 13])
@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"])
def test_both_compilers_compile_for_every_architecture(major: int, arch: str) -> None:
    found = compilers.installed()
    if major not in found:
        pytest.skip(f"needs NVRTC {major}")
    if arch in ("sm_100", "sm_120") and found[major].version < (12, 8):
        pytest.skip(f"{arch} needs NVRTC 12.8 or newer")
    compiled = nvrtc.compile_spec(combine_spec(arch), closure("combine"), found[major])
    assert is_cubin_for(compiled.cubin, arch)
    assert 16 <= compiled.registers <= 64
    assert compiled.spill_bytes == 0


def test_options_are_these(monkeypatch: pytest.MonkeyPatch) -> None:
    base = nvrtc.options(combine_spec("sm_86"))
    assert "--gpu-architecture=sm_86" in base
    assert "--no-source-include" in base
    monkeypatch.setenv("JITATTN_LINEINFO", "1")
    monkeypatch.setenv("JITATTN_DEBUG_ASSERT", "1")
    switched = nvrtc.options(combine_spec("sm_86"))
    names = "-DJITATTN_SOURCE_ROOT=/cuda_src"
    assert set(switched) == {*base, "-lineinfo", names, "-DJITATTN_DEBUG_ASSERT"}


@pytest.mark.parametrize("major", [12, 13])
def test_line_numbers_name_no_directory_of_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, major: int
) -> None:
    if major not in compilers.installed():
        pytest.skip(f"needs NVRTC {major}")
    monkeypatch.setenv("JITATTN_LINEINFO", "1")
    monkeypatch.setenv("JITATTN_NVRTC", str(major))
    builds = []
    for name in ("one", "another-directory"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        monkeypatch.setenv("JITATTN_CACHE_DIR", str(tmp_path / name / "cache"))
        build.clear_memory()
        builds.append(build.build(combine_spec()))
    for built in builds:
        assert built.origin == "compiled"
        assert b"/cuda_src/jitattn" in built.cubin
        assert b"combine.cuh" in built.cubin
        assert str(tmp_path).encode() not in built.cubin
        assert str(tmp_path) not in built.metadata.log
    assert builds[0].key == builds[1].key
    assert builds[0].cubin == builds[1].cubin
    monkeypatch.delenv("JITATTN_LINEINFO")
    assert build.key_of(combine_spec()) != builds[0].key


def test_line_numbers_are_those_of_the_files(monkeypatch: pytest.MonkeyPatch) -> None:
    good = closure("combine")
    bad = replace(good, headers={**good.headers})
    own = "jitattn/combine/combine.cuh"
    bad.headers[own] += "\nthis is no C++;\n"
    number = bad.headers[own].count("\n")
    for value, name in (
        ("0", "jitattn/combine/combine.cuh"),
        ("1", "/cuda_src/jitattn/combine/combine.cuh"),
    ):
        monkeypatch.setenv("JITATTN_LINEINFO", value)
        with pytest.raises(CompileError) as caught:
            nvrtc.compile_spec(combine_spec(), bad)
        assert re.search(rf"(^|\n){re.escape(name)}\({number}\): error", caught.value.log)


@pytest.mark.parametrize(("version", "has"), [((12, 6, 85), False), ((12, 9, 86), True)])
def test_driver_cache_is_kept_out_where_there_is_one(version: tuple[int, ...], has: bool) -> None:
    compiler = compilers.Toolchain(version=version, library=Path("x"), builtins=())
    assert ("--no-cache" in nvrtc._other_options(compiler)) is has


def test_unknown_architecture_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError, match=r"sm_199 is not known to nvrtc 1[23]\."):
        nvrtc.compile_spec(combine_spec("sm_199"), closure("combine"))


def test_compile_error_says_all_that_is_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JITATTN_KEEP_SOURCE", str(tmp_path))
    spec = combine_spec("sm_86")
    good = closure("combine")
    bad = replace(good, entry=good.entry.replace("jitattn::combine", "jitattn::nothing"))
    with pytest.raises(CompileError) as caught:
        nvrtc.compile_spec(spec, bad)
    error, text = caught.value, str(caught.value)
    assert "nothing" in text.splitlines()[0]
    assert "error" in text.splitlines()[0]
    assert spec.to_key() in text
    assert error.spec == spec
    assert error.source_dir is not None
    assert error.source_dir.parent == tmp_path
    assert f"nvcc -cubin -arch=sm_86 -std=c++17 -ftz=true -I {error.source_dir}" in text
    assert (error.source_dir / "entry" / "combine.cu").read_text() == bad.entry
    assert (error.source_dir / "jitattn_spec.h").is_file()
    for name, header in good.headers.items():
        assert (error.source_dir / name).read_text() == header


@pytest.mark.parametrize("field", ["smem", "params"])
def test_host_and_device_must_agree(monkeypatch: pytest.MonkeyPatch, field: str) -> None:
    honest = nvrtc.render

    def lying(spec: object) -> str:
        return re.sub(rf"(k{field.capitalize()}Bytes = )\d+", r"\g<1>8", honest(spec))

    monkeypatch.setattr(nvrtc, "render", lying)
    with pytest.raises(CompileError, match="host and device disagree"):
        nvrtc.compile_spec(forward_spec(), closure("fwd"))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_fork_waits_for_a_running_compile() -> None:
    started = threading.Event()

    def work() -> None:
        started.set()
        nvrtc.compile_spec(forward_spec("sm_90"), closure("fwd"))

    thread = threading.Thread(target=work)
    thread.start()
    started.wait()
    time.sleep(0.05)  # now NVRTC is at work
    child = os.fork()
    if child == 0:
        signal.alarm(15)  # a hang ends the child with a signal
        try:
            nvrtc.compile_spec(combine_spec("sm_90"), closure("combine"))
        except BaseException:  # noqa: BLE001 - whatever it is, the parent must hear of it
            os._exit(1)
        os._exit(0)
    thread.join()
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


#: A handler that runs while this thread compiles is called on the way out of NVRTC.
FORKING_HANDLER = """
import os, signal
from jitattn.jit import nvrtc
from jitattn.jit.sources import closure
from tests.cpu.specs import forward_spec, combine_spec

def fork(*_):
    child = os.fork()
    if child == 0:
        signal.alarm(15)
        nvrtc.compile_spec(combine_spec(), closure("combine"))
        second = os.fork()
        if second == 0:
            os._exit(0)
        os._exit(os.waitstatus_to_exitcode(os.waitpid(second, 0)[1]))
    print("child", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

signal.signal(signal.SIGALRM, fork)
nvrtc.compile_spec(combine_spec(), closure("combine"))
signal.setitimer(signal.ITIMER_REAL, 0.05)
nvrtc.compile_spec(forward_spec("sm_90", 128), closure("fwd"))
print("compiled")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_signal_handler_may_fork_during_a_compile() -> None:
    done = subprocess.run(
        [sys.executable, "-c", FORKING_HANDLER],
        cwd=Path(__file__).parents[3],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.stdout.splitlines() == ["child 0", "compiled"], done.stderr


def test_every_kept_source_has_a_private_directory_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keep = tmp_path / "made" / "kept"
    monkeypatch.setenv("JITATTN_KEEP_SOURCE", str(keep))
    for dim in (16, 32):
        build.build(combine_spec(head_dim_v=dim))
    kept = sorted(keep.iterdir())
    assert len(kept) == 2
    assert len({(folder / "jitattn_spec.h").read_text() for folder in kept}) == 2
    if HAS_OWNERS:
        assert {stat.S_IMODE(folder.stat().st_mode) for folder in kept} == {0o700}


def test_source_that_cannot_be_kept_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("JITATTN_KEEP_SOURCE", str(tmp_path / "file" / "kept"))
    assert build.build(combine_spec()).origin == "compiled"
    assert "could not be kept" in caplog.text


def test_options_of_the_key_are_those_of_the_compile() -> None:
    asked = (*nvrtc.options(combine_spec()), "-lineinfo")
    assert nvrtc.compile_spec(combine_spec(), closure("combine"), None, asked).options == asked


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "directory", "other library"])
def test_library_that_cannot_be_used_is_a_compile_error(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "libnvrtc.so"
    if kind == "directory":
        path.mkdir()
    elif kind == "other library":
        path = Path(ctypes.util.find_library("m") or "libm.so.6")
    elif kind != "missing":
        path.write_text("" if kind == "empty" else "no library")
    compiler = compilers.Toolchain(version=(13, 0, 88), library=path, builtins=())
    with pytest.raises(
        CompileError, match=r"nvrtc 13\.0\.88 could not be opened from .*install it"
    ):
        nvrtc.compile_spec(combine_spec(), closure("combine"), compiler)
    compiler = replace(compiler, builtins=(path,))
    if kind != "other library":
        with pytest.raises(CompileError, match="could not be opened"):
            nvrtc.supported_archs(compiler)
