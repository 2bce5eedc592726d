"""Checks gradients of random calls against fp64 autograd of the reference."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from hypothesis import strategies as st

import jitattn
from jitattn.reference import Scores, attended, of_sequence, reference

from .compare import assert_attn_close
from .features import FeatureCase, feature_cases, further
from .layouts import build, rows_of

#: Features, as in `features.FEATURES`.
GRAD_FEATURES = (
    "full",
    "window sinks bias row",
    "causal bias32 relative",
    "causal softcap alibi padding",
    "local_stride sinks",
    "block_lists bias dense",
    "causal dropout relative",
    "full cosine padding",
)
GRAD_LAYOUTS = (("batched", "batched"), ("ragged", "ragged"))
#: Differentiable arguments of `attention` except q, k and v.
ADDED = ("bias", "relative_bias", "alibi_slopes", "sinks")


@dataclass(frozen=True)
class GradCase:
    """A call and its backward pass."""

    call: FeatureCase
    deterministic: bool
    has_d_lse: bool


@st.composite
def grad_cases(draw: st.DrawFn, most_rows: int = 300) -> GradCase:
    """Draw a case."""
    case = draw(feature_cases(most_rows, GRAD_FEATURES, GRAD_LAYOUTS))
    layout = replace(case.layout, gives_out=False, num_splits=None)
    # Deterministic kernels are separate ones: for some cases only.
    may = case.features in ("full", "window sinks bias row", "block_lists bias dense")
    return GradCase(replace(case, layout=layout), may and draw(st.booleans()), draw(st.booleans()))


def leaves(arguments: dict[str, Any], wide: bool) -> dict[str, torch.Tensor]:
    """Make the differentiable tensors of a call require grad; in fp64 if `wide`."""
    found = {}

    def leaf(tensor: torch.Tensor) -> torch.Tensor:
        made = tensor.detach()  # with its strides and its alignment
        return (made.double() if wide else made).requires_grad_()

    for name in ("q", "k", "v", *ADDED):
        if arguments.get(name) is not None:
            found[name] = arguments[name] = leaf(arguments[name])
    norm = arguments.get("qk_norm")
    if norm is not None and norm.head_scale is not None:
        found["head_scale"] = leaf(norm.head_scale)
        arguments["qk_norm"] = jitattn.L2Norm(norm.groups, found["head_scale"], norm.bound)
    return found


def check_gradients(case: GradCase, device: str) -> None:
    """Compare all gradients of a call with the truth."""
    arguments, _ = build(case.call.layout, device)
    arguments |= further(case.call, device, arguments)
    del arguments["num_splits"]
    if "qk_norm" in arguments:  # every row is normalised, and has a gradient
        arguments |= {name: arguments[name].nan_to_num(0.0) for name in "qk"}
    own = leaves(arguments, wide=False)
    with torch.enable_grad():
        out, lse = jitattn.attention(**arguments, return_lse=True, deterministic=case.deterministic)
    generator = torch.Generator().manual_seed(case.call.seed)
    d_out = torch.randn(out.shape, generator=generator).to(out.dtype)
    d_lse = torch.randn(lse.shape, generator=generator) * case.has_d_lse
    d_lse[torch.isneginf(lse.cpu())] = 0.0
    given = [(out, d_out.to(device)), (lse, d_lse.to(device))]
    given = [
        pair for pair in given if pair[0].requires_grad
    ]  # the LSE of a row without keys has none
    ends, starts = zip(*given, strict=True)
    results = torch.autograd.grad(ends, list(own.values()), starts, allow_unused=True)

    arguments, dense = build(case.call.layout, "cpu")
    arguments |= further(case.call, "cpu", arguments)
    del arguments["num_splits"]
    # A gradient of 0 * NaN would be NaN.
    arguments |= {name: arguments[name].nan_to_num(0.0) for name in "qkv"}
    if "bias" in arguments:
        arguments["bias"] = torch.where(arguments["bias"].isnan(), 0.0, arguments["bias"])
    base, sizes = _baseline(case, arguments, dense, d_out, d_lse)
    true = leaves(arguments, wide=True)
    with torch.enable_grad():
        truth, lse_truth = reference(**arguments, return_lse=True)
        loss = (truth * d_out.double()).sum()
        loss = loss + (lse_truth.masked_fill(torch.isneginf(lse_truth), 0.0) * d_lse).sum()
    wanted = torch.autograd.grad(loss, list(true.values()), allow_unused=True)
    for name, found, truth_of in zip(own, results, wanted, strict=True):
        result = found
        expected = torch.zeros_like(true[name]) if truth_of is None else truth_of
        if result is None:  # nothing depends on it
            result = torch.zeros_like(own[name])
        assert result.shape == own[name].shape, name
        assert_attn_close(
            f"d{name}",
            result.cpu(),
            expected,
            base[name].to(own[name].dtype).reshape(expected.shape),
            dtype=out.dtype,
            # Sums of dS cancel, so the tolerance is relative to the size of their terms.
            floor=sizes[name],
            context=f"{case}",
        )


def _baseline(
    case: GradCase,
    arguments: dict[str, Any],
    dense: list[tuple[torch.Tensor, ...]],
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Compute gradients in the numerics of the dtype: P, dS and out rounded, sums in fp32.

    Also returns a floor for each gradient, for sums that cancel: the largest sum of the terms'
    sizes; for dq and dk, the contribution of delta's rounding.
    """
    dtype = arguments["q"].dtype
    given = {name: arguments[name] for name in Scores._fields if name in arguments}
    parameters = {
        name: given[name].detach().float().requires_grad_() for name in ADDED if name in given
    }
    norm = given.get("qk_norm")
    if norm is not None and norm.head_scale is not None:
        parameters["head_scale"] = norm.head_scale.detach().float().requires_grad_()
        given["qk_norm"] = jitattn.L2Norm(norm.groups, parameters["head_scale"], norm.bound)
    changes = Scores(**{**given, **{n: p for n, p in parameters.items() if n in ADDED}})
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    total |= {name: torch.zeros_like(arguments[name], dtype=torch.float32) for name in "qkv"}
    sizes = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    least = dict.fromkeys("qkv", 0.25)
    for idx, (own_q, own_k, own_v) in enumerate(dense):
        if not len(own_q) or not len(own_k):
            continue
        rows = rows_of(arguments["q_seqs"], idx, len(own_q))
        keys = rows_of(arguments["kv_seqs"], idx, len(own_k))
        with torch.enable_grad():
            own_changes = changes.of_sequence(idx)
        own_d_lse = d_lse[:, rows] if d_lse.dim() == 2 else d_lse[idx][:, rows]
        found = _sequence_baseline(
            (own_q, own_k, own_v),
            _take(case, d_out, idx, rows),
            own_d_lse[None],
            of_sequence(arguments["mask"], idx),
            own_changes,
            parameters,
            arguments.get("scale"),
            dtype,
        )
        for name, where in (("q", rows), ("k", keys), ("v", keys)):
            _take(case, total[name], idx, where).copy_(found[name][0])
            least[name] = max(least[name], found.get(f"size of {name}", 0.0))
        for name in parameters:
            if found[name] is not None:
                total[name] += found[name]
                sizes[name] += found.get(f"size of {name}", 0.0)
    largest = {name: size.max().item() for name, size in sizes.items() if size.numel()}
    return total, {name: max(1.0, largest.get(name, 0.0)) for name in sizes} | least


