"""Runs benchmarks: ``python tools/bench.py [--section forward,decode,host,…] [--quick]``.

forward   long prompts against SDPA's flash (FlashAttention-2) and cuDNN backends, in one run
decode    short queries on a long history against the same, and a plain read of as many bytes
host      host time of a warm eager call against SDPA
doors     host time of the compatibility functions against the core calls that they make
sequences padded, paged and ragged sequences against dense calls of equal work
scores    windows, patterns, masks and biases against our dense kernels
density   random patterns from dense to sparse
flex      windows and patterns against FlexAttention
functions score and mask functions against FlexAttention under torch.compile
warp_attention, dkernel, cosine
          the benchmarks of these three systems
sageattention, xformers
          their functions against SDPA, and gear 2
backward  gradients against SDPA's flash backend, of patterns, and of cosine attention
parallel  what a rank of a context-parallel call computes, without its transfers (with them, and
          more GPUs: tools/bench_parallel.py)
models    a language model of transformers, in tokens per second, beside sdpa and eager
compile   NVRTC (needs no GPU)
service   a disk hit, one and 64 cold processes, the first call of a process (the last on a GPU)

Four separate kinds of numbers: compile (ms), disk load (us), host call (us), kernel (us).
TFLOP/s count attended pairs only: 4 * D per pair and head. Ratios are peer time over ours.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from _backward import bench_backward
from _doors import bench_doors
from _functions import bench_functions
from _host import bench_host
from _models import bench_models
from _parallel_compute import bench_parallel
from _published import bench_sageattention, bench_xformers
from _scores import bench_density, bench_flex, bench_scores, plot_density
from _seeds import bench_cosine, bench_dkernel, bench_warp_attention
from _sequences import bench_sequences
from _service import bench_compile, bench_service
from _table import print_table, say
from _timing import Spread, kernel_times

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

COLUMNS: Final = (
    "date", "commit", "section", "shape", "provider", "metric", "p20", "p50", "p80",
    "gpu", "clocks", "driver", "nvrtc",
)  # fmt: skip
#: All input sets together are larger than this, so that none stays in L2 (60 MB on an H200).
_COLD_BYTES: Final = 200e6
_OURS: Final = "jitattn"
#: Sections that need no GPU, in the order in which they run.
_WITHOUT_GPU: Final = dict.fromkeys(("compile", "service", "doors"))


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a call."""

    batch: int
    len_q: int
    len_kv: int
    heads_q: int
    heads_kv: int
    head_dim: int
    causal: bool = False
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        """Return a short name."""
        return (
            f"B{self.batch} q{self.len_q} kv{self.len_kv} H{self.heads_q}/{self.heads_kv} "
            f"D{self.head_dim} {'causal' if self.causal else 'full'} "
            f"{str(self.dtype).removeprefix('torch.')}"
        )

    @property
    def pairs(self) -> int:
        """Count attended (query, key) pairs of a head; causal is bottom-right aligned."""
        if not self.causal:
            return self.len_q * self.len_kv
        first = self.len_kv - self.len_q + 1
        return sum(max(0, first + row) for row in range(self.len_q))

    @property
    def flops(self) -> int:
        return 4 * self.batch * self.heads_q * self.pairs * self.head_dim

    @property
    def kv_bytes(self) -> int:
        return 2 * self.batch * self.len_kv * self.heads_kv * self.head_dim * self.dtype.itemsize

    def inputs(self) -> list[tuple[torch.Tensor, ...]]:
        """Make random input sets, enough to exceed L2."""
        count = max(1, min(8, round(_COLD_BYTES / max(1, self.kv_bytes))))
        sizes = ((self.len_q, self.heads_q), (self.len_kv, self.heads_kv))

        def draw(size: tuple[int, int]) -> torch.Tensor:
            shape = (self.batch, *size, self.head_dim)
            return torch.randn(shape, device="cuda", dtype=self.dtype)

        return [(draw(sizes[0]), draw(sizes[1]), draw(sizes[1])) for _ in range(count)]


