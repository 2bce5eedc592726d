"""Tests score and mask functions on a GPU, against torch.vmap of the same functions in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import MaskMod
from tests.support.compare import rel_l2
from tests.support.functions import FUNCTIONS, attend_exactly

pytestmark = pytest.mark.usefixtures("with_grad")
FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
LIMIT = {FP16: 2e-3, BF16: 1.5e-2, FP32: 3e-5}


def drawn(dtype: torch.dtype, len_q: int = 75, len_kv: int = 90, dim: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    shapes = ((2, len_q, 4, dim), (2, len_kv, 2, dim), (2, len_kv, 2, dim))
    return [
        torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()
        for shape in shapes
    ]


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, dtype: torch.dtype) -> None:
    score_mod, mask_mod = FUNCTIONS[name]("cuda", 2, 4, 75, 90)
    qkv = drawn(dtype)
    given: dict[str, Any] = {} if score_mod is None else {"score_mod": score_mod}
    if mask_mod is not None:
        given["mask"] = MaskMod(mask_mod)
    out, lse = jitattn.attention(*qkv, return_lse=True, **given)
    found = torch.autograd.grad(out.float().sin().sum(), qkv)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    exact, exact_lse = attend_exactly(*leaves, score_mod, mask_mod)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves)
    assert rel_l2(out, exact) < LIMIT[dtype]
    finite = exact_lse.isfinite()
    assert torch.equal(finite, lse.isfinite())
    assert rel_l2(lse[finite], exact_lse[finite]) < LIMIT[dtype]
    for one, other in zip(found, wanted, strict=True):
        assert one.isfinite().all()
        assert rel_l2(one, other) < 3 * LIMIT[dtype]
