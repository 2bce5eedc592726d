"""Measures context-parallel attention: ``python tools/bench_parallel.py --gpus 2``.

correct   results and gradients of every method beside one GPU's, and whether two runs are bitwise
          equal
speed     forward, and forward and backward, of causal masks and windows: tokens per second,
          efficiency against one GPU, memory per rank; torch's own ring attention in the same run,
          and what the model of tools/_parallel_model.py predicts
overlap   time of computing alone, of transfers alone, and of both: the share that is hidden
train     a small GPT for 100 steps with FSDP2 and context parallelism, beside one GPU's curve
killed    a rank is killed: how the others end, and when

``--simulate 8,64,512`` needs no GPU: it predicts efficiency for so many, and says which method is
best. Rates and bandwidths are options; measured ones (``speed`` prints them) make it honest.
``--device cpu`` tries the program itself, with gloo. NVLink multicast stays off.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from dataclasses import fields
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from _parallel_bench import bench_correct, bench_overlap, bench_speed
from _parallel_model import Machine, Work, predict
from _parallel_training import bench_train
from _table import print_table, say

import jitattn
from jitattn.distributed import context_parallel_attention, plan, shard

if TYPE_CHECKING:
    from collections.abc import Sequence

_SECTIONS: Final = ("correct", "speed", "overlap", "train", "killed")
_METHODS: Final = ("ring", "allgather", "ulysses", "hybrid")
#: Seconds that ranks wait for a killed one.
_PATIENCE: Final = 20.0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the sections that are asked for."""
    given = _arguments(argv)
    machine = Machine(**{one.name: getattr(given, one.name) for one in fields(Machine)})
    if given.simulate:
        for ranks in map(int, given.simulate.split(",")):
            simulate(ranks, given, machine)
        return 0
    os.environ["NCCL_NVLS_ENABLE"] = "0"
    sections = given.section.split(",")
    with tempfile.TemporaryDirectory() as folder:
        ranked = [one for one in sections if one != "killed"]
        if ranked:
            arguments = (given, machine, ranked, folder)
            mp.spawn(_rank, arguments, nprocs=given.gpus)  # type: ignore[attr-defined,no-untyped-call]
        if "killed" in sections:
            killed(given, folder)
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--gpus", type=int, default=2)
    parser.add_argument("--section", default=",".join(_SECTIONS))
    parser.add_argument("--lengths", default="32768,131072,524288")
    parser.add_argument("--heads", default="32,8", help="of q, and of k and v")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--window", type=int, default=4096)
    parser.add_argument("--keep-first", type=int, default=4)
    parser.add_argument("--steps", type=int, default=100, help="of train")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each figure")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--simulate", default="", help="numbers of GPUs")
    for one in fields(Machine):
        name = f"--{one.name.replace('_', '-')}"
        parser.add_argument(name, type=type(one.default), default=one.default)
    return parser.parse_args(argv)


def _works(given: argparse.Namespace) -> list[Work]:
    heads = [int(one) for one in given.heads.split(",")]
    common: dict[str, Any] = {
        "heads_q": heads[0], "heads_kv": heads[1], "head_dim": given.head_dim
    }  # fmt: skip
    found = []
    for length in map(int, given.lengths.split(",")):
        found.append(Work(length, **common))
        if given.window:
            found.append(Work(length, **common, window=given.window, keep_first=given.keep_first))
    return found


# ---- Simulation


