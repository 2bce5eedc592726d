"""Compares forward times with SDPA's best backend, as a heat map of lengths by head dims.

``python tools/heat_map.py measure TABLE.csv`` needs a GPU: 16k tokens, H * D = 2048, bf16, full and
causal self-attention, and decoding (batch 16, one query) on as many keys. ``draw TABLE.csv
MAP.png`` needs matplotlib (``pip install -e ".[bench]"``). A cell is the peer's time over ours,
the better one of SDPA's cuDNN and flash backends, alone by triton.testing.do_bench.
"""

from __future__ import annotations

import argparse
import csv
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LENGTHS: Final = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
HEAD_DIMS: Final = (16, 32, 64, 80, 96, 128, 160, 192, 256)
KINDS: Final = ("full", "causal", "decode")
PEERS: Final = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
COLUMNS: Final = ("gpu", "kind", "len", "head_dim", "jitattn_us", "cudnn_us", "flash_us", "ratio")
_TOKENS: Final = 16384
_WIDTH: Final = 2048  # heads x head_dim
_DECODED: Final = 16  # sequences of a decoding step
#: Milliseconds of warmup, and of repeats.
_WARMUP, _REPEATS = 5, 20


def inputs(kind: str, length: int, head_dim: int) -> tuple[torch.Tensor, ...]:
    """Return q, k and v as [B, L, H, D]."""
    is_decode = kind == "decode"
    batch = _DECODED if is_decode else _TOKENS // length
    heads = _WIDTH // head_dim
    return tuple(
        torch.randn(batch, rows, heads, head_dim, device="cuda", dtype=torch.bfloat16)
        for rows in (1 if is_decode else length, length, length)
    )


def cells() -> Iterator[tuple[str, int, int]]:
    """Yield kind, length and head dim of every cell."""
    for kind in KINDS:
        for head_dim in HEAD_DIMS:
            for length in LENGTHS:
                yield kind, length, head_dim


def mask_of(kind: str) -> jitattn.Full | jitattn.Causal:
    """Return our mask."""
    return jitattn.Causal() if kind == "causal" else jitattn.Full()


def microseconds(call: Callable[[], object]) -> float:
    """Return the median time of a call; NaN if the backend refuses it."""
    from triton.testing import do_bench

    try:
        found: float = do_bench(call, warmup=_WARMUP, rep=_REPEATS, return_mode="median")
    except RuntimeError:
        return float("nan")
    return 1e3 * found


def peer_time(kind: str, qkv: tuple[torch.Tensor, ...], backend: SDPBackend) -> float:
    """Return the time of SDPA with one backend, in microseconds."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    with sdpa_kernel(backend):
        return microseconds(lambda: sdpa(q, k, v, is_causal=kind == "causal"))


def our_time(kind: str, qkv: tuple[torch.Tensor, ...]) -> float:
    """Return our time, in microseconds."""
    q, k, v = qkv
    mask = mask_of(kind)
    return microseconds(lambda: jitattn.attention(q, k, v, mask=mask))


def measure(table: Path) -> None:
    """Measure all cells, and write them as CSV."""
    todo = list(cells())
    with ThreadPoolExecutor(8) as pool:  # NVRTC compiles without the interpreter's lock
        list(pool.map(_compile, todo))
    gpu = torch.cuda.get_device_name()
    with table.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for kind, length, head_dim in todo:
            qkv = inputs(kind, length, head_dim)
            ours = our_time(kind, qkv)
            peers = {name: peer_time(kind, qkv, backend) for name, backend in PEERS.items()}
            best = min((one for one in peers.values() if one == one), default=float("nan"))
            numbers = (ours, *peers.values(), best / ours)
            writer.writerow((gpu, kind, length, head_dim, *(f"{one:.4g}" for one in numbers)))


def _compile(cell: tuple[str, int, int]) -> None:
    kind, length, head_dim = cell
    q, k, v = inputs(kind, length, head_dim)
    jitattn.attention(q, k, v, mask=mask_of(kind))


def draw(table: Path, image: Path) -> None:
    """Draw a table as a heat map."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with table.open() as file:
        rows = list(csv.DictReader(file))
    figure, axes = pyplot.subplots(1, len(KINDS), figsize=(20, 5.5), layout="constrained")
    for axis, kind in zip(axes, KINDS, strict=True):
        found = {
            (int(r["head_dim"]), int(r["len"])): float(r["ratio"])
            for r in rows
            if r["kind"] == kind
        }
        grid = [[found[dim, length] for length in LENGTHS] for dim in HEAD_DIMS]
        shown = axis.imshow(grid, cmap="RdYlGn", vmin=0.5, vmax=1.5, aspect="auto")
        axis.set(title=kind, xlabel="keys" if kind == "decode" else "length", ylabel="head dim")
        axis.set_xticks(range(len(LENGTHS)), [str(length) for length in LENGTHS])
        axis.set_yticks(range(len(HEAD_DIMS)), [str(dim) for dim in HEAD_DIMS])
        for y, line in enumerate(grid):
            for x, ratio in enumerate(line):
                axis.text(x, y, f"{ratio:.2f}", ha="center", va="center", fontsize=8)
    figure.colorbar(shown, ax=axes, label="time of SDPA's best backend over ours")
    figure.suptitle(f"{rows[0]['gpu']}, bf16, H * D = {_WIDTH}")
    figure.savefig(image, dpi=80)


def main() -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("measure").add_argument("table", type=Path)
    drawing = commands.add_parser("draw")
    drawing.add_argument("table", type=Path)
    drawing.add_argument("image", type=Path)
    given = parser.parse_args()
    if given.command == "measure":
        measure(given.table)
    else:
        draw(given.table, given.image)


if __name__ == "__main__":
    main()
