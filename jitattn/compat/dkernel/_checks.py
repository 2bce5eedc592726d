"""Validates the arguments of the modules' calls before any launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.compat._errors import CheckFailedError, check
from jitattn.errors import InvalidInputError
from jitattn.values.sequences import check_index

if TYPE_CHECKING:
    from torch import Tensor

_INDICES: Final = ("cu_seqlen_k", "cu_seqlen_q", "left_paddings", "seqlens")
#: The first of them, which go with packed tensors.
_NUM_PACKED: Final = 2


def check_shapes(q: Tensor, k: Tensor, v: Tensor, seq_dim: int | None) -> None:
    """Check that the shapes of q, k and v agree."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, torch.Tensor):
            raise InvalidInputError(f"{name} is a {type(x).__name__}: it must be a tensor")
    shape_q, shape_k, shape_v = q.shape, k.shape, v.shape
    dims = len(shape_q)
    head = 1 if dims == 3 or seq_dim == 2 else 2
    if dims not in (3, 4) or len(shape_k) != dims:
        rule = "they must be 4-D, or 3-D with cu_seqlen_k"
    elif shape_k[:-1] != shape_v[:-1]:
        rule = "k and v must have the same batch, length and heads"
    elif shape_q[-1] != shape_k[-1] or (dims == 4 and shape_q[0] != shape_k[0]):
        rule = "q and k must have the same batch and head dim"
    elif shape_q[head] % max(1, shape_k[head]):
        rule = (
            f"the heads of q, {shape_q[head]}, must be a multiple of those of k, "
            f"{shape_k[head]}; check seq_dim, which is {seq_dim}"
        )
    else:
        return
    raise CheckFailedError(
        f"q has shape {list(shape_q)}, k {list(shape_k)} and v {list(shape_v)}: {rule}"
    )


def check_indices(where: tuple[Tensor | None, ...], q: Tensor) -> None:
    """Check the index tensors of the sequences."""
    dims = q.dim()
    for idx, index in enumerate(where):
        if index is None:
            continue
        name, is_packed = _INDICES[idx], idx < _NUM_PACKED
        check_index(name, index, 1)
        if is_packed != (dims == 3):
            raise CheckFailedError(
                f"{name} is given and q is {dims}-D: cu_seqlen_k and cu_seqlen_q go with 3-D "
                "tensors, left_paddings and seqlens with 4-D ones"
            )
        entries = index.numel()
        if entries == 0 if is_packed else entries != q.shape[0]:
            count = "one more than there are sequences"
            if not is_packed:
                count = f"{q.shape[0]}, as q has rows"
            raise CheckFailedError(f"{name} has {entries} entries: it must have {count}")


def check_paddings(left: Tensor | None, seqlens: Tensor | None, len_kv: int) -> None:
    """Check paddings that are on the host, without synchronizing."""
    here = [x for x in (left, seqlens) if x is not None and not x.is_cuda]
    if not here or torch.compiler.is_compiling():
        return
    ends = here[0].long() + here[1] if len(here) == 2 else here[0]
    is_wrong = ends > len_kv
    for x in here:
        is_wrong = is_wrong | (x < 0)
    if bool(is_wrong.any()):
        idx = int(is_wrong.nonzero()[0])
        found = " and ".join(
            f"{name}[{idx}]={int(x[idx])}"
            for name, x in (("left_paddings", left), ("seqlens", seqlens))
            if x is not None and not x.is_cuda
        )
        raise CheckFailedError(f"{found}: it must be from 0 to the {len_kv} tokens of k, in all")


def check_lse(idx: int, out: Tensor, lse: Tensor, hdim: int) -> None:
    """Refuse an LSE that does not match its output."""
    if out.dim() != 4:
        return
    shape = [len(out), out.shape[hdim], out.shape[3 - hdim]]
    check(
        list(lse.shape) == shape,
        f"part {idx} has lse {list(lse.shape)} and out {list(out.shape)}: with hdim={hdim} the "
        f"lse must be {shape}; results of seq_dim=1 need hdim=2",
    )
