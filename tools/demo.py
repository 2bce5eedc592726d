"""Demonstrates jitattn: ``python -m jitattn.demo``, or ``python tools/demo.py`` in a checkout.

With a GPU: a chat-like call (8 query tokens on a 16k history) and a long prompt, checked against
the reference, with cold-compile, disk, launch and kernel times against torch's SDPA. Without one:
the same kernels compiled for sm_80, sm_86 and sm_90, a second process that compiles nothing, and
the CPU path against the reference. Uses a cache of its own and leaves nothing behind.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

_FOLDER: Final = Path(__file__).resolve().parent
#: The tools beside this file, and in a checkout the package beside them.
_PATHS: Final = [
    str(_FOLDER),
    *(str(one) for one in (_FOLDER.parent,) if (one / "jitattn" / "__init__.py").is_file()),
]
sys.path[:0] = _PATHS

import torch
from _table import print_table, say

import jitattn
from jitattn.jit.pool import build_all
from jitattn.plan.choices import specs_of

ARCHS: Final = ("sm_80", "sm_86", "sm_90")
CHOICE: Final = {"dtype": "bf16", "head_dim": 128, "mask": "causal"}


@dataclass(frozen=True)
class Scene:
    """Shape of a call."""

    name: str
    batch: int
    len_q: int
    len_kv: int
    heads_q: int
    heads_kv: int
    head_dim: int = 128

    def tensors(self, device: str, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        def draw(length: int, heads: int) -> torch.Tensor:
            shape = (self.batch, length, heads, self.head_dim)
            return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

        return (
            draw(self.len_q, self.heads_q),
            draw(self.len_kv, self.heads_kv),
            draw(self.len_kv, self.heads_kv),
        )


CHAT: Final = Scene("chat: 8 tokens on 16k", 8, 8, 16384, 32, 8)
PROMPT: Final = Scene("prompt: 8k tokens", 1, 8192, 8192, 16, 16)


def relative_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    return float((actual.double() - truth.double()).norm() / truth.double().norm())


def error_against_reference(scene: Scene, q: Any, k: Any, v: Any, out: Any) -> float:
    """Compare the last query rows of the first sequence and kv head with the reference."""
    rows, group = min(scene.len_q, 64), scene.heads_q // scene.heads_kv
    truth = jitattn.reference.reference(
        q[:1, -rows:, :group], k[:1, :, :1], v[:1, :, :1], mask=jitattn.Causal()
    )
    return relative_error(out[:1, -rows:, :group], truth)


def on_gpu() -> bool:
    """Run both scenes on the GPU; return whether the results are correct."""
    rows, right = [], True
    for scene in (CHAT, PROMPT):
        q, k, v = scene.tensors("cuda", torch.bfloat16)

        def call(q: Any = q, k: Any = k, v: Any = v) -> Any:
            return jitattn.attention(q, k, v, mask=jitattn.Causal())

        say(f"{scene.name}: compiling …")
        cold_ms = wall_ms(call)
        disk_ms = disk_warm_ms(call)
        out = call()
        error = error_against_reference(scene, q, k, v, out)
        right = right and error < 5e-3
        rows.append(
            (
                scene.name,
                f"{cold_ms:.0f} ms",
                f"{disk_ms:.2f} ms",
                f"{host_us(call):.1f} us",
                f"{kernel_us(call):.0f} us",
                f"{best_sdpa_us(scene, q, k, v):.0f} us",
                f"{error:.1e}",
            )
        )
        say(str(jitattn.explain(q, k, v, mask=jitattn.Causal())) + "\n")
    columns = ("call", "cold", "from disk", "host", "kernel", "best SDPA", "rel. error")
    print_table(f"{torch.cuda.get_device_name()}, bf16, D=128", columns, rows)
    return right


def disk_warm_ms(call: Any) -> float:
    """Time the first call after unloading all kernels: read, check, load, launch."""
    from jitattn.jit import build
    from jitattn.run import forward

    forward.forget_kernels()
    build.clear_memory()
    return wall_ms(call)


def wall_ms(call: Any) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3


def host_us(call: Any) -> float:
    """Time a warm call on the host, without the GPU's work."""
    times = []
    for _ in range(50):
        torch.cuda.synchronize()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[25] * 1e6


