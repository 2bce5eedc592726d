"""Draws the pictures of the guide: masks, by `jitattn.patterns.draw`, and the plot of the gears."""

from __future__ import annotations

import io
import re
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch

import jitattn
from jitattn import patterns
from jitattn.reference.masks import attended

if TYPE_CHECKING:
    from jitattn import Mask

_NOTE: Final = Path(__file__).resolve().parents[2] / "cuda_src" / "notes" / "0007-gears.md"
#: Queries and keys of a picture.
_SIZE: Final = 32
_GEARS: Final = {"0, 1": "gears 0, 1", "0 to 2": "gears 0 to 2", "3, 4": "gears 3, 4"}


def masks() -> dict[str, tuple[Mask, int, int, int]]:
    """Return what is drawn: name of the picture to mask, heads, queries and keys."""
    keep = torch.ones(1, _SIZE, dtype=torch.bool)
    keep[:, 24:] = False
    pairs = torch.rand(1, 1, _SIZE, _SIZE, generator=torch.Generator().manual_seed(0)) < 0.3
    blocks = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 0, 0, 1]]).bool()
    window = jitattn.Window(left=6, right=0, keep_first=2)
    stride = jitattn.LocalStride(8, local_blocks=1, vert_stride=3, head_step=1)
    return {
        "full": (jitattn.Full(), 1, _SIZE, _SIZE),
        "causal": (jitattn.Causal(), 1, 12, 20),
        "causal-top-left": (jitattn.Causal("top_left"), 1, 12, 20),
        "window": (jitattn.Window(left=6, right=3), 1, _SIZE, _SIZE),
        "window-first": (window, 1, _SIZE, _SIZE),
        "local-stride": (stride, 3, 64, 64),
        "block-sparse": (jitattn.BlockSparse(blocks, 8), 1, _SIZE, _SIZE),
        "per-head": (jitattn.PerHead([jitattn.Causal(), window]), 2, _SIZE, _SIZE),
        "key-padding": (jitattn.KeyPadding(keep), 1, _SIZE, _SIZE),
        "dense": (jitattn.Dense(pairs), 1, _SIZE, _SIZE),
        "both": (jitattn.Causal() & jitattn.KeyPadding(keep), 1, _SIZE, _SIZE),
    }


def documents() -> jitattn.MaskMod:
    """Return the mask of three documents in one sequence, as a function."""
    ids = torch.tensor([0] * 9 + [1] * 15 + [2] * 8)
    return jitattn.MaskMod(lambda b, h, q, kv: (ids[q] == ids[kv]) & (q >= kv))


def mask_pictures() -> dict[str, bytes]:
    """Draw the masks: name of the file to PNG."""
    made = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mask.png"
        for name, (mask, heads, len_q, len_kv) in masks().items():
            seen = attended(mask, 1, heads, heads, len_q, len_kv)[0]
            cell = max(1, 224 // max(len_q, len_kv))
            patterns.draw(seen, path, cell=cell)
            made[f"{name}.png"] = path.read_bytes()
        patterns.draw(documents(), path, cell=7, sizes=(1, _SIZE, _SIZE))
        made["mask-mod.png"] = path.read_bytes()
    return made


def gear_rows() -> list[tuple[str, str, float, float]]:
    """Read dtype, gear, error and speed against gear 2 of the gears that are, from notes/0007."""
    rows = []
    for line in _NOTE.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) < 7 or cells[0] not in ("fp16", "bf16", "fp32"):
            continue
        found = re.match(r"(\d(?:(?:, | to )\d)?) ", cells[1])
        if found is not None:
            name = _GEARS.get(found[1], f"gear {found[1]}")
            rows.append((cells[0], name, float(cells[2]), float(cells[6])))
    return rows


def gear_plot() -> bytes:
    """Plot error and speed of the gears, from the table of notes/0007: a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for dtype, marker in (("fp16", "o"), ("bf16", "s"), ("fp32", "^")):
        own = [row[1:] for row in gear_rows() if row[0] == dtype]
        errors, speeds = [row[1] for row in own], [row[2] for row in own]
        axes.plot(errors, speeds, marker=marker, label=f"{dtype} inputs")
        for name, error, speed in own:
            above = 7 if dtype != "bf16" else -14
            axes.annotate(name, (error, speed), (0, above), textcoords="offset points", ha="center")
    axes.set(xscale="log", xlabel="relative L2 error against fp64 (4096 keys, D=128, fp32 results)")
    axes.set(ylabel="speed, gear 2 of the dtype = 1", xlim=(1e-7, 1e-1), ylim=(0.3, 2.6))
    axes.set_title("H200, 16k queries and keys, D=128, full", fontsize="medium")
    axes.legend(loc="upper left")
    axes.grid(alpha=0.3)
    made = io.BytesIO()
    figure.savefig(made, format="png", dpi=120)
    return made.getvalue()
