"""Compares results of every path with fp64 truth, relative to a same-dtype baseline's error.

A result passes if all of these hold:

- shape and dtype match, and non-finite values are where the truth has them;
- max|actual - truth| <= factor * max|base - truth| + noise, where `base` is the plain computation
  in the same numerics and order reversed (`support.baseline`);
- max|actual - truth| is below an absolute cap, whatever the error of the baseline;
- the directions agree: 1 - cos(actual, truth) is small. (This detects many small errors of one
  sign, which the maximum does not.)
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

#: Machine epsilon: distance from 1 to the next number.
EPS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7, torch.float32: 2.0**-23}
#: Caps in ulps of max|truth|, by the dtype of the inputs.
CAP_ULPS = {torch.float16: 16.0, torch.bfloat16: 16.0, torch.float32: 64.0}
#: Allowed error relative to the baseline: fp32 is 3 x TF32 against true fp32 products.
FACTOR = {torch.float16: 2.0, torch.bfloat16: 2.0, torch.float32: 4.0}
#: Floor in ulps of max|truth|: a baseline with few elements may be exact by chance.
NOISE_ULPS = {torch.float16: 1.0, torch.bfloat16: 1.0, torch.float32: 4.0}
#: LSEs are fp32 whatever the inputs: sums of products in another order, truncating tensor cores.
LSE_NOISE_ULPS = 16.0
LSE_CAP_ULPS = 256.0


def rel_l2(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Return the relative L2 error in fp64; 0 for empty tensors."""
    norm = truth.double().norm().item()
    error = (actual.double() - truth.double()).norm().item()
    return error / norm if norm else error


def assert_same_gradients(
    results: Sequence[torch.Tensor],
    truths: Sequence[torch.Tensor],
    leaves: Sequence[torch.Tensor],
    d_results: Sequence[torch.Tensor],
    limit: float,
    *,
    least: float = 0.0,
) -> None:
    """Assert that results have the gradients of their fp64 truths.

    Each within a relative L2 error, or, where it all but vanishes, within `least` everywhere.
    """
    got = torch.autograd.grad(results, leaves, d_results)
    wanted = torch.autograd.grad(truths, leaves, [x.double() for x in d_results])
    for one, other in zip(got, wanted, strict=True):
        assert rel_l2(one, other) < limit or (one - other).abs().max() < least


def max_error(actual: torch.Tensor, truth: torch.Tensor) -> float:
    """Return max|actual - truth| over the finite elements of the truth, in fp64."""
    finite = torch.isfinite(truth)
    error = (actual.double() - truth.double())[finite].abs()
    return error.max().item() if error.numel() else 0.0


def assert_attn_close(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    base: torch.Tensor,
    *,
    dtype: torch.dtype | None = None,
    cap_scale: float = 1.0,
    floor: float = 0.0,
    context: object = "",
) -> None:
    """Assert that `actual` is as accurate as its numerics allow.

    Parameters
    ----------
    name : str
        Name of the result, for the message.
    actual, truth, base : Tensor
        The result, its fp64 truth, and the same-dtype baseline.
    dtype : torch.dtype, default actual.dtype
        Dtype of the inputs if the result is wider; its ulps are the unit.
    cap_scale : float
        Widens the cap of ill-conditioned problems (large scores).
    floor : float
        Lower bound of max|truth| in the tolerances: the size of the terms if a sum may cancel.
    context : object
        Spec, case or seed; printed on failure.
    """
    dtype = actual.dtype if dtype is None else dtype
    magnitude = _magnitude(truth)
    if magnitude < floor:
        cap_scale *= floor / max(magnitude, 1e-30)
    unit = EPS[dtype] * max(magnitude, floor)
    bound = FACTOR[dtype] * max_error(base, truth) + NOISE_ULPS[dtype] * unit
    cap = CAP_ULPS[dtype] * EPS[dtype] * magnitude * cap_scale
    if magnitude == 0.0:
        cap = CAP_ULPS[dtype] * unit
    _check(name, actual, truth, base, bound, cap, context)
    if actual.dtype != base.dtype:
        raise AssertionError(f"{name}: dtype {actual.dtype}, expected {base.dtype}\n{context}")
    _check_direction(name, actual, truth, (8 * EPS[dtype] * cap_scale) ** 2, context)


