"""Context-parallel calls on several ranks, beside the result of one process.

``python -m tests.support.parallel RANKS`` computes what is expected, in fp64 on the CPU, forks the
ranks, which speak gloo, and prints a line of JSON: the largest error of every case, relative to the
largest value. With ``--dtype`` the ranks share a GPU; with ``--emulate`` as well, an emulated one.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

import jitattn
from jitattn import Full
from jitattn.distributed import context_parallel_attention, plan
from jitattn.distributed.members import members_of
from jitattn.distributed.segments import contiguous, count_of
from tests.support.parallel_cases import (
    CASES,
    DEVICE,
    DTYPE,
    GPU_DIMS,
    METHODS,
    SHARED,
    Case,
    drawn,
)

ROOT = Path(__file__).parents[2]


class Numbers(NamedTuple):
    """Results and gradients by name; of shared tensors, of the whole call."""

    results: dict[str, Tensor]
    gradients: dict[str, Tensor]


def inputs(case: Case) -> dict[str, Tensor]:
    """q, k, v, and the gradients of out and LSE, of the whole sequence."""
    len_kv = case.length if case.len_kv is None else case.len_kv
    batch = () if case.is_flat else (case.batch,)
    found = {}
    for name, length, heads, dim in (
        ("q", case.length, case.heads[0], case.dims[0]),
        ("k", len_kv, case.heads[1], case.dims[0]),
        ("v", len_kv, case.heads[1], case.dims[1]),
        ("d_out", case.length, case.heads[0], case.dims[1]),
    ):
        found[name] = drawn(*batch, length, heads, dim, dtype=case.dtype, seed=ord(name[0]))
    wide = torch.promote_types(case.dtype, torch.float32)
    found["d_lse"] = drawn(*batch, case.heads[0], case.length, dtype=wide)
    if case.layout == "bhsd":
        for name in ("q", "k", "v", "d_out"):
            found[name] = found[name].transpose(1, 2).contiguous()
    return found


def expected(case: Case) -> Numbers:
    """What one process gets of the same numbers in fp64."""
    whole, given = {name: x.double() for name, x in inputs(case).items()}, case.make()
    table = given.pop("table", None)
    leaves = {name: whole[name].clone().requires_grad_() for name in ("q", "k", "v")}
    out, lse = jitattn.attention(**leaves, **given, layout=case.layout, return_lse=True)
    return _numbers(out, lse, leaves, {**given, "table": table}, whole["d_out"], whole["d_lse"])


def _numbers(
    out: Tensor,
    lse: Tensor,
    leaves: dict[str, Tensor],
    given: dict[str, Any],
    d_out: Tensor,
    d_lse: Tensor,
) -> Numbers:
    shared = {name: given[name] for name in SHARED if given.get(name) is not None}
    sources = {**leaves, **shared}
    d_lse = d_lse.masked_fill(torch.isneginf(lse.detach()), 0.0)
    found = torch.autograd.grad([out, lse], list(sources.values()), [d_out, d_lse],
                                allow_unused=True)  # fmt: skip
    gradients = {
        name: torch.zeros_like(x) if one is None else one.detach()
        for (name, x), one in zip(sources.items(), found, strict=True)
    }
    return Numbers({"out": out.detach(), "lse": lse.detach()}, gradients)


def ways(ranks: int, cases: Iterable[Case]) -> Iterator[tuple[Case, str, str]]:
    """Cases with a layout and a method each, of so many ranks; of many ranks, some."""
    number, every = 0, {3: 2, 4: 2, 8: 4}.get(ranks, 1)
    for case in cases:
        for layout in case.layouts:
            hybrid = ("hybrid",) if ranks in (4, 8) else ()
            for method in (*METHODS, *hybrid):
                if method == "ulysses" and case.heads[0] < ranks:
                    continue
                number += 1
                if number % every == 0:
                    yield case, layout, method


def errors_of(case: Case, layout: str, method: str, truth: Numbers, mesh: Any) -> float:
    """The largest error of this rank's results and gradients, relative to the largest value."""
    truth = Numbers(*({name: x.to(DEVICE[0]) for name, x in one.items()} for one in truth))
    whole, given = inputs(case), case.make()
    table = given.pop("table", None)
    dim = 0 if case.is_flat else (1 if case.layout == "bshd" else 2)
    where: dict[str, Any] = {"mesh": mesh} if method == "hybrid" else {}
    members = members_of(mesh if method == "hybrid" else None, None)
    ranks, rank = members.size, members.rank
    if layout == "none":
        own_plan = None
        cut = [_contiguous(case, whole[name].shape[dim], ranks) for name in ("q", "k")]
    else:
        own_plan = plan(
            given.get("mask", Full()), case.length, layout=layout, seqs=given.get("q_seqs"), **where
        )
        cut = [own_plan.segments] * 2
        given["plan"] = own_plan

    def local(x: Tensor, axis: int, side: int) -> Tensor:
        return torch.cat(
            [x.narrow(axis, 0, 0)]
            + [
                x.index_select(
                    axis, torch.arange(one.start, one.stop, one.step)[: one.size].to(x.device)
                )
                for one in cut[side][rank]
            ],
            dim=axis,
        )

    leaves = {
        name: local(whole[name], dim, side).requires_grad_()
        for name, side in (("q", 0), ("k", 1), ("v", 1))
    }
    out, lse = context_parallel_attention(
        **leaves, **given, **where, method=method, layout=case.layout, return_lse=True
    )
    assert out.dtype == case.dtype
    found = _numbers(
        out, lse, leaves, {**given, "table": table}, local(whole["d_out"], dim, 0),
        local(whole["d_lse"], -1, 0),
    )  # fmt: skip
    pairs = [
        (out, local(truth.results["out"], dim, 0), truth.results["out"]),
        (lse, local(truth.results["lse"], -1, 0), truth.results["lse"]),
    ]
    for name, gradient in found.gradients.items():
        of_all = truth.gradients[name]
        if name in leaves:
            pairs.append((gradient, local(of_all, dim, int(name != "q")), of_all))
        else:
            total = gradient.clone()
            dist.all_reduce(total)
            pairs.append((total, of_all, of_all))
    return max(_error(*pair) for pair in pairs)


