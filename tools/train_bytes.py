"""Trains a small GPT on bytes: ``python tools/train_bytes.py [--length 1024,8192] [--plot FILE]``.

Every variant of attention starts from the same weights and sees the same bytes: torch's SDPA,
jitattn's causal attention, whose losses must match SDPA's, cosine attention, a window with sinks,
and a local + stride pattern. The text is the sources of Python's own library, or
``--data FILE``. On a GPU in bf16, 300 steps; on the CPU smaller, in fp32. Prints losses and tokens
a second, and draws the curves with ``--plot``.
"""

from __future__ import annotations

import argparse
import sys
import sysconfig
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

REPOSITORY: Final = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

import torch
from _table import print_table, say
from torch import Tensor, nn
from torch.nn import functional

import jitattn

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: Bytes of text that suffice for any run.
_MOST_BYTES: Final = 32 * 2**20
#: Steps over which the last, noisy losses are averaged before the comparison.
_TAIL: Final = 20


@dataclass(frozen=True)
class Size:
    """Size of the model and its batches."""

    layers: int
    heads: int
    head_dim: int
    tokens: int  #: of a step
    steps: int
    lengths: tuple[int, ...]
    dtype: torch.dtype

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return self.heads * self.head_dim


ON_GPU: Final = Size(6, 6, 64, 2**15, 300, (1024, 8192), torch.bfloat16)
ON_CPU: Final = Size(2, 2, 32, 2**10, 60, (256,), torch.float32)


@dataclass
class Run:
    """Result of one variant."""

    name: str
    losses: list[float] = field(default_factory=list)
    tokens_per_second: float = 0.0

    @property
    def last(self) -> float:
        """Mean of the last losses."""
        tail = self.losses[-_TAIL:]
        return sum(tail) / len(tail)


