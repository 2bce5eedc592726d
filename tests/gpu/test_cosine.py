"""Tests cosine attention on a GPU: norms, fixed shift, and row maxima without a bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import jitattn
from tests.support.capture import capture
from tests.support.compare import rel_l2

TOLERANCE = {torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2, torch.float32: 3e-6}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [16, 64, 80, 128])
@pytest.mark.parametrize("length", [1, 200])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"scale": 10.0, "groups": 2},
        {"scale": -3.0, "groups": 8},
        {"scale": 100.0},
        {"scale": 1.0, "head_scale": True},
        {"scale": 1.0, "head_scale": True, "bound": 20.0},
    ],
    ids=str,
)
def test_against_the_reference(
    dtype: torch.dtype, dim: int, length: int, given: dict[str, Any]
) -> None:
    given = dict(given)
    scale = given.pop("scale", None)
    if given.get("head_scale"):
        given["head_scale"] = 2 + 10 * torch.rand(4, device="cuda")
    norm = jitattn.L2Norm(**given)
    host = jitattn.L2Norm(norm.groups, None if norm.head_scale is None else norm.head_scale.cpu())
    # Far from unit length, and in a layout that the kernel has to step through.
    q = 50 * torch.randn(2, 4, length, dim, device="cuda").to(dtype)
    k, v = (torch.randn(2, 2, 300, dim + 8, device="cuda").to(dtype)[..., :dim] for _ in range(2))
    for mask in (jitattn.Full(), jitattn.Causal()):
        same = {"mask": mask, "scale": scale, "layout": "bhsd"}
        out = jitattn.attention(q, k, v, qk_norm=norm, **same)
        truth = jitattn.reference.reference(q.cpu(), k.cpu(), v.cpu(), qk_norm=host, **same)
        # Vectors rounded to 16 bits err in proportion to the scale of the scores.
        widened = max(1.0, 0.1 * (scale or 8.0) * (12 if norm.head_scale is not None else 1))
        assert rel_l2(out.cpu(), truth) < TOLERANCE[dtype] * widened


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_zero_vectors(dtype: torch.dtype) -> None:
    x = torch.zeros(1, 100, 2, 64, device="cuda", dtype=dtype)
    out, lse = jitattn.attention(x, x, x + 1, qk_norm=jitattn.L2Norm(), return_lse=True)
    assert torch.equal(out, x + 1)
    torch.testing.assert_close(lse, torch.full_like(lse, 100.0).log())


def test_normalised_in_the_core_and_before() -> None:
    q, k, v = torch.randn(3, 2, 100, 4, 64, device="cuda", dtype=torch.bfloat16)
    inside = jitattn.attention(q, k, v, qk_norm=jitattn.L2Norm())
    units = jitattn.l2norm(q), jitattn.l2norm(k)
    outside = jitattn.attention(*units, v, qk_norm=jitattn.L2Norm(normalize=False))
    assert rel_l2(inside, outside) < 2e-3


@pytest.mark.real_gpu
def test_a_warm_call_compiles_nothing() -> None:
    from jitattn.jit import build

    q, k, v = torch.randn(3, 2, 100, 4, 64, device="cuda", dtype=torch.bfloat16)
    jitattn.warmup(q, k, v, qk_norm=jitattn.L2Norm())
    compiled = build.stats().compiled
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, qk_norm=jitattn.L2Norm())
    graph.replay()
    eager = jitattn.attention(q, k, v, qk_norm=jitattn.L2Norm())
    assert torch.equal(out, eager)
    assert build.stats().compiled == compiled


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("dim", "groups"), [(64, 1), (20, 5), (250, 1), (256, 32), (7, 7)])
def test_units_are_right_to_a_rounding(dtype: torch.dtype, dim: int, groups: int) -> None:
    from jitattn.api.attention import bind
    from jitattn.run.normalize import normalized

    x = torch.randn(2, 33, 3, dim, device="cuda").to(dtype)
    scale = torch.rand(3, device="cuda")
    norm = jitattn.L2Norm(groups, scale)
    _, call = bind(x, x, x, {"qk_norm": norm})
    q, k = normalized(x, x, norm, call)
    exact = jitattn.l2norm(x.double(), groups)
    # A 16-bit result is rounded once; in fp32, sum, root and quotient are rounded as well.
    given = {
        "rtol": torch.finfo(dtype).eps * (3 if dtype is torch.float32 else 0.51),
        "atol": torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps,
    }
    torch.testing.assert_close(k.double(), exact, **given)
    torch.testing.assert_close(q.double(), exact * scale.double()[:, None], **given)