def assert_lse_close(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    base: torch.Tensor,
    *,
    context: object = "",
) -> None:
    """Assert that an LSE has fp32 accuracy relative to the largest score."""
    if actual.dtype != torch.float32:
        raise AssertionError(f"{name}: an LSE is float32, got {actual.dtype}\n{context}")
    unit = EPS[torch.float32] * max(1.0, _magnitude(truth))
    bound = 4.0 * max_error(base, truth) + LSE_NOISE_ULPS * unit
    _check(name, actual, truth, base, bound, LSE_CAP_ULPS * unit, context)


def _magnitude(truth: torch.Tensor) -> float:
    finite = truth[torch.isfinite(truth)]
    return finite.abs().max().item() if finite.numel() else 0.0


def _check(
    name: str,
    actual: torch.Tensor,
    truth: torch.Tensor,
    base: torch.Tensor,
    bound: float,
    cap: float,
    context: object,
) -> None:
    if actual.shape != truth.shape:
        raise AssertionError(
            f"{name}: shape {tuple(actual.shape)}, expected {tuple(truth.shape)}\n{context}"
        )
    if actual.numel() == 0:
        return
    same_kind = torch.isfinite(actual) == torch.isfinite(truth)
    same_kind &= torch.isfinite(truth) | (torch.isnan(actual) == torch.isnan(truth))
    same_kind &= torch.isfinite(truth) | torch.isnan(truth) | (actual.double() == truth.double())
    if not same_kind.all():
        bad = ~same_kind
        where = _coordinate(bad.flatten().int().argmax().item(), bad.shape)
        raise AssertionError(
            f"{name}: {int(bad.sum())} of {bad.numel()} values differ in being finite, "
            f"the first at {where}: {_values(where, actual, truth, base)}\n{context}"
        )
    worst = max_error(actual, truth)
    if worst <= min(bound, cap):
        return
    error = (actual.double() - truth.double()).abs().nan_to_num(nan=0.0, posinf=0.0)
    where = _coordinate(int(error.argmax()), error.shape)
    raise AssertionError(
        f"{name}: max error {worst:.3e} is over the bound {bound:.3e} or the cap {cap:.3e} "
        f"(base {max_error(base, truth):.3e}, max|truth| {_magnitude(truth):.3e}); worst at "
        f"{where}: {_values(where, actual, truth, base)}; "
        f"{int((error > min(bound, cap)).sum())} of {error.numel()} values are over\n{context}"
    )


def _check_direction(
    name: str, actual: torch.Tensor, truth: torch.Tensor, bound: float, context: object
) -> None:
    a, t = actual.double().flatten(), truth.double().flatten()
    if a.numel() == 0 or not torch.isfinite(t).all() or t.norm() == 0:
        return
    # 1 - cos = |a/|a| - t/|t||^2 / 2, without the cancellation.
    difference = (a / a.norm().clamp_min(1e-300) - t / t.norm()).square().sum().item() / 2
    if not difference <= max(bound, 1e-14):
        raise AssertionError(
            f"{name}: 1 - cos is {difference:.3e}, over {bound:.3e} "
            f"(relative L2 error {math.sqrt(2 * difference):.3e})\n{context}"
        )


def _coordinate(flat_idx: int | float, shape: torch.Size) -> tuple[int, ...]:
    where: list[int] = []
    rest = int(flat_idx)
    for size in reversed(shape):
        where.append(rest % size)
        rest //= size
    return tuple(reversed(where))


def _values(where: tuple[int, ...], *tensors: torch.Tensor) -> str:
    names = ("actual", "truth", "base")
    return ", ".join(
        f"{name} {tensor[where].item():.8g}" for name, tensor in zip(names, tensors, strict=True)
    )


def assert_independent(masks: Sequence[torch.Tensor]) -> None:
    """Assert that masks of probability 1/2 agree by pairs in about half of their elements."""
    for one, other in itertools.combinations(masks, 2):
        assert 0.45 < (one == other).float().mean() < 0.55
