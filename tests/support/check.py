"""Runs one case of a grid through a path and checks the result."""

from __future__ import annotations

from collections.abc import Callable

import torch

from jitattn.cpu.attention import run_cpu
from jitattn.reference import reference
from jitattn.request.layouts import parse
from jitattn.request.problem import Call
from jitattn.request.scores import NO_CHANGES

from .baseline import baseline
from .compare import assert_attn_close, assert_lse_close
from .grids import Case
from .inputs import call_arguments, make_inputs, seed_of

Path = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def check_case(case: Case, path: Path, device: torch.device | str = "cpu") -> None:
    """Compare out and LSE of a case with the truth, and check that nothing else was written.

    `path` takes the arguments of `attention` and returns (out, lse).
    """
    inputs = make_inputs(case, device)
    q, k, v = inputs.tensors
    arguments = call_arguments(case)
    out, lse = path(q, k, v, **arguments, out=inputs.out.tensor, return_lse=True)
    same = {"mask": case.mask, "scale": case.scale, "layout": case.layout}
    truth, lse_truth = reference(q, k, v, **same, return_lse=True)
    base, lse_base = baseline(q, k, v, **same, out_dtype=case.out_dtype)
    context = f"case {case.name}, seed {seed_of(case)}"
    assert out is inputs.out.tensor, context
    assert_attn_close(
        "out", out, truth, base, dtype=case.dtype, cap_scale=case.cap_scale, context=context
    )
    assert_lse_close("lse", lse, lse_truth, lse_base, context=context)
    inputs.check_guards()


def cpu_path(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    layout: str = "bshd",
    out: torch.Tensor | None = None,
    **arguments: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run validation and the CPU path without `attention`; return (out, lse)."""
    given = {**dict.fromkeys(Call._fields), "scores": NO_CHANGES}
    call = Call(**{**given, **arguments, "layout": layout, "out": out, "return_lse": True})
    _, runtime = parse(q, k, v, call)
    return run_cpu(q, k, v, runtime, call)