def _contiguous(case: Case, total: int, ranks: int) -> Any:
    """Contiguous shards: of the case's lengths, as far as they go; else even ones."""
    sizes = [min(one, total) for one in case.lengths[:ranks]]
    sizes[-1:] = [total - sum(sizes[:-1])] if len(sizes) == ranks else sizes[-1:]
    rest, left = total - sum(sizes), ranks - len(sizes)
    sizes += [rest * (idx + 1) // left - rest * idx // left for idx in range(left)]
    found = contiguous(sizes)
    assert sum(map(count_of, found)) == total
    return found


def _error(found: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """The largest difference, relative; infinite if -inf or NaN stand elsewhere."""
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    found, wanted = found.detach().double(), wanted.double()
    same = (found == wanted) | (found.isnan() & wanted.isnan())
    if not found.numel():
        return 0.0
    difference = (found - wanted).abs().masked_fill(same, 0.0)
    finite = scale.double()[scale.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 1.0
    return float(difference.nan_to_num(nan=torch.inf).max()) / max(largest, 1e-30)


def on_ranks(
    ranks: int, work: Callable[[int], Any], *, timeout: float = 60.0, keeps_failures: bool = False
) -> list[Any]:
    """Fork `ranks` processes, which share a gloo group; what `work(rank)` returns, as JSON.

    The process may not have threads: it is one of its own (see the module's first lines).
    """
    folder = Path(tempfile.mkdtemp())
    children = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                dist.init_process_group(
                    "gloo",
                    store=dist.FileStore(str(folder / "store"), ranks),
                    rank=rank,
                    world_size=ranks,
                    timeout=timedelta(seconds=timeout),
                )
                (folder / f"{rank}.json").write_text(json.dumps(work(rank)))
                status = 0
                dist.destroy_process_group()
            except BaseException:  # noqa: BLE001 - the parent shows it
                (folder / f"{rank}.error").write_text(traceback.format_exc())
            os._exit(status)
        children.append(pid)
    for pid in children:
        os.waitpid(pid, 0)
    failed = [one.read_text() for one in sorted(folder.glob("*.error"))]
    if failed and not keeps_failures:
        raise RuntimeError("\n".join(failed))
    paths = [folder / f"{rank}.json" for rank in range(ranks)]
    answers = [json.loads(one.read_text()) if one.exists() else None for one in paths]
    shutil.rmtree(folder)
    return answers


def grid(
    ranks: int, chosen: str = "", dtype: torch.dtype | None = None, emulate: str | None = None
) -> dict[str, float]:
    """The largest error over all ranks of every case, layout and method.

    Parameters
    ----------
    ranks : int
    chosen : str
        Part of the names of cases.
    dtype : torch.dtype, optional
        On a GPU that all ranks share, of this dtype.
    emulate : str, optional
        Architecture of an emulated one.
    """
    cases = {case.name: case for case in CASES if chosen in case.name}
    if dtype is not None:
        on_gpu = {"dtype": dtype, "dims": GPU_DIMS}
        cases = {name: one._replace(**on_gpu) for name, one in cases.items()}
    # Autograd looks for GPUs, and a process that has done so has none after a fork: where there is
    # one, ranks compute what is expected themselves.
    has_gpu = dtype is not None and emulate is None
    shared = {} if has_gpu else {name: expected(case) for name, case in cases.items()}

    def work(rank: int) -> dict[str, Any]:
        from torch.distributed.device_mesh import init_device_mesh

        truths = {name: expected(case) for name, case in cases.items()} if has_gpu else shared
        mesh = None
        if ranks in (4, 8):
            mesh = init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("ring", "ulysses"))
        found: dict[str, Any] = {}
        with _device(dtype, emulate):
            for case, layout, method in ways(ranks, cases.values()):
                name = f"{case.name}, {layout}, {method}"
                try:
                    found[name] = errors_of(case, layout, method, truths[case.name], mesh)
                except Exception as error:
                    raise RuntimeError(f"rank {rank}: {name}") from error
        return found

    answers = on_ranks(ranks, work, timeout=60.0 if dtype is None else 600.0)
    return {name: max(one[name] for one in answers) for name in answers[0]}


@contextlib.contextmanager
def _device(dtype: torch.dtype | None, emulate: str | None) -> Iterator[None]:
    if dtype is not None:
        DTYPE[0] = torch.float32
        DEVICE[0] = "cpu" if emulate else "cuda"
    if emulate is None:
        yield
        return
    from tests.support.emulator import emulated

    with emulated(emulate):
        yield


def in_own_process(module: str, *arguments: str, timeout: float = 300.0) -> Any:
    """Run a module in a process without threads, which may fork; the JSON of its last line."""
    done = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("ranks", type=int)
    parser.add_argument("--cases", default="", help="part of their names")
    parser.add_argument("--dtype", help="on a GPU, of this dtype")
    parser.add_argument("--emulate", help="architecture of an emulated GPU")
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = None if given.dtype is None else getattr(torch, given.dtype)
    print(json.dumps(grid(given.ranks, given.cases, dtype, given.emulate)))  # noqa: T201


if __name__ == "__main__":
    main()
