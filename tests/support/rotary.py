"""Checks random rotary embeddings against fp64, rounded once: values and gradients."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import jitattn
from jitattn import Rotary

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class RotaryCase:
    """A call of `apply_rotary`."""

    dtype: torch.dtype
    table_dtype: torch.dtype
    lengths: tuple[int, ...]  #: lengths of the sequences; one for all unless ragged
    heads: int
    head_dim: int
    half: int
    interleaved: bool
    offset: str  #: "int", "each", "beyond" the tables, or "before" them
    is_ragged: bool
    around: int  #: ragged: rows before the first and behind the last sequence
    form: str  #: memory layout of x
    inplace: bool
    index_dtype: torch.dtype
    seed: int


@st.composite
def rotary_cases(draw: st.DrawFn) -> RotaryCase:
    """Draw a valid case."""
    is_ragged = draw(st.booleans())
    length = st.integers(0, 40)
    lengths = tuple(draw(length) for _ in range(draw(st.integers(1, 4))))
    head_dim = draw(st.sampled_from((2, 16, 20, 64, 80, 128)))
    halves = [half for half in (1, 8, 16, head_dim // 4, head_dim // 2) if 0 < 2 * half <= head_dim]
    return RotaryCase(
        dtype=draw(st.sampled_from(DTYPES)),
        table_dtype=draw(st.sampled_from(DTYPES)),
        lengths=lengths if is_ragged else lengths[:1] * len(lengths),
        heads=draw(st.sampled_from((1, 3, 8))),
        head_dim=head_dim,
        half=draw(st.sampled_from(halves)),
        interleaved=draw(st.booleans()),
        offset=draw(st.sampled_from(("int", "each", "beyond", "before"))),
        is_ragged=is_ragged,
        around=draw(st.sampled_from((0, 2))),
        form=draw(st.sampled_from(("plain", "odd", "packed", "bhsd", "columns"))),
        inplace=draw(st.booleans()),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        seed=draw(st.integers(0, 2**16)),
    )


def lay(values: Tensor, form: str, device: str) -> Tensor:
    """Copy values to a memory layout whose gaps are NaN."""
    *outer, heads, dim = values.shape
    room = torch.full((*outer, heads, 3 * dim + 8), float("nan"), dtype=values.dtype)
    if form == "plain":
        x = torch.empty_like(values)
    elif form == "odd":
        x = room[..., 1 : 1 + dim]
    elif form == "packed":
        x = room[..., dim : 2 * dim]
    elif form == "bhsd":
        x = torch.empty(heads, *outer, dim, dtype=values.dtype).movedim(0, -2)
    else:
        x = torch.empty(dim, *outer, heads, dtype=values.dtype).movedim(0, -1)
    if device != "cpu":
        whole = x._base if x._base is not None else x
        x = whole.to(device).as_strided(x.shape, x.stride(), x.storage_offset())
    return x.copy_(values)


def truth_of(x: Tensor, rotary: Rotary, position: list[list[int]], sign: float = 1.0) -> Tensor:
    """Rotate x [B, L, H, D] in fp64; rows at position None stay."""
    result = x.double().clone()
    half, rows = rotary.cos.shape[1], rotary.cos.shape[0]
    cos, sin = rotary.cos.double(), sign * rotary.sin.double()
    for b, own in enumerate(position):
        for t, place in enumerate(own):
            if place is None or not 0 <= place < rows:
                continue
            a = slice(0, 2 * half, 2) if rotary.interleaved else slice(0, half)
            c = slice(1, 2 * half, 2) if rotary.interleaved else slice(half, 2 * half)
            first, second = x[b, t, :, a].double(), x[b, t, :, c].double()
            result[b, t, :, a] = first * cos[place] - second * sin[place]
            result[b, t, :, c] = second * cos[place] + first * sin[place]
    return result


def check_rounded_once(got: Tensor, truth: Tensor, turned: Tensor) -> None:
    """Assert that `got` is `truth` to fp32 accuracy, rounded; other columns are bit-equal to x."""
    assert got.shape == truth.shape
    if not got.numel():
        return
    assert got.isfinite().all()
    assert torch.equal(got[~turned].double(), truth[~turned])
    info = torch.finfo(got.dtype)
    ulp = (truth.abs().clamp(min=info.smallest_normal).log2().floor()).exp2() * info.eps
    half = 0.0 if got.dtype is torch.float32 else 0.5
    error = (got.double() - truth).abs()
    assert (error <= half * ulp + 2.0**-22 * truth.abs().amax()).all()


def check_rotary(case: RotaryCase, device: str) -> None:
    """Check values, gradients, and that nothing else changes."""
    chance = random.Random(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    batch, longest = len(case.lengths), max(case.lengths)
    table_rows = longest + 7
    angle = torch.rand(table_rows, case.half, generator=generator) * 7
    host = Rotary(
        angle.cos().to(case.table_dtype),
        angle.sin().to(case.table_dtype),
        interleaved=case.interleaved,
    )
    rotary = Rotary(host.cos.to(device), host.sin.to(device), interleaved=case.interleaved)
    far = {"int": 7, "each": 7, "beyond": table_rows + 20, "before": 7}[case.offset]
    near = -5 if case.offset == "before" else 0
    offsets = [chance.randint(near, far) for _ in range(batch)]
    offset: Tensor | int = torch.tensor(offsets, dtype=case.index_dtype, device=device)
    if case.offset == "int":
        offsets = [offsets[0]] * batch
        offset = offsets[0]
    position: list[list[int | None]] = [
        [first + t for t in range(length)]
        for first, length in zip(offsets, case.lengths, strict=True)
    ]
    shape = (batch, longest, case.heads, case.head_dim)
    cu_seqlens = None
    if case.is_ragged:
        outside: list[int | None] = [None] * case.around
        position = [sum(position, outside) + outside]
        starts = [case.around + sum(case.lengths[:b]) for b in range(batch + 1)]
        cu_seqlens = torch.tensor(starts, dtype=case.index_dtype, device=device)
        shape = (1, len(position[0]), case.heads, case.head_dim)
    values, d_values = (torch.randn(shape, generator=generator).to(case.dtype) for _ in range(2))
    truth, d_truth = truth_of(values, host, position), truth_of(d_values, host, position, -1.0)
    exists = torch.tensor(
        [[p is not None and 0 <= p < table_rows for p in own] for own in position],
        dtype=torch.bool,
    ).reshape(shape[:2])
    turned = exists[..., None, None] & (torch.arange(case.head_dim) < 2 * case.half)
    turned = turned.expand(shape)
    if case.is_ragged:
        values, d_values = values[0], d_values[0]
    x = lay(values, case.form, device).requires_grad_()
    given = {"offset": offset, "cu_seqlens": cu_seqlens, "inplace": case.inplace}
    with torch.enable_grad():
        if not case.is_ragged and case.form == "bhsd":
            out = jitattn.apply_rotary(x.transpose(1, 2), rotary, layout="bhsd", **given)
            out = out.transpose(1, 2)
        else:
            out = jitattn.apply_rotary(x, rotary, **given)
        d_out = lay(d_values, "odd", device)
        out.backward(d_out)
    assert (out.data_ptr() == x.data_ptr()) is case.inplace or not x.numel()
    assert torch.equal(x.detach().cpu(), (out.detach().cpu() if case.inplace else values))
    assert torch.equal(d_out.cpu(), d_values)
    assert x.grad is not None
    check_rounded_once(out.detach().cpu().reshape(shape), truth, turned)
    check_rounded_once(x.grad.cpu().reshape(shape), d_truth, turned)
    whole = x.detach()._base
    if case.form in ("odd", "packed") and whole is not None:  # gaps between rows
        assert whole.isnan().sum() == whole.numel() - x.numel()