def variants(length: int) -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    """Return attention functions over [B, L, H, D], by name."""

    def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    def ours(**given: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = jitattn.attention(q, k, v, **given)
            return out

        return call

    near = max(16, length // 8)
    blocks = 64 if length >= 1024 else 16
    return {
        "sdpa": sdpa,
        "jitattn": ours(mask=jitattn.Causal()),
        "cosine": ours(mask=jitattn.Causal(), qk_norm=jitattn.L2Norm(), scale=10.0),
        f"window {near}, first 4": ours(mask=jitattn.Window(near, 0, keep_first=4)),
        f"local 4, stride 8, blocks of {blocks}": ours(mask=jitattn.LocalStride(blocks, 4, 8)),
    }


class Block(nn.Module):
    """Pre-norm transformer block: attention and a feed-forward net."""

    def __init__(self, size: Size, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        width = size.width
        self.heads, self.attend = size.heads, attend
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B, L, width] to the same shape."""
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).unbind(2)
        x = x + self.out(self.attend(q, k, v).flatten(2))
        result: Tensor = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        return result


class ByteModel(nn.Module):
    """A GPT over 256 bytes."""

    def __init__(
        self, size: Size, length: int, attend: Callable[[Tensor, Tensor, Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.tokens, self.places = (
            nn.Embedding(256, size.width),
            nn.Embedding(length, size.width),
        )
        self.blocks = nn.Sequential(*(Block(size, attend) for _ in range(size.layers)))
        self.norm, self.head = nn.LayerNorm(size.width), nn.Linear(size.width, 256)

    def forward(self, text: Tensor) -> Tensor:
        """Return the mean next-byte loss of text, [B, L + 1] bytes."""
        given, wanted = text[:, :-1], text[:, 1:]
        places = torch.arange(given.shape[1], device=text.device)
        x = self.blocks(self.tokens(given) + self.places(places))
        logits = self.head(self.norm(x)).float()
        return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def read_text(path: Path | None) -> Tensor:
    """Read the text as one row of bytes."""
    if path is not None:
        found = path.read_bytes()[:_MOST_BYTES]
    else:
        library = Path(sysconfig.get_paths()["stdlib"])
        sources = (one for one in sorted(library.rglob("*.py")) if "site-packages" not in one.parts)
        found = b"".join(one.read_bytes() for one in sources)[:_MOST_BYTES]
    return torch.frombuffer(bytearray(found), dtype=torch.uint8)


def batches(text: Tensor, size: Size, length: int) -> Iterator[Tensor]:
    """Yield random batches [B, length + 1], the same for every variant."""
    generator = torch.Generator().manual_seed(1)
    count = max(1, size.tokens // length)
    if len(text) < length + 2:
        raise SystemExit(f"--data: {len(text)} bytes are too few for --length {length}")
    for _ in range(size.steps):
        starts = torch.randint(len(text) - length - 1, (count,), generator=generator)
        yield torch.stack([text[start : start + length + 1] for start in starts.tolist()])


def train(
    name: str,
    attend: Callable[[Tensor, Tensor, Tensor], Tensor],
    text: Tensor,
    size: Size,
    length: int,
    device: str,
) -> Run:
    """Train one variant."""
    torch.manual_seed(0)
    model = ByteModel(size, length, attend).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95))
    run, losses = Run(name), []
    started, timed = 0.0, 0
    for step, batch in enumerate(progress(batches(text, size, length), size.steps, name)):
        if step == min(10, size.steps // 2):  # after compiling and warm-up
            synchronize(device)
            started, timed = time.perf_counter(), size.steps - step
        for group in optimizer.param_groups:
            group["lr"] = 6e-4 * min(1.0, (step + 1) / 30)
        with torch.autocast(device, size.dtype, enabled=size.dtype is not torch.float32):
            loss = model(batch.to(device).long())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.detach())
    synchronize(device)
    tokens = max(1, size.tokens // length) * length
    run.tokens_per_second = timed * tokens / (time.perf_counter() - started)
    run.losses = torch.stack(losses).tolist()
    return run


def synchronize(device: str) -> None:
    """Wait for the GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def progress(items: Iterator[Tensor], total: int, name: str) -> Iterator[Tensor]:
    """Show a progress bar on a terminal, if rich is installed."""
    try:
        from rich.progress import track
    except ImportError:
        return items
    return iter(track(items, description=name, total=total, disable=not sys.stdout.isatty()))


def plot(runs: dict[int, list[Run]], path: Path) -> None:
    """Plot the loss curves, one panel per length."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6 * len(runs), 5), layout="tight")
    panels = figure.subplots(1, len(runs), squeeze=False)[0]
    for axes, (length, of_length) in zip(panels, runs.items(), strict=True):
        for run in of_length:
            style = "--" if run.name == "sdpa" else "-"
            label = f"{run.name} ({run.tokens_per_second / 1e3:.0f}k tokens/s)"
            axes.plot(run.losses, style, label=label, linewidth=1)
        axes.set_xlabel("step")
        axes.set_ylabel("loss, nats a byte")
        axes.set_title(f"{length} tokens")
        axes.legend()
    figure.savefig(path, format="png", dpi=120)


def main(argv: Sequence[str] | None = None) -> int:
    """Train all variants; return 1 if losses do not match SDPA's, or do not decrease."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, help="a file to train on")
    parser.add_argument("--length", default=None, help="tokens of a sequence: 1024,8192")
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--only", default=None, help="variants: sdpa,jitattn,cosine,window,local")
    parser.add_argument("--device", choices=("cuda", "cpu"), default=None)
    parser.add_argument("--plot", type=Path, help="draw the curves there, as a PNG")
    arguments = parser.parse_args(argv)
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    size = ON_GPU if device == "cuda" else ON_CPU
    if arguments.steps:
        size = Size(**{**size.__dict__, "steps": arguments.steps})
    lengths = size.lengths
    if arguments.length:
        lengths = tuple(int(word) for word in arguments.length.split(","))
    text = read_text(arguments.data)
    runs: dict[int, list[Run]] = {}
    failed = False
    for length in lengths:
        runs[length] = [
            train(name, attend, text, size, length, device)
            for name, attend in variants(length).items()
            if arguments.only is None or name.split()[0] in arguments.only.split(",")
        ]
        failed |= report(runs[length], length, device)
    if arguments.plot:
        plot(runs, arguments.plot)
        say(f"wrote {arguments.plot}")
    return 1 if failed else 0


def report(runs: list[Run], length: int, device: str) -> bool:
    """Print a table and return whether a variant failed."""
    by_name = {run.name: run for run in runs}
    rows = []
    failed = False
    for run in runs:
        gap = ""
        if run.name == "jitattn" and "sdpa" in by_name:
            pairs = zip(run.losses, by_name["sdpa"].losses, strict=True)
            largest = max(abs(ours - theirs) for ours, theirs in pairs)
            apart = abs(run.last - by_name["sdpa"].last)
            gap = f"{apart:.4f} at the end, {largest:.4f} at most"
            failed |= apart > 0.02
        failed |= not run.last < 0.9 * run.losses[0]
        rows.append(
            (
                run.name,
                f"{run.losses[0]:.3f}",
                f"{run.last:.3f}",
                f"{run.tokens_per_second:.0f}",
                gap,
            )
        )
    columns = ("attention", "first loss", "last loss", "tokens/s", "from sdpa")
    print_table(f"{length} tokens on {device}, {len(runs[0].losses)} steps", columns, rows)
    return failed


if __name__ == "__main__":
    raise SystemExit(main())
