"""Makes seeded inputs as views of poisoned buffers.

Every tensor is a view into a larger flat buffer that is NaN everywhere else: before it, after it,
and in the gaps that its strides leave. A read outside the tensor meets a NaN and shows in the
result; a write outside it changes the bit pattern of the poison and shows in `check_guards`.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch

from .grids import Case

#: Elements of poison on each side: more than any tile reaches (256 rows of 256 elements).
GUARD = 1 << 16
#: Bit patterns of NaNs that no computation makes.
POISON_BITS = {
    torch.float16: (torch.int16, 0x7E5A),
    torch.bfloat16: (torch.int16, 0x7FDA),
    torch.float32: (torch.int32, 0x7FDADADA),
}
#: Inputs have a mean: with mean 0 a lost row or a doubled one hides in the noise.
MEAN = 0.5


@dataclass(frozen=True)
class Guarded:
    """A tensor and the poisoned buffer that it is a view of."""

    name: str
    tensor: torch.Tensor
    buffer: torch.Tensor

    def check_guards(self) -> None:
        """Assert that nothing outside the tensor was written."""
        int_dtype, bits = POISON_BITS[self.buffer.dtype]
        touched = self.buffer.view(int_dtype) != bits
        inside = torch.zeros_like(touched)
        view = self.tensor
        inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
        touched &= ~inside
        if touched.any():
            where = touched.nonzero().flatten()
            start = view.storage_offset()
            raise AssertionError(
                f"{self.name}: {where.numel()} elements outside the tensor were written, the first "
                f"{where[0].item() - start} and the last {where[-1].item() - start} elements from "
                f"its start (shape {tuple(view.shape)}, strides {view.stride()})"
            )


def seed_of(case: Case) -> int:
    """Return a seed that depends on the case only."""
    return zlib.crc32(case.name.encode())


def strides_for(case: Case, length: int, heads: int, dim: int) -> tuple[tuple[int, ...], int]:
    """Return (batch, row, head, element) strides and offset of a variant, in elements."""
    row_gap = {"row_gap": 64, "odd_row": 3, "wide_row": 1 << 20}.get(case.variant, 0)
    head_stride, row_stride = dim, heads * dim + row_gap
    span = length * row_stride
    if case.layout == "bhsd":
        row_stride = dim + row_gap
        head_stride = length * row_stride
        span = heads * head_stride
    batch_stride = span + (64 if case.variant == "batch_gap" else 0)
    if case.variant == "one_head":
        head_stride = 0  # k and v of every head are the same memory, as after expand
    return (batch_stride, row_stride, head_stride, 1), int(case.variant == "unaligned")


def poisoned(
    name: str,
    case: Case,
    *,
    length: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Guarded:
    """Make a tensor of NaN in the layout and variant of a case."""
    stride, offset = strides_for(case, length, heads, dim)
    shape = (case.batch, length, heads, dim)
    span = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1
    span = span if 0 not in shape else 0
    int_dtype, bits = POISON_BITS[dtype]
    buffer = torch.full(
        (GUARD + offset + span + GUARD,), bits, dtype=int_dtype, device=device
    ).view(dtype)
    tensor = buffer.as_strided(shape, stride, GUARD + offset)
    if case.layout == "bhsd":
        tensor = tensor.transpose(1, 2)
    return Guarded(name, tensor, buffer)


@dataclass(frozen=True)
class Inputs:
    """Tensors that a case passes to `attention`."""

    case: Case
    q: Guarded
    k: Guarded
    v: Guarded
    out: Guarded

    @property
    def tensors(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.q.tensor, self.k.tensor, self.v.tensor

    def check_guards(self) -> None:
        """Assert that nothing outside q, k, v and out was written."""
        for guarded in (self.q, self.k, self.v, self.out):
            guarded.check_guards()


def make_inputs(case: Case, device: torch.device | str = "cpu") -> Inputs:
    """Make inputs of a case and a poisoned result, the same on every device."""
    generator = torch.Generator().manual_seed(seed_of(case))
    made = {}
    for name, length, heads, dim in (
        ("q", case.len_q, case.heads_q, case.head_dim),
        ("k", case.len_kv, case.heads_kv, case.head_dim),
        ("v", case.len_kv, case.heads_kv, case.head_dim_v),
    ):
        guarded = poisoned(
            name, case, length=length, heads=heads, dim=dim, dtype=case.dtype, device=device
        )
        values = torch.randn(guarded.tensor.shape, generator=generator) + MEAN
        _fill(guarded.tensor, values, case)
        made[name] = guarded
    out_case = case if case.variant != "one_head" else case.with_variant("plain")
    out = poisoned(
        "out",
        out_case,
        length=case.len_q,
        heads=case.heads_q,
        dim=case.head_dim_v,
        dtype=case.result_dtype,
        device=device,
    )
    return Inputs(case=case, out=out, **made)


def _fill(tensor: torch.Tensor, values: torch.Tensor, case: Case) -> None:
    # copy_ refuses a tensor whose elements share memory: one head stands for all.
    if case.variant == "one_head" and tensor.numel():
        axis = 2 if case.layout == "bshd" else 1
        tensor, values = tensor.narrow(axis, 0, 1), values.narrow(axis, 0, 1)
    tensor.copy_(values)  # to the dtype and the device of the tensor


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return normal numbers, which depend on shape and seed only; drawn as fp32, then rounded."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def random_qkv(
    batch: int = 2,
    len_q: int = 8,
    len_kv: int = 8,
    heads_q: int = 2,
    heads_kv: int | None = None,
    head_dim: int = 16,
    head_dim_v: int | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make contiguous bshd inputs, for tests that are not about memory."""
    heads_kv = heads_q if heads_kv is None else heads_kv
    head_dim_v = head_dim if head_dim_v is None else head_dim_v
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) + MEAN).to(device=device, dtype=dtype)

    return (
        draw(batch, len_q, heads_q, head_dim),
        draw(batch, len_kv, heads_kv, head_dim),
        draw(batch, len_kv, heads_kv, head_dim_v),
    )


def call_arguments(case: Case) -> dict[str, object]:
    """Return the keyword arguments of a case, except out and return_lse."""
    return {
        "mask": case.mask,
        "scale": case.scale,
        "layout": case.layout,
        "out_dtype": case.out_dtype,
        "num_splits": case.num_splits,
    }