def simulate(ranks: int, given: argparse.Namespace, machine: Machine) -> None:
    """Print predicted efficiency of every method, and the best, by length."""
    per_node = min(machine.gpus_per_node, ranks)
    rows = []
    for work in _works(given):
        for backward in (False, True):
            found = {}
            for method in _METHODS:
                if method == "ulysses" and ranks > work.heads_q:
                    continue
                within = min(per_node, work.heads_kv)
                if method == "hybrid" and not 1 < within < ranks:
                    continue
                found[method] = predict(
                    work, ranks, method, machine, backward=backward, ulysses=within
                )
            best = max(found, key=lambda name: found[name].efficiency)
            for method, one in found.items():
                rows.append((
                    work.length, "causal" if work.window is None else f"window {work.window}",
                    "both" if backward else "forward", method, f"{one.both * 1e3:.1f}",
                    f"{one.efficiency:.3f}", f"{one.hidden:.2f}",
                    f"{work.length / one.both / 1e3:.0f}", "best" if method == best else "",
                ))  # fmt: skip
    columns = ("tokens", "mask", "pass", "method", "ms", "efficiency", "hidden", "ktok/s", "")
    print_table(f"{ranks} GPUs, predicted", columns, rows)


# ---- Ranks


def _rank(
    rank: int, given: argparse.Namespace, machine: Machine, sections: list[str], folder: str
) -> None:
    """Run sections as one of the ranks."""
    _join(rank, given, Path(folder) / "store", 600.0)
    try:
        works = _works(given)
        if "correct" in sections:
            bench_correct(given.device, works, (given.heads, given.head_dim))
        if "speed" in sections:
            bench_speed(given.device, works, machine, given.seconds)
        if "overlap" in sections:
            bench_overlap(given.device, works, given.seconds)
        if "train" in sections:
            bench_train(given.device, given.steps)
    finally:
        dist.destroy_process_group()


def _join(rank: int, given: argparse.Namespace, store: Path, timeout: float) -> None:
    if given.device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if given.device == "cuda" else "gloo",
        store=dist.FileStore(str(store), given.gpus),  # type: ignore[attr-defined]
        rank=rank,
        world_size=given.gpus,
        timeout=timedelta(seconds=timeout),
    )


# ---- A rank that dies


def killed(given: argparse.Namespace, folder: str) -> None:
    """Kill the last rank between two calls, and print how the others end."""
    context = mp.get_context("spawn")
    store, notes = Path(folder) / "killed", Path(folder)
    ranks = [
        context.Process(target=_mortal, args=(rank, given, store, notes))
        for rank in range(given.gpus)
    ]
    start = time.monotonic()
    for one in ranks:
        one.start()
    for one in ranks:
        one.join(4 * _PATIENCE + 60)
    rows = []
    for rank, one in enumerate(ranks):
        note = notes / f"end.{rank}"
        text = note.read_text() if note.exists() else "ended by the watchdog, or from outside"
        if one.is_alive():
            one.kill()
            text = "still waiting: a hang"
        rows.append((rank, one.exitcode, text[:110]))
    print_table(f"a killed rank (timeout {_PATIENCE:.0f} s)", ("rank", "exit", "end"), rows)
    say(f"{time.monotonic() - start:.0f} s in all")


def _mortal(rank: int, given: argparse.Namespace, store: Path, notes: Path) -> None:
    _join(rank, given, store, _PATIENCE)
    length = 4096
    own = plan(jitattn.Causal(), length)
    generator = torch.Generator().manual_seed(0)
    dtype = torch.bfloat16 if given.device == "cuda" else torch.float32
    q = torch.randn(1, length, 4, 64, generator=generator).to(given.device, dtype)
    mine = shard(q, own)
    call: dict[str, Any] = {"mask": jitattn.Causal(), "plan": own}
    context_parallel_attention(mine, mine, mine, **call)
    if rank == given.gpus - 1:
        os._exit(9)
    start = time.monotonic()
    try:
        while time.monotonic() - start < 3 * _PATIENCE:
            context_parallel_attention(mine, mine, mine, **call)
            if given.device == "cuda":
                torch.cuda.synchronize()
        note = "no error"
    except (RuntimeError, jitattn.JitAttnError) as error:
        seconds = time.monotonic() - start
        note = f"{seconds:.1f} s: {type(error).__name__}: {error}"
    (notes / f"end.{rank}").write_text(note)
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