def kernel_us(call: Any) -> float:
    """Time a call on the GPU: a CUDA graph of ten calls, median of seven replays."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(10):
            call()
    times: list[float] = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 100)
    return sorted(times)[3]


def best_sdpa_us(scene: Scene, q: Any, k: Any, v: Any) -> float:
    """Time the faster of SDPA's flash and cuDNN backends; nan if neither supports the call.

    Their causal mask is aligned to the top left, so a short query is timed without a mask.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel

    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    best = float("nan")
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION):

        def call() -> Any:
            return torch.nn.functional.scaled_dot_product_attention(
                q,
                k,
                v,
                is_causal=scene.len_q == scene.len_kv,
                enable_gqa=scene.heads_q != scene.heads_kv,
            )

        try:
            with sdpa_kernel(backend):
                time_us = kernel_us(call)
        except RuntimeError:  # this backend does not support these inputs on this GPU
            continue
        best = time_us if best != best else min(best, time_us)
    return best


def without_gpu() -> bool:
    """Compile, show that nothing compiles twice, run the CPU path; return whether it worked."""
    say("No GPU here: compiling the same kernels for " + ", ".join(ARCHS))
    specs = specs_of([CHOICE], ARCHS)
    start = time.perf_counter()
    failed = 0
    for done, outcome in enumerate(build_all(specs), 1):
        failed += bool(outcome.error)
        name = f"{outcome.spec.family} for {outcome.spec.arch}"
        state = outcome.error or f"{outcome.origin} in {outcome.seconds:.2f} s"
        say(f"  [{done}/{len(specs)}] {name}: {state}")
    say(f"  {time.perf_counter() - start:.1f} s in all")
    show_cache()
    again = second_process()
    say(f"\nA second process: {again['compiled']} compiled, {again['disk_hits']} read from disk")
    return on_cpu() and not failed and again == {"compiled": 0, "disk_hits": len(specs)}


def show_cache() -> None:
    from jitattn.cache.disk import user_cache

    cache = user_cache()
    if cache is None:
        return
    rows = [
        (
            entry.arch,
            entry.spec["family"],
            f"{entry.spec['block_q']}x{entry.spec['block_kv']}" if "block_q" in entry.spec else "",
            entry.registers,
            entry.spill_bytes,
            entry.smem_bytes,
            entry.bytes,
            round(entry.compile_ms),
        )
        for entry in sorted(cache.entries(), key=lambda entry: (entry.arch, str(entry.spec)))
    ]
    columns = ("arch", "kernel", "tile", "registers", "spill B", "smem B", "cubin B", "compile ms")
    print_table("bf16, D=128, causal", columns, rows)


def second_process() -> dict[str, int]:
    """Build the same kernels in a new process, and return its counters."""
    code = (
        "import json, sys; sys.path[:0] = json.loads(sys.argv[1])\n"
        "import demo\n"
        "from jitattn.jit import build\n"
        "for spec in demo.specs_of([demo.CHOICE], demo.ARCHS): build.build(spec)\n"
        "stats = build.stats()\n"
        "print(json.dumps({'compiled': stats.compiled, 'disk_hits': stats.disk_hits}))"
    )
    command = [sys.executable, "-c", code, json.dumps(_PATHS)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    counters: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return counters


def on_cpu() -> bool:
    rows, right = [], True
    small = (
        Scene("chat: 8 tokens on 2k", 2, 8, 2048, 8, 2),
        Scene("prompt: 512 tokens", 1, 512, 512, 4, 4),
    )
    for scene in small:
        for dtype, bound in ((torch.bfloat16, 5e-3), (torch.float32, 2e-6)):
            q, k, v = scene.tensors("cpu", dtype)
            start = time.perf_counter()
            out = jitattn.attention(q, k, v, mask=jitattn.Causal())
            seconds = time.perf_counter() - start
            error = relative_error(out, jitattn.reference.reference(q, k, v, mask=jitattn.Causal()))
            right = right and error < bound
            name = str(dtype).removeprefix("torch.")
            rows.append(
                (scene.name, name, f"{seconds * 1e3:.0f} ms", f"{error:.1e}", f"{bound:.0e}")
            )
    columns = ("CPU path", "dtype", "time", "rel. error", "bound")
    print_table("the CPU path against the reference (fp64)", columns, rows)
    return right


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.parse_args(argv)  # --help, and an error for anything else
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="jitattn-demo-") as folder:
        os.environ["JITATTN_CACHE_DIR"] = folder
        with torch.no_grad():
            right = on_gpu() if torch.cuda.is_available() else without_gpu()
    say("\nAll checks passed." if right else "\nA CHECK FAILED: see above.")
    return 0 if right else 1


if __name__ == "__main__":
    raise SystemExit(main())