@dataclass(slots=True)
class Report:
    """Collects rows for the table and the CSV."""

    common: dict[str, str]
    rows: list[dict[str, str]] = field(default_factory=list)

    def add(self, section: str, shape: str, provider: str, metric: str, figures: Spread) -> None:
        self.rows.append(
            {
                **self.common,
                "section": section,
                "shape": shape,
                "provider": provider,
                "metric": metric,
                **{name: f"{getattr(figures, name):.4g}" for name in ("p20", "p50", "p80")},
            }
        )


def providers(shape: Shape, sets: list[tuple[torch.Tensor, ...]]) -> dict[str, Any]:
    """Return the calls that compute `shape`, ours first; omit peers that do not support it."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    mask = jitattn.Causal() if shape.causal else jitattn.Full()
    transposed = [tuple(x.transpose(1, 2) for x in one) for one in sets]
    # SDPA aligns to the top left: with Lq < Lkv its causal flag selects other pairs.
    is_causal = shape.causal and shape.len_q == shape.len_kv
    calls: dict[str, Callable[[int], Any]] = {
        _OURS: lambda index: jitattn.attention(*sets[index], mask=mask)
    }
    peers = {
        "sdpa flash": SDPBackend.FLASH_ATTENTION,
        "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in peers.items():

        def call(index: int, backend: SDPBackend = backend) -> Any:
            with sdpa_kernel(backend):
                q, k, v = transposed[index]
                return torch.nn.functional.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    is_causal=is_causal,
                    enable_gqa=shape.heads_q != shape.heads_kv,
                )

        try:
            call(0)
        except RuntimeError as error:
            say(f"  {name} takes no {shape}: {str(error).splitlines()[0]}")
        else:
            calls[name] = call
    return calls


def bench_kernels(section: str, shapes: Sequence[Shape], report: Report, rounds: int) -> None:
    """Time shapes against peers."""
    table = []
    for shape in shapes:
        sets = shape.inputs()
        times = kernel_times(providers(shape, sets), sets=len(sets), rounds=rounds)
        ours = times[_OURS].p50
        for name, figures in times.items():
            report.add(section, str(shape), name, "kernel_us", figures)
            table.append(
                (
                    str(shape),
                    name,
                    f"{figures.p50:.1f}",
                    f"{figures.p20:.1f}..{figures.p80:.1f}",
                    f"{shape.flops / figures.p50 / 1e6:.0f}",
                    f"{shape.kv_bytes / figures.p50 / 1e3:.0f}",
                    f"{figures.p50 / ours:.2f}x",
                )
            )
    columns = ("shape", "provider", "us", "p20..p80", "TFLOP/s", "kv GB/s", "time / ours")
    print_table(f"{section} (medians of {rounds} rounds)", columns, table)


def forward_shapes(quick: bool) -> Iterator[Shape]:
    """Return shapes of 16k tokens and width 2048, as in FlashAttention's published charts."""
    dims = (64, 128) if quick else (64, 80, 96, 128, 160, 192, 256)
    for head_dim in dims:
        for length in (16384,) if quick else (4096, 16384):
            for causal in (False, True):
                heads = 2048 // head_dim
                yield Shape(16384 // length, length, length, heads, heads, head_dim, causal)
    if not quick:
        for head_dim in (64, 128):
            yield Shape(4, 4096, 4096, 8, 8, head_dim, False, torch.float32)


def decode_shapes(quick: bool) -> Iterator[Shape]:
    yield Shape(8, 8, 16384, 32, 8, 128, True)
    if not quick:
        yield Shape(8, 16, 32768, 32, 8, 128, True)
        for batch, length in ((1, 8192), (8, 8192), (64, 8192), (1, 131072)):
            yield Shape(batch, 1, length, 32, 8, 128)
        yield Shape(8, 1, 8192, 32, 32, 128)


def bench_read(report: Report, rounds: int) -> None:
    """Time a plain read, torch.sum over 4 GB, as the bandwidth baseline of decode."""
    data = torch.ones(2**30, device="cuda")
    figures = kernel_times({"sum": lambda _: data.sum()}, sets=1, rounds=rounds)["sum"]
    report.add("decode", "read 4 GiB", "torch.sum", "kernel_us", figures)
    say(f"plain read: {data.nbytes / figures.p50 / 1e3:.0f} GB/s")


def common_facts() -> dict[str, str]:
    """Return the facts that every row of the CSV repeats."""
    git = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=False,
    )
    facts = {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M"),
        "commit": git.stdout.strip(),
        "gpu": "",
        "clocks": "",
        "driver": "",
        "nvrtc": "",
    }
    from jitattn.jit import compilers

    facts["nvrtc"] = str(compilers.chosen())
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
        query = "driver_version,clocks.sm,clocks.mem,power.draw"
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        found = subprocess.run(command, capture_output=True, text=True, check=False)
        facts["driver"], _, clocks = found.stdout.strip().partition("\n")[0].partition(", ")
        facts["clocks"] = clocks  # start of the run
    return facts


