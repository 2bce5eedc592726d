"""Reports errors and times of the gears: ``python tools/gears.py [--plot FILE] [--estimate]``.

Relative L2 error against fp64 of the same inputs, head_dim 128, 4096 keys, fp32 results: of
Gaussian data, of data with a few channels of K and Q twenty times as large, and of K with a mean in
every channel. Times are of 16k queries and keys, full, against gear 2, and for fp32 inputs against
SDPA. The guarantees of the gears are for Gaussian data.

``--estimate`` needs no GPU: it counts the tensor-core cycles of an inner step on a GeForce card for
each gear, and so the largest possible speed-up over gear 2.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from _table import print_table
from _timing import kernel_times

import jitattn
from jitattn.reference import reference
from jitattn.values.gears import GEARS
from jitattn.values.tensors import DTYPES

if TYPE_CHECKING:
    from collections.abc import Callable

_DIM, _KEYS, _QUERIES, _HEADS = 128, 4096, 256, 4
_LENGTH, _TIMED_HEADS = 16384, 16
_DATA: Final = ("gaussian", "outlier channels", "biased K")
#: Cycles per quarter of a multiprocessor of a 16 x 8 x 16 MMA in 16 bits, by accumulator, and of a
#: 16 x 8 x 32 MMA in 8 bits: GeForce cards have half the rate with fp32 accumulators. Source:
#: NVIDIA, GA102 and AD102 white papers.
_CYCLES: Final = {
    "sm_86": {"f32": 32, "f16": 16, "s8": 16},
    "sm_89": {"f32": 32, "f16": 16, "s8": 16},
}


def data(kind: str, dtype: torch.dtype) -> list[torch.Tensor]:
    """Make q, k and v of one data distribution, on the GPU."""
    generator = torch.Generator(device="cuda").manual_seed(7)

    def normal(length: int) -> torch.Tensor:
        shape = (1, length, _HEADS, _DIM)
        return torch.randn(shape, device="cuda", generator=generator)

    q, k, v = normal(_QUERIES), normal(_KEYS), normal(_KEYS)
    if kind == "outlier channels":
        # Channels that are large in K are small in Q, so that scores keep their spread.
        k[..., ::32] *= 20.0
        q[..., ::32] /= 20.0
    if kind == "biased K":
        k += 2.0 * normal(1)
    return [x.to(dtype) for x in (q, k, v)]


def errors() -> dict[tuple[torch.dtype, int, str], float]:
    """Measure relative L2 errors by dtype, gear and data."""
    found = {}
    for dtype in DTYPES:
        for kind in _DATA:
            q, k, v = data(kind, dtype)
            truth = reference(q, k, v)
            gear: Any
            for gear in GEARS:
                out = jitattn.attention(q, k, v, gear=gear, out_dtype=torch.float32)
                error = (out.double() - truth).norm() / truth.norm()
                found[dtype, gear, kind] = error.item()
    return found


def times(rounds: int) -> dict[tuple[torch.dtype, str], float]:
    """Measure microseconds by dtype and provider: gears, and SDPA for fp32 inputs."""
    found = {}
    for dtype in DTYPES:
        shape = (1, _LENGTH, _TIMED_HEADS, _DIM)
        q, k, v = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
        calls = {f"gear {gear}": _call(jitattn.attention, q, k, v, gear=gear) for gear in GEARS}
        if dtype is torch.float32:
            turned = [x.transpose(1, 2).contiguous() for x in (q, k, v)]
            calls["sdpa"] = _call(torch.nn.functional.scaled_dot_product_attention, *turned)
        for name, spread in kernel_times(calls, sets=1, rounds=rounds).items():
            found[dtype, name] = spread.p50
    return found


def _call(function: Callable[..., Any], *args: Any, **named: Any) -> Callable[[int], Any]:
    return lambda _: function(*args, **named)


def numerics(gear: int, dtype: torch.dtype) -> str:
    """Return the numerics class of the timed calls."""
    qkv = (torch.empty(1, _LENGTH, 1, _DIM, device="cuda", dtype=dtype) for _ in range(3))
    return str(jitattn.explain(*qkv, gear=gear).kernel["numerics"])


def report(plot: Path | None, rounds: int) -> int:
    """Print the table; return 1 if an error exceeds a guarantee."""
    error, time = errors(), times(rounds)
    rows, is_broken = [], False
    for dtype in DTYPES:
        base = time[dtype, "gear 2"]
        for number, gear in GEARS.items():
            promised = gear.rel_l2[DTYPES[dtype]]
            is_broken |= error[dtype, number, "gaussian"] > promised
            own = time[dtype, f"gear {number}"]
            rows.append(
                (
                    str(dtype).removeprefix("torch."),
                    f"{number} {numerics(number, dtype)}",
                    f"{promised:.0e}",
                    *(f"{error[dtype, number, kind]:.1e}" for kind in _DATA),
                    f"{own:.0f}",
                    f"{base / own:.2f}",
                )
            )
        if (dtype, "sdpa") in time:
            own = time[dtype, "sdpa"]
            rows.append(("float32", "sdpa", "", "", "", "", f"{own:.0f}", f"{base / own:.2f}"))
    columns = ("dtype", "gear", "promised", *_DATA, "us", "gear 2 / it")
    print_table("Gears: relative L2 errors, D=128, and times at 16k, full", columns, rows)
    if plot is not None:
        draw(error, time, plot)
    return int(is_broken)


def draw(
    error: dict[tuple[torch.dtype, int, str], float],
    time: dict[tuple[torch.dtype, str], float],
    path: Path,
) -> None:
    """Plot errors against speed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    for dtype in DTYPES:
        speed = [4e-6 * _LENGTH**2 * _DIM * _TIMED_HEADS / time[dtype, f"gear {g}"] for g in GEARS]
        own = [error[dtype, gear, "gaussian"] for gear in GEARS]
        axes.plot(speed, own, "o", label=str(dtype).removeprefix("torch."))
        for gear, x, y in zip(GEARS, speed, own, strict=True):
            axes.annotate(str(gear), (x, y), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="TFLOP/s", ylabel="relative L2 error", yscale="log")
    axes.set_title("Gears on " + torch.cuda.get_device_name())
    axes.legend()
    figure.savefig(path, dpi=120)


