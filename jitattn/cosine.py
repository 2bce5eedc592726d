"""Cosine attention: q and k of length 1, so that scores are bounded by their scale.

Henry et al., "Query-Key Normalization for Transformers", arXiv:2010.04245. A bound that is known
stands for the running maximum of every row, which the kernel then need not keep; where it is not
known, or too large, the maximum is kept. The result is the softmax in both cases.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

import torch

from jitattn.autocast import outside_autocast
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.given import integer, real
from jitattn.jit.device import device
from jitattn.jit.enums import Access
from jitattn.jit.spec import NormGradSpec, NormSpec
from jitattn.loaded import loaded_kernel, on_gpu
from jitattn.score_checks import vector
from jitattn.sequences import Paged, Ragged
from jitattn.tensors import DTYPES, MAX_HEAD_DIM, index_address, readable

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.problem import Call

#: Two inner sizes, and strides.
_Side: TypeAlias = tuple[int, int, tuple[int, int, int]]
#: Scale of scores if none is given.
DEFAULT_SCALE: Final = 8.0
_EPSILON: Final = 1e-12
#: Bounds, in powers of two: weights and their sums stay within the range of their dtype.
_WIDEST_FP16: Final = 14.5
_WIDEST: Final = 60.0
_LARGEST_FP16: Final = 14.0


@dataclass(frozen=True, slots=True, eq=False)
class L2Norm:
    """Cosine attention: scores are scale * head_scale * cos(q, k).

    Can be copied and pickled; equal to itself alone, as `head_scale` is not compared.

    Parameters
    ----------
    groups : int
        Equal slices of a vector that are normalised each by itself; |score| is then up to
        scale * groups. It must divide D.
    head_scale : Tensor, [Hq], optional
        A learned factor of each head, of the dtype of q or fp32.
    bound : float, optional
        A promise that no |head_scale| is larger (with normalize=False: of what q was multiplied
        by). Without it, head_scale means a running maximum.
    normalize : bool
        False: q and k come normalised (by `l2norm`, or rotated since); the bound is taken to hold,
        and head_scale is not applied: multiply q by it.
    """

    groups: int = 1
    head_scale: Tensor | None = None
    bound: float | None = None
    normalize: bool = True

    def __post_init__(self) -> None:
        """Refuse what is no norm."""
        groups, bound = integer(self.groups), self.bound
        if groups is None or not 1 <= groups <= MAX_HEAD_DIM:
            raise InvalidInputError(
                f"L2Norm(groups={self.groups!r}): it must be an int from 1 to {MAX_HEAD_DIM}"
            )
        number = None if bound is None else real(bound)
        if bound is not None and (number is None or not 0 < number < math.inf):
            raise InvalidInputError(f"L2Norm(bound={bound!r}): it must be a number above 0")
        if groups is not self.groups or number is not bound:  # a number of numpy's
            object.__setattr__(self, "groups", groups)
            object.__setattr__(self, "bound", number)
        if bound is not None and self.normalize and self.head_scale is None:
            raise InvalidInputError(
                f"L2Norm(bound={bound!r}): it bounds head_scale, and there is none; leave it out"
            )
        if self.head_scale is not None and not self.normalize:
            raise InvalidInputError(
                "L2Norm(head_scale=..., normalize=False): nothing would apply the scale; multiply "
                "q by it"
            )


class RowOrder(NamedTuple):
    """Order of rows and heads in q and k."""

    heads_first: bool
    q_is_flat: bool
    k_is_flat: bool

    @classmethod
    def of(cls, call: Call) -> RowOrder:
        """Return that of a call's tensors."""
        q_is_flat = isinstance(call.q_seqs, Ragged)
        is_bhsd = call.layout == "bhsd"
        return cls(is_bhsd and not q_is_flat, q_is_flat, isinstance(call.kv_seqs, Ragged))