def _take(case: GradCase, tensor: torch.Tensor, idx: int, rows: slice) -> torch.Tensor:
    """Return a view [L, H, D] of a sequence's rows."""
    if tensor.dim() == 3:
        return tensor[rows]
    own = tensor[idx].transpose(0, 1) if case.call.layout.layout == "bhsd" else tensor[idx]
    return own[rows]


def _sequence_baseline(
    qkv: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    d_out: torch.Tensor,
    d_lse: torch.Tensor,
    mask: Any,
    changes: Scores,
    parameters: dict[str, torch.Tensor],
    scale: float | None,
    dtype: torch.dtype,
) -> dict[str, Any]:
    def rounded(x: torch.Tensor) -> torch.Tensor:
        return x.to(dtype).float()

    q, k, v = (x.float().transpose(0, 1)[None] for x in qkv)  # [1, H, L, D]
    d_o = d_out.float().transpose(0, 1)[None]
    group = q.shape[1] // k.shape[1]
    if scale is None:
        scale = q.shape[3] ** -0.5 if changes.qk_norm is None else 8.0
    with torch.enable_grad():
        raw_q, raw_k = q.clone().requires_grad_(), k.clone().requires_grad_()
        units = changes.unit(raw_q, raw_k)
    q, k = (rounded(x.detach()) for x in units)
    wide_k, wide_v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    attend = attended(mask, 1, q.shape[1], k.shape[1], q.shape[2], k.shape[2], device=q.device)
    with torch.enable_grad():
        raw = (torch.matmul(q, wide_k.transpose(2, 3)) * scale).requires_grad_()
        scores = changes.apply(raw)
    seen = scores.detach().masked_fill(~attend, float("-inf"))
    lse = torch.logsumexp(seen, 3, keepdim=True)
    blind = torch.isneginf(lse)
    whole = lse
    if changes.sinks is not None:
        sinks = changes.sinks.detach().view(1, -1, 1, 1)
        whole = torch.logaddexp(lse, sinks.expand_as(lse))
    p = torch.exp(seen - whole).masked_fill(blind, 0.0)
    kept = changes.drop(torch.ones_like(p))
    # Weights are rounded relative to the maximum, or to the bound under a fixed shift.
    highest = seen.amax(3, keepdim=True)
    if changes.qk_norm is not None:
        highest = torch.full_like(highest, abs(scale) * changes.qk_norm.groups)
    unit = torch.exp(seen - highest).masked_fill(blind, 0.0)
    share = torch.exp(highest - whole).masked_fill(blind, 0.0)
    out = rounded(torch.matmul(rounded(unit * kept), wide_v) * share)
    delta = (out * d_o).sum(3, keepdim=True)
    d_p = torch.matmul(d_o, wide_v.transpose(2, 3)) * kept
    rest = torch.exp(lse - whole).masked_fill(blind, 1.0)
    d_s = p * (d_p - delta + d_lse[..., None] / rest)
    added = [name for name in parameters if name in ADDED]
    inputs = [raw, *(parameters[name] for name in added)]
    graph = torch.autograd.grad(scores, inputs, d_s, allow_unused=True, retain_graph=True)
    found: dict[str, Any] = dict(zip(added, graph[1:], strict=True))
    # delta is a sum of rounded products, with the same error for all keys of a row. (With a single
    # visible key, dS consists of that error only.)
    rounding = (out * d_o).square().sum(3, keepdim=True).sqrt()
    noise = p * rounding
    # No parameter enters scores with both signs.
    terms = torch.autograd.grad(scores, inputs, d_s.abs() + noise, allow_unused=True)[1:]
    for name, size in zip(added, terms, strict=True):
        if size is not None:
            found[f"size of {name}"] = size.abs()
    if "sinks" in parameters:
        weight = torch.exp(sinks - whole).masked_fill(blind, 0.0)
        found["sinks"] = -(weight * delta).sum((0, 2, 3))
        found["size of sinks"] = (weight * (delta.abs() + rounding)).sum((0, 2, 3))
    d_raw = rounded(graph[0])
    d_q = rounded(torch.matmul(d_raw, wide_k) * scale)

    def grouped(x: torch.Tensor) -> torch.Tensor:
        return rounded(x.unflatten(1, (-1, group)).sum(2))

    d_k = grouped(torch.matmul(d_raw.transpose(2, 3), q) * scale)
    d_v = grouped(torch.matmul(rounded(p * kept).transpose(2, 3), d_o))
    noise_q = torch.matmul(noise, wide_k) * scale
    of_keys = torch.matmul(noise.square().transpose(2, 3), q.square()).sqrt() * abs(scale)
    noise_k = of_keys.unflatten(1, (-1, group)).square().sum(2).sqrt()
    ends = [raw_q, raw_k, *([parameters["head_scale"]] if "head_scale" in parameters else [])]
    if units[0] is raw_q:
        through = [d_q, d_k]
    else:
        back = partial(torch.autograd.grad, units, ends, allow_unused=True, retain_graph=True)
        through = list(back((d_q, d_k)))
        noise_q, noise_k = back((noise_q, noise_k))[:2]
    for name, size in (("q", noise_q), ("k", noise_k)):
        found[f"size of {name}"] = size.abs().max().item() if size.numel() else 0.0
    if "head_scale" in parameters:
        found["head_scale"] = through[2]
        # Rounding errors of slices have both signs and add up like a random walk.
        slices = [x.unflatten(3, (changes.qk_norm.groups, -1)) for x in (raw_q.detach(), d_q)]
        along = (torch.nn.functional.normalize(slices[0], dim=4) * slices[1]).sum(4)
        found["size of head_scale"] = 2 * along.square().sum((0, 2, 3)).sqrt()
    for name, gradient in (("q", through[0]), ("k", through[1]), ("v", d_v)):
        found[name] = gradient.transpose(1, 2)
    return found
