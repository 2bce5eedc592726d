"""Times gears, measures errors, plots charts and tunes tiles, as the original's scripts do."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch

from jitattn.compat._errors import check
from jitattn.compat.warp_attention import (
    num_gears,
    num_kernel_versions,
    warp_attention_forward,
)
from jitattn.compat.warp_attention.baseline_tester import (
    attn,
    report,
    test_flash_attn,
    test_torch_sdpa,
)
from jitattn.compat.warp_attention.util import attn_flop, cuda_timeit, mae
from jitattn.errors import JitAttnError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

_TOLERANCE: Final = 1e-4  #: largest mean absolute error that `tune` accepts
_HEADS, _HISTORY = 64, 4096


def test_warpat(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    gear: int = 3,
    version: int = 0,
    loops: int = 1,
    warmup_loops: int = 1,
    verbose: int = 1,
    is_causal: bool = False,
    epsilon: float = 0,
    runtime_baseline: float | None = None,
    output_baseline: Tensor | None = None,
    return_output: bool = False,
    return_error: bool = False,
) -> Any:  # noqa: ANN401 - as many values as were asked for
    """Time a gear and a version.

    Returns
    -------
    seconds, or a tuple with the output and the mean absolute error if they are asked for

    Raises
    ------
    CheckFailedError
        The error against `output_baseline` is over `epsilon`, if that is not 0.
    """
    given = {
        "query": query,
        "key": key,
        "value": value,
        "gear": gear,
        "version": version,
        "is_causal": is_causal,
    }
    output, seconds = cuda_timeit(
        warp_attention_forward, given, loops, verbose=0, warmup_loops=warmup_loops
    )
    error = float("nan") if output_baseline is None else mae(output, output_baseline)
    check(
        not epsilon or error <= epsilon,
        f"gear {gear}, version {version}: mean absolute error {error:.2e}, over {epsilon:.2e}",
    )
    if verbose:
        name = f"gear {gear}, version {version}"
        if runtime_baseline is not None:
            name += f" ({runtime_baseline / seconds:.2f} x the baseline)"
        report(name, query, key, is_causal, seconds)
    results = [seconds]
    if return_output:
        results.append(output)
    if return_error:
        results.append(error)
    return results[0] if len(results) == 1 else tuple(results)


def compare(
    save_path: str,
    b: int,
    m: int,
    k: int,
    h: int,
    is_causal: bool,
    ns: Sequence[int] | None = None,
    gears: Sequence[int] | None = None,
    device: torch.device | str | int | None = None,
) -> None:
    """Plot TFLOP/s against the length of the history, gears beside SDPA's backends, as a PNG.

    Parameters
    ----------
    save_path : str
    b, m, k, h : int
        Batch, queries, head_dim, heads.
    ns : sequence of int, default 128 to 16384
        Keys; those below m are left out.
    gears : sequence of int, default all
    device : default the current CUDA device

    Raises
    ------
    JitAttnError
        matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise JitAttnError(
            "plotting needs matplotlib; install it with: pip install matplotlib"
        ) from error
    lengths = [n for n in (ns or [2**i for i in range(7, 15)]) if n >= m]
    lines: dict[str, list[float]] = {}
    for n in lengths:
        q, k_in, v = _tensors(b, m, n, k, h, device)
        flop = attn_flop(b, m, n, k, h, is_causal, fma=False)
        timed: dict[str, Any] = {
            "loops": 100,
            "warmup_loops": 10,
            "verbose": 0,
            "is_causal": is_causal,
        }
        for gear in range(num_gears) if gears is None else gears:
            seconds = test_warpat(q, k_in, v, gear=gear, version=-1, **timed)
            lines.setdefault(f"gear {gear}", []).append(flop / seconds / 1e12)
        if not is_causal:
            for name, test in (("sdpa", test_torch_sdpa), ("flash", test_flash_attn)):
                lines.setdefault(name, []).append(flop / test(q, k_in, v, **timed) / 1e12)
    figure = Figure(figsize=(8, 5))
    axes = figure.add_subplot()
    for name, rates in lines.items():
        axes.plot(lengths, rates, marker="o", label=name)
    axes.set_xscale("log", base=2)
    axes.set(xlabel="keys", ylabel="TFLOP/s", title=f"B {b}, {m} queries, D {k}, H {h}")
    axes.legend()
    figure.savefig(save_path, dpi=120)


def tune(
    device: torch.device | str | int | None = None,
    log_m_start: int = 4,
    log_m_stop: int = 11,
    log_b_start: int = 0,
    log_b_stop: int = 1,
    verbose: int = 0,
) -> dict[tuple[int, int, bool, int, int], int]:
    """Find the fastest version of every gear: 4096 keys, 64 heads.

    Nothing needs it: version -1 chooses by rows. It says whether that choice is right.

    Returns
    -------
    dict
        (gear, head_dim, causal, log2 of the batch, log2 of the queries) to the version.
    """
    best: dict[tuple[int, int, bool, int, int], int] = {}
    for dim in (32, 64, 128):
        for log_b in range(log_b_start, log_b_stop):
            for log_m in range(log_m_start, log_m_stop):
                q, k, v = _tensors(2**log_b, 2**log_m, _HISTORY, dim, _HEADS, device)
                for is_causal in (False, True):
                    truth = attn(q, k, v, is_causal)
                    for gear in range(num_gears):
                        times = {}
                        for version in range(num_kernel_versions):
                            seconds, error = test_warpat(
                                q,
                                k,
                                v,
                                gear,
                                version,
                                loops=20,
                                warmup_loops=3,
                                verbose=verbose,
                                is_causal=is_causal,
                                output_baseline=truth,
                                return_error=True,
                            )
                            if error <= _TOLERANCE:
                                times[version] = seconds
                        if times:
                            key = (gear, dim, is_causal, log_b, log_m)
                            best[key] = min(times, key=times.__getitem__)
    return best


def _tensors(
    b: int, m: int, n: int, k: int, h: int, device: torch.device | str | int | None
) -> list[Tensor]:
    if device is None:
        device = "cuda"
    shapes = ((b, m, h, k), (b, n, h, k), (b, n, h, k))
    return [torch.randn(shape, device=device, dtype=torch.half) for shape in shapes]
