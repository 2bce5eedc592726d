"""A guard against MKL's first call: exp, log and the like are right from the first one on.

MKL picks the code of a vector function on its first call. When that call runs on several threads,
one of them can take a low-accuracy kernel for its share (relative error 1.5e-4 in exp, seen in 1 of
100 new processes on 2 cores): https://github.com/pytorch/pytorch/issues/188792, oneMKL 2024.2. A
call on one element runs on one thread, and settles it.
"""

from __future__ import annotations

import functools

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily


@functools.cache
def settle_vml() -> None:
    """Call each function that the CPU path uses once, on one real element of each dtype."""
    with torch.no_grad(), unset_fake_temporarily():
        for dtype in (torch.float32, torch.float64):
            one = torch.ones(1, dtype=dtype, device="cpu")
            for function in (torch.exp, torch.exp2, torch.log, torch.tanh, torch.sqrt, torch.rsqrt):
                function(one)