def check(norm: L2Norm, q: Tensor, heads: int, call: Call) -> int:
    """Check a norm against the tensors of a call; return the address of its head_scale.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    check_kind(norm)
    if q.shape[-1] % norm.groups:
        raise InvalidInputError(
            f"L2Norm(groups={norm.groups}): it must divide head_dim, which is {q.shape[-1]}"
        )
    scale = norm.head_scale
    if scale is not None and (not isinstance(scale, torch.Tensor) or scale.device != q.device):
        raise InvalidInputError(
            f"L2Norm(head_scale) must be a tensor [{heads}] on {q.device}; move it with .to()"
        )
    address = vector("L2Norm(head_scale)", scale, ((heads,),), is_copied=True)
    if isinstance(call.kv_seqs, Paged) and norm.normalize:
        raise UnsupportedError(
            "qk_norm with pages: keys are normalised once, when they are put into the cache; do "
            "that with jitattn.l2norm, and pass L2Norm(normalize=False)"
        )
    return address


def check_kind(norm: object) -> None:
    """Refuse what is no norm."""
    if norm is not None and not isinstance(norm, L2Norm):
        raise InvalidInputError(
            f"qk_norm is a {type(norm).__name__}: it must be a jitattn.L2Norm, or None"
        )


def shift_of(norm: L2Norm, scale: float, dtype: torch.dtype) -> float | None:
    """Return what stands for the negated maximum of every row, base 2; None: keep the maximum."""
    if norm.head_scale is not None and norm.bound is None:
        return None
    highest = abs(scale) * norm.groups * (1.0 if norm.bound is None else norm.bound)
    highest *= math.log2(math.e)
    if dtype is torch.float16:
        return min(0.0, _LARGEST_FP16 - highest) if highest <= _WIDEST_FP16 else None
    return 0.0 if highest <= _WIDEST else None


def call_of_normalized(call: Call, scale: float) -> Call:
    """Return the call with q and k already normalised, and its own scale."""
    norm = call.scores.qk_norm
    if norm is not None:
        is_bounded = norm.head_scale is None or norm.bound is not None
        bound = None if norm.head_scale is None else norm.bound
        norm = _normalized(norm.groups, bound) if is_bounded else None
    return call._replace(scale=scale, scores=call.scores._replace(qk_norm=norm))


@functools.lru_cache(maxsize=256)
def _normalized(groups: int, bound: float | None) -> L2Norm:
    return L2Norm(groups, None, bound, normalize=False)


def l2norm(x: Tensor, groups: int = 1) -> Tensor:
    """Scale vectors, or equal slices of them, to length 1, in fp32.

    Differentiable. A vector shorter than 1e-12 has no direction: it becomes 0.

    Parameters
    ----------
    x : Tensor, [..., D]
    groups : int
        Slices, a divisor of D.

    Returns
    -------
    Tensor, shape and dtype of x
    """
    number = integer(groups)
    if number is None or number < 1 or x.shape[-1] % number:
        raise InvalidInputError(
            f"groups={groups!r}: it must be an int that divides head_dim, which is {x.shape[-1]}"
        )
    if not torch.compiler.is_dynamo_compiling():
        index_address("x", x)  # refuses memory that is gone
    return _unit(x, number).to(x.dtype)


@outside_autocast
def _unit(x: Tensor, groups: int) -> Tensor:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    is_zero = length < _EPSILON  # no direction: its unit is 0, and so is its gradient
    unit: Tensor = wide / length.masked_fill(is_zero, 1.0)
    return unit.masked_fill(is_zero, 0.0).reshape(x.shape)


@outside_autocast
def normalized_cpu(q: Tensor, k: Tensor, norm: L2Norm, head_axis: int) -> tuple[Tensor, Tensor]:
    """Return q and k as the CPU path takes them, in fp32."""
    turned = _unit(q, norm.groups)
    if norm.head_scale is not None:
        shape = [1] * q.dim()
        shape[head_axis] = -1
        turned = turned * norm.head_scale.view(shape)
    return turned, _unit(k, norm.groups)


def normalized_cuda(q: Tensor, k: Tensor, norm: L2Norm, call: Call) -> tuple[Tensor, Tensor]:
    """Return contiguous normalised copies of q and k, in their dtype: one launch."""
    q_out, k_out = like_normalized(q, k)
    head_dim, groups = q.shape[-1], norm.groups
    slices_q, slices_k = q.numel() // head_dim * groups, k.numel() // head_dim * groups
    if not slices_q + slices_k:
        return q_out, k_out
    rows = RowOrder.of(call)
    sides = _sides(q, k, rows)
    index = q.get_device()
    with on_gpu(index):
        spec = _norm_spec(q.dtype, head_dim, groups, _aligned(q, k, sides), device(index).arch)
        scale = None if norm.head_scale is None else norm.head_scale.contiguous()
        loaded_kernel(spec, index).launch(
            -(-(slices_q + slices_k) * spec.lanes // spec.num_threads),
            torch._C._cuda_getCurrentRawStream(index),
            q.data_ptr(),
            k.data_ptr(),
            q_out.data_ptr(),
            k_out.data_ptr(),
            0 if scale is None else scale.data_ptr(),
            *sides[0][2],
            *sides[1][2],
            slices_q,
            slices_k,
            sides[0][0],
            sides[1][0],
            sides[0][1],
            sides[1][1],
            rows.heads_first,
            not rows.heads_first,
        )
    return q_out, k_out


def normalized_grad_cuda(
    inputs: tuple[Tensor, Tensor],
    gradients: tuple[Tensor | None, Tensor | None],
    head_scale: Tensor | None,
    groups: int,
    rows: RowOrder,
    *,
    wants_scale: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of q, of k and, if wanted, of head_scale: a launch for each tensor."""
    heads_first = rows.heads_first
    found: list[Tensor | None] = []
    d_scale = torch.zeros_like(head_scale) if head_scale is not None and wants_scale else None
    for x, d_y, side in zip(inputs, gradients, _sides(*inputs, rows), strict=True):
        is_q = not found
        if d_y is None:
            found.append(None)
            continue
        d_y = readable("the gradient of a normalised tensor", d_y).to(x.dtype).contiguous()
        dx = torch.empty_like(d_y)
        found.append(dx)
        num_slices = x.numel() // x.shape[-1] * groups
        if not num_slices:
            continue
        first, second, strides = side
        units = x.shape[-1] | strides[0] | strides[1] | strides[2]
        aligned = (x.data_ptr() | d_y.data_ptr() | units * x.element_size()) & 15 == 0
        index = x.get_device()
        along = None
        if is_q and d_scale is not None:
            along = x.new_empty((*x.shape[:-1], groups), dtype=torch.float32)
        scale = head_scale.contiguous() if is_q and head_scale is not None else None
        with on_gpu(index):
            spec = NormGradSpec(
                dtype=DTYPES[x.dtype],
                head_dim=x.shape[-1],
                groups=groups,
                access=Access.VEC16 if aligned else Access.ELEMENT,
                arch=device(index).arch,
            )
            loaded_kernel(spec, index).launch(
                -(-num_slices * spec.lanes // spec.num_threads),
                torch._C._cuda_getCurrentRawStream(index),
                x.data_ptr(),
                d_y.data_ptr(),
                dx.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                0 if along is None else along.data_ptr(),
                *strides,
                num_slices,
                first,
                second,
                heads_first,
                not heads_first,
            )
        if along is not None:
            head_axis = 1 if heads_first or x.dim() == 3 else 2
            d_scale = along.sum([axis for axis in range(along.dim()) if axis != head_axis])
    return found[0], found[1], d_scale


def like_normalized(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Return new tensors for normalised q and k."""
    dense = torch.contiguous_format
    return torch.empty_like(q, memory_format=dense), torch.empty_like(k, memory_format=dense)


def norm_spec(q: Tensor, k: Tensor, norm: L2Norm, call: Call, arch: str) -> NormSpec:
    """Return the kernel that normalises q and k."""
    aligned = _aligned(q, k, _sides(q, k, RowOrder.of(call)))
    return _norm_spec(q.dtype, q.shape[-1], norm.groups, aligned, arch)


def _aligned(q: Tensor, k: Tensor, sides: tuple[_Side, _Side]) -> bool:
    (_, _, of_q), (_, _, of_k) = sides
    units = q.shape[-1] | of_q[0] | of_q[1] | of_q[2] | of_k[0] | of_k[1] | of_k[2]
    return (q.data_ptr() | k.data_ptr() | units * q.element_size()) & 15 == 0


@functools.cache
def _norm_spec(
    dtype: torch.dtype, head_dim: int, groups: int, aligned: bool, arch: str
) -> NormSpec:
    return NormSpec(
        dtype=DTYPES[dtype],
        head_dim=head_dim,
        groups=groups,
        access=Access.VEC16 if aligned else Access.ELEMENT,
        arch=arch,
    )


def norm_grad_specs(spec: NormSpec) -> list[NormGradSpec]:
    """Return the kernels that the gradient of a normalisation can need."""
    return [
        NormGradSpec(
            dtype=spec.dtype,
            head_dim=spec.head_dim,
            groups=spec.groups,
            access=access,
            arch=spec.arch,
        )
        for access in dict.fromkeys((spec.access, Access.ELEMENT))
    ]


def _sides(q: Tensor, k: Tensor, rows: RowOrder) -> tuple[_Side, _Side]:
    return _side(q, rows.q_is_flat), _side(k, rows.k_is_flat)


def _side(tensor: Tensor, is_flat: bool) -> _Side:
    """Two inner sizes, of which the second is the faster, and strides (batch, first, second).

    Copies keep the order of their dimensions: "heads" of a [B, H, L, D] tensor are its rows.
    """
    if is_flat:
        return tensor.shape[0], tensor.shape[1], (0, tensor.stride(0), tensor.stride(1))
    return tensor.shape[1], tensor.shape[2], (tensor.stride(0), tensor.stride(1), tensor.stride(2))
