"""Validates the tensors and numbers of score modifications: dtypes, shapes, strides, addresses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.errors import InvalidInputError
from jitattn.values.given import real
from jitattn.values.tensors import CPU_DTYPES, DTYPES, address_of, index_address

if TYPE_CHECKING:
    from collections.abc import Collection, Sequence

    from torch import Tensor


class Sizes(NamedTuple):
    """The sizes that score tensors are checked against."""

    batch: int
    heads: int
    heads_kv: int
    len_q: int  #: the largest
    len_kv: int
    is_exact: bool  #: every sequence has these lengths


def matrix(
    name: str, values: Tensor, dtypes: Sequence[torch.dtype], sizes: Sizes
) -> tuple[int, tuple[int, int, int]]:
    """Check a [B or 1, Hq or 1, Lq or 1, Lkv] tensor; return its address and strides."""
    check_dtype(name, values, dtypes)
    shape = list(values.shape)
    wanted = [sizes.batch, sizes.heads, sizes.len_q, sizes.len_kv]
    fits = len(shape) == 4
    for axis, (got, size) in enumerate(zip(shape, wanted, strict=False)):
        large_enough = got >= size and axis >= 2 and not sizes.is_exact
        fits &= got == size or large_enough or (got == 1 and axis < 3)
    if not fits:
        raise InvalidInputError(
            f"{name} has shape {shape}: it must be [{wanted[0]} or 1, {wanted[1]} or 1, "
            f"{wanted[2]} or 1, {wanted[3]}]"
            + ("" if sizes.is_exact else ", or longer rows")
            + _FEWER_DIMENSIONS.get(len(shape), "")
        )
    if values.stride(3) != 1 and shape[3] > 1:
        raise InvalidInputError(
            f"{name} has strides {tuple(values.stride())}: the last one must be 1; call "
            ".contiguous() first"
        )
    steps = [values.stride(axis) if shape[axis] > 1 else 0 for axis in range(3)]
    address = (index_address if values.dtype is torch.bool else address_of)(name, values)
    return address, (steps[0], steps[1], steps[2])


#: Advice for a matrix without four dimensions.
_FEWER_DIMENSIONS: Final = {
    2: "; of [Lq, Lkv] pass x[None, None]",
    3: "; of [Hq, Lq, Lkv] pass x[None], of [B, Lq, Lkv] x[:, None]",
}


def padding(keep: Tensor, sizes: Sizes) -> tuple[int, int]:
    """Check a key padding mask [B, Lkv]; return its address and row stride."""
    name, shape = "KeyPadding(...)", list(keep.shape)
    check_dtype(name, keep, (torch.bool,))
    is_long = not sizes.is_exact and len(shape) == 2 and shape[1] >= sizes.len_kv
    if shape != [sizes.batch, sizes.len_kv] and not (is_long and shape[0] == sizes.batch):
        raise InvalidInputError(
            f"{name} has shape {shape}: it must be [{sizes.batch}, {sizes.len_kv}]"
            + ("" if sizes.is_exact else ", or longer rows")
            + ("; a mask of four dimensions is Dense(keep)" if len(shape) == 4 else "")
        )
    if shape[1] > 1 and keep.stride(1) != 1:
        raise InvalidInputError(
            f"{name} has strides {tuple(keep.stride())}: the last one must be 1; call "
            ".contiguous() first"
        )
    return index_address(name, keep), keep.stride(0) if shape[0] > 1 else 0


def vector(
    name: str,
    values: Tensor | None,
    shapes: Sequence[Sequence[int]],
    *,
    is_copied: bool = False,
) -> int:
    """Check a small table of one of these shapes; return its address, 0 for None.

    A size of -1 matches any odd size. Kernels read fp32 (`scores.in_fp32` converts) and contiguous
    rows; a caller that copies the table anyway passes `is_copied`.
    """
    if values is None:
        return 0
    check_dtype(name, values, DTYPES if values.is_cuda else CPU_DTYPES)
    got = list(values.shape)
    if not any(_fits(got, shape) for shape in shapes):
        allowed = " or ".join(str(list(shape)).replace("-1", "2 * reach + 1") for shape in shapes)
        raise InvalidInputError(f"{name} is {values.dtype} {got}: it must be {allowed}")
    if got[-1] > 1 and values.stride(-1) != 1 and not is_copied:
        raise InvalidInputError(f"{name} is not contiguous; call .contiguous() first")
    return address_of(name, values)


def _fits(got: Sequence[int], shape: Sequence[int]) -> bool:
    return len(got) == len(shape) and all(
        size % 2 == 1 if wanted == -1 else size == wanted
        for size, wanted in zip(got, shape, strict=True)
    )


def check_dtype(name: str, values: Tensor, dtypes: Collection[torch.dtype]) -> None:
    """Refuse a tensor of another dtype, naming the conversion."""
    if values.dtype in dtypes:
        return
    allowed = list(dict.fromkeys(dtypes))
    way_out = f"cast it with .to({allowed[-1]})"
    if allowed == [torch.bool]:
        way_out = "cast it with .bool(), True = attend"
        if values.dtype.is_floating_point:
            way_out = "what is added to scores is a bias: pass it as bias=, with 4 dimensions"
    elif torch.float32 in allowed:
        way_out = "cast it with .float()"
    raise InvalidInputError(
        f"{name} is {values.dtype} {list(values.shape)}: it must be "
        f"{' or '.join(map(str, allowed))}; {way_out}"
    )


def softcap_of(softcap: Any) -> float:  # noqa: ANN401 - checked here
    """Check a softcap and return it as a float."""
    number = real(softcap)
    if number is None or not 1e-6 <= number <= 1e30:
        raise InvalidInputError(
            f"softcap={softcap!r}: it must be a number from 1e-6 to 1e30; leave it out for none"
        )
    return number
