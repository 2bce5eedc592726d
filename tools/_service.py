"""Benchmarks of compiling and caching: NVRTC, disk hits, cold processes, first calls."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from _table import print_table
from _timing import Spread, spread

if TYPE_CHECKING:
    from collections.abc import Sequence

_REPOSITORY: Final = Path(__file__).resolve().parents[1]
_OURS: Final = "jitattn"
_COLD_PROCESSES: Final = 64

_SPEC: Final = """
import json, sys, time
from jitattn.jit import build, compilers, nvrtc, sources
from jitattn.plan import choices
def specs(arch):
    return choices.specs_of([{"dtype": "bf16", "head_dim": 128, "mask": "causal"}], [arch])
"""

_COMPILE: Final = """
spec = max(specs(sys.argv[1])[:-1], key=lambda one: one.tile.block_q)
compiled = nvrtc.compile_spec(spec, sources.closure(spec.family))
print(json.dumps({"ms": compiled.compile_ms, "nvrtc": str(compilers.chosen())}))
"""

_DISK: Final = """
from jitattn.cache.disk import user_cache
from jitattn.cache.entry import Entry
from tests.cpu.specs import fake_entry
kernels = specs("sm_90")
for spec in kernels:
    build.build(spec)
hits, reads, cache = [], [], user_cache()
entry = fake_entry(1, 65536)
cache.write(entry)
for _ in range(50):
    for spec in kernels:
        build.clear_memory()
        start = time.perf_counter()
        built = build.build(spec)
        hits.append((time.perf_counter() - start) * 1e6)
        assert built.origin == "disk"
    start = time.perf_counter()
    found = cache.read(entry.metadata.key, "sm_80")
    reads.append((time.perf_counter() - start) * 1e6)
    assert found == entry
print(json.dumps([hits[len(kernels):], reads[1:]]))
"""

_COLD: Final = """
spec = specs("sm_80")[0]
sys.stdin.readline()
start = time.perf_counter()
built = build.build(spec)
print(json.dumps([built.origin, time.perf_counter() - start]))
"""

_FIRST_CALL: Final = """
import glob, json, sys, time
import torch, cupy, cupy.cuda.function
import jitattn
attention, mask = jitattn.attention, jitattn.Causal()
q, k, v = (torch.randn(1, 256, 8, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
torch.cuda.synchronize()
start = time.perf_counter()
if sys.argv[1] == "bare":
    cubins = [open(path, "rb").read() for path in glob.glob(sys.argv[2] + "/v1/*/*.cubin")]
    start = time.perf_counter()
    modules = [cupy.cuda.function.Module() for _ in cubins]
    for module, cubin in zip(modules, cubins):
        module.load(cubin)
        name = "jitattn_fwd" if b"jitattn_fwd" in cubin else "jitattn_combine"
        module.get_function(name)
else:
    with torch.no_grad():
        attention(q, k, v, mask=mask)
seconds = time.perf_counter() - start
from jitattn.jit import build
print(json.dumps([seconds * 1e6, build.stats().compiled]))
"""


class Report(Protocol):
    """Destination of figures."""

    def add(
        self, section: str, shape: str, provider: str, metric: str, figures: Spread
    ) -> None: ...


def bench_compile(report: Report) -> None:
    """Time NVRTC on the D=128 bf16 causal forward kernel, in five new processes each."""
    from jitattn.jit import compilers

    table = []
    for major in compilers.installed():
        for arch in ("sm_80", "sm_90"):
            runs = [_fresh(_SPEC + _COMPILE, arch, JITATTN_NVRTC=str(major)) for _ in range(5)]
            figures = spread([run["ms"] for run in runs])
            name = f"bf16 D128 causal {arch}"
            report.add("compile", name, runs[0]["nvrtc"], "compile_ms", figures)
            table.append((name, runs[0]["nvrtc"], f"{figures.p50:.0f} ms"))
    print_table("compile", ("what", "by", "median"), table)


def bench_service(report: Report) -> None:
    """Time cache hits, many cold processes and the first call of a process."""
    table = []

    def add(name: str, metric: str, samples: Sequence[float], unit: str) -> None:
        figures = spread(samples)
        report.add("service", name, _OURS, metric, figures)
        table.append((name, f"{figures.p50:.3g} {unit}", f"{figures.p20:.3g}..{figures.p80:.3g}"))

    with tempfile.TemporaryDirectory() as folder:
        hits, reads = _fresh(_SPEC + _DISK, JITATTN_CACHE_DIR=folder)
    add("disk hit with key and lookup, 16 to 72 KB", "disk_hit_us", hits, "us")
    add("read and check of an entry of 64 KB", "disk_read_us", reads, "us")

    alone = [_cold(1)[0] for _ in range(3)]
    add("one process, cold, its compile", "cold_s", alone, "s")
    last = [_cold(_COLD_PROCESSES)[0] for _ in range(3)]
    add(f"{_COLD_PROCESSES} cold processes, the last of them", "cold_s", last, "s")

    if torch.cuda.is_available():
        with tempfile.TemporaryDirectory() as folder:
            _fresh(_FIRST_CALL, "call", folder, JITATTN_CACHE_DIR=folder)
            runs: dict[str, list[float]] = {"bare": [], "call": []}
            for _ in range(7):
                for how, samples in runs.items():
                    microseconds, compiled = _fresh(
                        _FIRST_CALL, how, folder, JITATTN_CACHE_DIR=folder
                    )
                    if compiled:
                        raise RuntimeError("the kernel was not on disk")
                    samples.append(microseconds)
        add("bare load of the two modules, new process", "bare_load_us", runs["bare"], "us")
        add("first call, kernels on disk, new process", "first_call_us", runs["call"], "us")
    print_table("kernel service", ("what", "median", "p20..p80"), table)


def _cold(count: int) -> tuple[float, int]:
    """Start processes on one kernel together; return seconds of the slowest, number of compiles."""
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            subprocess.Popen(
                [sys.executable, "-c", _SPEC + _COLD],
                env=_environment(JITATTN_CACHE_DIR=folder),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            for _ in range(count)
        ]
        time.sleep(0.2 + 0.15 * count)  # until all have imported and wait for the start
        for process in processes:
            print(file=process.stdin, flush=True)
        answers = [json.loads(process.communicate()[0]) for process in processes]
    compiled = [origin for origin, _ in answers].count("compiled")
    if compiled != 1:
        raise RuntimeError(f"{count} cold processes compiled {compiled} times")
    return max(seconds for _, seconds in answers), compiled


def _environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, (str(_REPOSITORY), os.environ.get("PYTHONPATH"))))
    return {**os.environ, "PYTHONPATH": path, **more}


def _fresh(code: str, *arguments: str, **environment: str) -> Any:
    """Run Python code in a new process, and return the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=_environment(**environment),
    )
    return json.loads(done.stdout.splitlines()[-1])
