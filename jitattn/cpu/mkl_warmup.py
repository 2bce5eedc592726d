"""Warms up MKL vector functions (exp, log …), so that their first results are accurate.

MKL selects the code of a vector function on its first call. If that call runs on several threads,
one of them can use a low-accuracy kernel (relative error 1.5e-4 in exp, seen in 1 of 100 new
processes on 2 cores): https://github.com/pytorch/pytorch/issues/188792, oneMKL 2024.2. A first call
on one element runs on one thread and avoids that.
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@functools.cache
def mkl_warmup() -> None:
    """Call each function of the CPU path once, on one real element of each dtype."""
    with torch.no_grad(), unset_fake_temporarily():
        for dtype in (torch.float32, torch.float64):
            one = torch.ones(1, dtype=dtype, device="cpu")
            for function in (torch.exp, torch.exp2, torch.log, torch.tanh, torch.sqrt, torch.rsqrt):
                function(one)