def main(argv: Sequence[str] | None = None) -> int:
    """Run the selected sections."""
    sections = (
        "forward", "decode", "host", "doors", "sequences", "scores", "density", "flex",
        "functions", "warp_attention", "dkernel", "cosine", "sageattention", "xformers", "backward",
        "parallel", "models", "compile", "service",
    )  # fmt: skip
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--section", default=None, help=f"some of {','.join(sections)}")
    parser.add_argument("--quick", action="store_true", help="few shapes, few rounds, no compile")
    parser.add_argument("--functions", default="", help="some of the functions' names")
    parser.add_argument("--rounds", type=int, default=None, help="timed rounds a shape")
    parser.add_argument("--csv", type=Path, help="write all rows there")
    parser.add_argument("--plot", type=Path, help="draw the density section there, as a PNG")
    arguments = parser.parse_args(argv)
    quick = ("forward", "decode", "host")
    asked = (arguments.section or ",".join(quick if arguments.quick else sections)).split(",")
    if unknown := set(asked) - set(sections):
        parser.error(f"--section: {', '.join(sorted(unknown))} is none of {', '.join(sections)}")
    if not torch.cuda.is_available() and not set(asked) <= _WITHOUT_GPU.keys():
        here = ",".join(_WITHOUT_GPU)
        if arguments.section:
            missing = ", ".join(sorted(set(asked) - _WITHOUT_GPU.keys()))
            parser.error(f"--section: {missing} needs a GPU, and torch sees none; here: {here}")
        say(f"torch sees no GPU: --section {here}")
        asked = list(_WITHOUT_GPU)
    rounds = arguments.rounds or (5 if arguments.quick else 15)
    report = Report(common_facts())
    with torch.no_grad():
        if "forward" in asked:
            bench_kernels("forward", list(forward_shapes(arguments.quick)), report, rounds)
        if "decode" in asked:
            bench_read(report, rounds)
            bench_kernels("decode", list(decode_shapes(arguments.quick)), report, rounds)
        if "host" in asked:
            bench_host(report, rounds)
        if "doors" in asked:
            bench_doors(report, rounds)
        if "sequences" in asked:
            bench_sequences(report, rounds)
        if "scores" in asked:
            bench_scores(report, min(rounds, 5))
        if "density" in asked:
            bench_density(report, min(rounds, 5))
            if arguments.plot:
                plot_density(report.rows, arguments.plot)
        if "flex" in asked:
            bench_flex(report, min(rounds, 5))
        if "functions" in asked:
            names, quick = arguments.functions, arguments.quick
            bench_functions(report, min(rounds, 5), names=names, quick=quick)
        for name, bench in (
            ("warp_attention", bench_warp_attention),
            ("dkernel", bench_dkernel),
            ("cosine", bench_cosine),
            ("sageattention", bench_sageattention),
            ("xformers", bench_xformers),
            ("backward", bench_backward),
            ("parallel", bench_parallel),
            ("models", bench_models),
        ):
            if name in asked:
                bench(report, min(rounds, 5))
        if "compile" in asked:
            bench_compile(report)
        if "service" in asked:
            bench_service(report)
    if arguments.csv:
        with arguments.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(report.rows)
        say(f"wrote {arguments.csv}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
