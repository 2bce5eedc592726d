"""Checks calls that take the wgmma kernels of sm_90."""

from __future__ import annotations

from typing import Any

import torch

import jitattn
from tests.support.compare import rel_l2

FP16, BF16 = torch.float16, torch.bfloat16
LIMIT = {FP16: 1e-3, BF16: 6e-3}


def drawn(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Return normal random numbers on the GPU."""
    return torch.randn(*shape, device="cuda", dtype=dtype)


def check(q: Any, k: Any, v: Any, **given: Any) -> torch.Tensor:
    """The kernel is a wgmma kernel; its result is the reference's, and twice the same bits."""
    assert jitattn.explain(q, k, v, **given).kernel["family"] == "fwd_sm90"
    out, lse = jitattn.attention(q, k, v, return_lse=True, **given)
    exact = {name: given[name] for name in given.keys() - {"num_splits", "out_dtype"}}
    truth, truth_lse = jitattn.reference.reference(q, k, v, return_lse=True, **exact)
    assert rel_l2(out, truth) < LIMIT[q.dtype]
    finite = truth_lse.isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse - truth_lse)[finite].abs().max() < 1e-3 if finite.any() else True
    again, lse_again = jitattn.attention(q, k, v, return_lse=True, **given)
    assert torch.equal(out, again)
    assert torch.equal(lse, lse_again)
    return out