def estimate() -> None:
    """Count the tensor-core cycles of a step of 64 keys, from the MMAs of the kernels."""
    rows: list[tuple[object, ...]] = []
    for arch, cycles in _CYCLES.items():
        for dim in (64, 128):
            # MMAs of 16 rows and 64 keys: of QK^T, and of PV.
            scores, output = 64 // 8 * (dim // 16), dim // 8 * (64 // 16)
            gear2 = (scores + output) * cycles["f32"]
            counts = {
                "1": (scores + 2 * output) * cycles["f32"],
                "2": gear2,
                "3": scores * cycles["f32"] + output * cycles["f16"],
                "4": scores // 2 * cycles["s8"] + output * cycles["f16"],
            }
            rows += [
                (arch, dim, name, count, f"{gear2 / count:.2f}") for name, count in counts.items()
            ]
    columns = ("arch", "head_dim", "gear", "cycles", "gear 2 / it")
    print_table(
        "fp16 on GeForce: tensor-core cycles of 16 rows and 64 keys, a bound", columns, rows
    )


def main() -> int:
    """Report or estimate, as the command line says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plot", type=Path, help="a PNG: error against speed")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--estimate", action="store_true", help="without a GPU: cycles, by hand")
    given = parser.parse_args()
    if given.estimate:
        estimate()
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: --estimate needs none", file=sys.stderr)
        return 2
    return report(given.plot, given.rounds)


if __name__ == "__main__":
    sys.exit(main())
