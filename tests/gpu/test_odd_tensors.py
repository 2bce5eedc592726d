"""Tests placeholders, 16-bit tables, and torch's global switches on a GPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import jitattn
from jitattn import Causal, L2Norm
from jitattn.plan import backward
from jitattn.request import request
from tests.support.compare import rel_l2
from tests.support.entries import ENTRIES, facts, lose_memory, real_tensors
from tests.support.inputs import drawn
from tests.support.operators import Operators

B, LQ, LKV, H, D = 2, 20, 24, 2, 16

pytestmark = pytest.mark.usefixtures("with_grad")


def made(*shape: int, seed: int = 1, dtype: torch.dtype = torch.float16) -> Tensor:
    return drawn(*shape, seed=seed, dtype=dtype).cuda()


def inputs() -> list[Tensor]:
    return [made(B, length, H, D, seed=length + idx) for idx, length in enumerate((LQ, LKV, LKV))]


@pytest.mark.parametrize(
    ("name", "word"), [(name, word) for name in ENTRIES for word in ENTRIES[name][1]]
)
@pytest.mark.parametrize("is_view", [False, True], ids=["whole", "view"])
def test_memory_that_is_gone_is_refused(name: str, word: str, is_view: bool) -> None:
    tensors = real_tensors(name, "cuda")
    lose_memory(tensors, word, is_view=is_view)
    with pytest.raises(jitattn.InvalidInputError, match="but no memory: its storage was resized"):
        ENTRIES[name][0](**tensors)


def test_memory_that_is_gone_at_backward_is_refused() -> None:
    q, k, v = (x.requires_grad_() for x in inputs())
    out, lse = jitattn.attention(q, k, v, return_lse=True)
    for results in ((out,), (lse,)):
        gradient = torch.ones_like(results[0])
        gradient.untyped_storage().resize_(0)
        with pytest.raises(jitattn.InvalidInputError, match=r"the gradient of .* but no memory"):
            torch.autograd.grad(results, (q, k, v), (gradient,), retain_graph=True)
    k.data.untyped_storage().resize_(0)
    with pytest.raises(jitattn.InvalidInputError, match=r"k has shape .* but no memory"):
        out.sum().backward()


@pytest.mark.parametrize("name", ENTRIES)
@pytest.mark.parametrize("in_mode", [True, False], ids=["in_mode", "out_of_mode"])
def test_fake_tensors(name: str, in_mode: bool) -> None:
    real = real_tensors(name, "cuda")
    mode = FakeTensorMode()
    fake = {word: mode.from_tensor(x) for word, x in real.items()}
    if in_mode:
        with mode:
            found = ENTRIES[name][0](**fake)
    else:
        found = ENTRIES[name][0](**fake)
    wanted = ENTRIES[name][0](**real)
    assert facts(found) == facts(wanted)


@pytest.mark.real_gpu
def test_the_context_survives() -> None:
    with FakeTensorMode():
        fake = torch.empty(1, 20, 2, 64, dtype=torch.float16, device="cuda", requires_grad=True)
        jitattn.attention(fake, fake, fake).sum().backward()
        assert fake.grad is not None
    torch.cuda.synchronize()
    q, k, v = inputs()
    assert torch.isfinite(jitattn.attention(q, k, v)).all()


TABLES = {
    "sinks": (H,),
    "alibi_slopes": (B, H),
    "relative_bias": (H, 7),
    "head_scale": (H,),
}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("by_operator", [False, True], ids=["usual", "operator"])
def test_tables_in_the_dtype_of_the_model(name: str, dtype: torch.dtype, by_operator: bool) -> None:
    q, k, v = (x.to(dtype) for x in inputs())
    table = made(*TABLES[name], dtype=dtype).abs() + 0.1

    def attend(table: Tensor) -> Tensor:
        more = {"qk_norm": L2Norm(head_scale=table)} if name == "head_scale" else {name: table}
        result: Tensor = jitattn.attention(q, k, v, mask=Causal(), **more)
        return result

    def results(table: Tensor) -> tuple[Tensor, Tensor]:
        leaf = table.detach().requires_grad_()
        if by_operator:  # a dispatch mode makes it go through the operators
            with Operators():
                out = attend(leaf)
        else:
            out = attend(leaf)
        (gradient,) = torch.autograd.grad(out.float().sin().sum(), leaf)
        assert gradient.dtype == leaf.dtype
        return out, gradient

    (out, gradient), (wanted, wide) = results(table), results(table.float())
    assert torch.equal(out, wanted)
    assert rel_l2(gradient, wide) < 8e-3


@pytest.mark.parametrize("warn_only", [False, True])
def test_torchs_switch_for_determinism(warn_only: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    main_spec = backward.main_spec

    def noted(*args: Any, deterministic: bool, **rest: Any) -> Any:
        asked.append(deterministic)
        return main_spec(*args, deterministic=deterministic, **rest)

    monkeypatch.setattr(request, "_requests", {})
    monkeypatch.setattr(backward, "main_spec", noted)
    q, k, v = (x.requires_grad_() for x in inputs())

    def switch(is_on: bool) -> None:
        torch.use_deterministic_algorithms(is_on, warn_only=warn_only)

    try:
        for forward, later in ((True, True), (True, False), (False, True), (False, False)):
            request.forget_requests()  # a plan is asked for once
            switch(forward)
            out = jitattn.attention(q, k, v)
            switch(later)
            out.sum().backward()
        with Operators():
            request.forget_requests()
            switch(True)
            jitattn.attention(q, k, v).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    assert asked == [True, True, True, False, True]


@pytest.mark.real_gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_autocast_casts_inputs_and_nothing_inside(dtype: torch.dtype) -> None:
    tables = {"bias": (1, H, LQ, LKV), "alibi_slopes": (H,), "relative_bias": (H, 7), "sinks": (H,)}

    def results(*, autocast: bool) -> list[Tensor]:
        own = [x.to(dtype).requires_grad_() for x in inputs()]
        more = {name: made(*shape, dtype=dtype).requires_grad_() for name, shape in tables.items()}
        scale = made(H, dtype=dtype).requires_grad_()

        def cast(x: Tensor) -> Tensor:  # anew for each call, as autocast does
            return x if autocast else x.bfloat16()

        with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
            terms = {**more, "bias": cast(more["bias"])}
            out = jitattn.attention(*map(cast, own), **terms)
            unit = jitattn.attention(*map(cast, own), qk_norm=L2Norm(head_scale=scale))
            merged, _ = jitattn.merge([out, unit], [own[0][..., 0].transpose(1, 2).float()] * 2)
            every = [*own, *more.values(), scale]
            ends = [out.sum(), unit.sum(), merged.sum(), jitattn.l2norm(own[0]).sum()]
            gradients = torch.autograd.grad(ends, every)
        return [out, unit, merged, *gradients]

    for one, other in zip(results(autocast=True), results(autocast=False), strict=True):
        assert one.dtype == other.dtype
        assert rel_l2(one, other) < 1e-5


@pytest.mark.parametrize("names", ["q", "k", "v", "qkv"])
def test_columns_apart_are_copied(names: str) -> None:
    """Kernels read rows whose last stride is 1; others are copied, and gradients go back."""
    plain = dict(zip("qkv", inputs(), strict=True))
    apart = {
        name: x.transpose(-2, -1).contiguous().transpose(-2, -1) if name in names else x.clone()
        for name, x in plain.items()
    }
    assert all(apart[name].stride(-1) != 1 for name in names)
    results = []
    for tensors in (plain, apart):
        given = [x.requires_grad_() for x in tensors.values()]
        out = jitattn.attention(*given, mask=Causal(), deterministic=True)
        results.append((out, *torch.autograd.grad(out.float().square().sum(), given)))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_a_dense_mask_of_two_dimensions() -> None:
    keep = torch.rand(LQ, LKV, generator=torch.Generator().manual_seed(3)).cuda() > 0.4
    whole = keep.expand(B, H, LQ, LKV).contiguous()
    out = jitattn.attention(*inputs(), mask=jitattn.Dense(keep))
    assert torch.equal(out, jitattn.attention(*inputs(), mask=jitattn.Dense(whole)))
