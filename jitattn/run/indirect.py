"""Dispatches calls that cannot launch kernels directly: traced, transformed, or placeholders.

They go through the torch operators (operators.py, kvcache_operators.py), which tracers, dispatch
modes, meta and fake tensors support, or, inside a torch.func transform on a GPU, through
transforms.py. The CPU path consists of operators that all of these support, and is taken where
possible.
"""

from __future__ import annotations

import enum
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Final

import torch
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing

from jitattn.errors import NO_FORWARD_MODE, UnsupportedError
from jitattn.request import problem
from jitattn.request.layouts import check_kinds, parse_any
from jitattn.request.outputs import check_out
from jitattn.request.scores import tensors_of
from jitattn.run.forward import has_duals, run
from jitattn.run.kvcache import prepare_with_kvcache, run_with_kvcache
from jitattn.run.kvcache_operators import encode_with_kvcache
from jitattn.run.operator_encoding import encode, filled
from jitattn.run.transforms import attention_in_transform
from jitattn.run.unit_strides import with_unit_strides
from jitattn.values.norm import check_kind
from jitattn.values.tensors import has_symbols, is_placeholder, is_transformed, refuse_nested

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from jitattn.request.problem import Call
    from jitattn.run.kvcache import KvCache


num_dispatch_modes: Final[Callable[[], int]] = torch._C._len_torch_dispatch_stack
is_tracing: Final[Callable[[], bool]] = torch._C._is_tracing  #: by torch.jit.trace
#: By torch.func: grad, vmap, jvp …. Tensors that are allocated inside are wrapped, without memory.
in_transform: Final[Callable[[], bool]] = torch._C._are_functorch_transforms_active


def is_watched() -> bool:
    """Return whether a tracer or dispatch mode is active, which would miss a kernel launch."""
    return num_dispatch_modes() > 0 or is_tracing()


def attention_indirectly(q: Tensor, k: Tensor, v: Tensor, call: Call) -> Any:  # noqa: ANN401
    """Compute `attention` on tensors that are not plain, or under a tracer or dispatch mode.

    Raises
    ------
    InvalidInputError, UnsupportedError
        As `attention`, or a transform of torch.func has no rule for the call.
    """
    refuse_nested((("q", q), ("k", k), ("v", v)))
    _check(q, k, v, call)
    q, k, v = with_unit_strides(q, k, v)
    way = _Way.of(q, [k, v, *tensors_of(call).values(), *_indices(call)])
    if way is _Way.USUAL:
        with _on_constants(q):
            return run(q, k, v, call)
    if way is _Way.TRANSFORM:
        if call.out is not None:
            raise UnsupportedError(
                "out is given inside a transform of torch.func: leave it out, and use the result"
            )
        return _asked_for(attention_in_transform(q, k, v, encode(call)), call)
    if way is _Way.SHAPES:
        with disable_proxy_modes_tracing():
            parse_any(q, k, v, call)  # the operator itself does not validate
    results = torch.ops.jitattn.attention(q, k, v, *filled(encode(call), q))
    return _asked_for(_into_out(results, call, (q, k, v), way), call)


def kvcache_indirectly(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: KvCache, call: Call
) -> Any:  # noqa: ANN401
    """Compute `attention_with_kvcache` under the same conditions.

    Raises
    ------
    InvalidInputError, UnsupportedError
    """
    refuse_nested((("q", q), ("k_cache", k_cache), ("v_cache", v_cache)))
    _check(q, k_cache, v_cache, call)
    (q,) = with_unit_strides(q)
    if cache.k is not None and cache.v is not None:
        new_k, new_v = with_unit_strides(cache.k, cache.v)
        cache = cache._replace(k=new_k, v=new_v)
    inputs = (q, k_cache, v_cache)
    with _on_constants(q):  # which may allocate, for numbers of the call
        given = encode_with_kvcache(cache, call)
    way = _Way.of(q, [k_cache, v_cache, *given.tensors])
    if way is _Way.USUAL:
        with _on_constants(q):
            return run_with_kvcache(*inputs, cache, call)
    if way is _Way.TRANSFORM:
        raise UnsupportedError(
            "attention_with_kvcache inside a transform of torch.func (grad, vmap, jvp …): it "
            "writes in place, which is not followed on a GPU; call it outside, or use attention"
        )
    if way is _Way.SHAPES:
        with disable_proxy_modes_tracing():
            prepare_with_kvcache(*inputs, cache, call)
    results = torch.ops.jitattn.attention_with_kvcache(*inputs, *filled(given, q))
    return _asked_for(_into_out(results, call, inputs, way), call)


def _on_constants(q: Tensor) -> AbstractContextManager[object]:
    """Suspend the transforms of torch.func for a call on a GPU that has none of their tensors."""
    if q.is_cuda and in_transform():
        return torch._C._DisableFuncTorch()
    return nullcontext()


class _Way(enum.Enum):
    """The execution path of a call."""

    USUAL = enum.auto()  #: the eager path
    TRANSFORM = enum.auto()  #: by autograd functions that torch.func can transform
    SHAPES = enum.auto()  #: by the operator, on placeholders
    SYMBOLS = enum.auto()  #: by the operator, on placeholders with symbolic sizes
    VALUES = enum.auto()  #: by the operator, on tensors with values

    @classmethod
    def of(cls, q: Tensor, others: Sequence[Tensor]) -> _Way:
        """Return the execution path of a call with these tensors."""
        tensors = [q, *others]
        is_symbolic = is_tracing() or has_symbols(tensors)
        is_usual = not (q.is_cuda or is_symbolic)  # on the CPU
        if any(map(is_transformed, tensors)):
            return cls.USUAL if is_usual else cls.TRANSFORM
        if has_duals(tensors):
            if not is_usual:
                raise UnsupportedError(NO_FORWARD_MODE)
            return cls.USUAL
        if any(map(is_placeholder, tensors)):
            return cls.SYMBOLS if is_symbolic else cls.SHAPES
        return cls.USUAL if is_usual or not is_watched() else cls.VALUES


def _check(q: Tensor, k: Tensor, v: Tensor, call: Call) -> None:
    """Refuse arguments that cannot be encoded for an operator."""
    problem.check_alike(q, k, v)
    problem.axes(call.layout)
    problem.check_mask(call.mask)
    problem.check_options(
        q, call.gear, call.out_dtype, call.num_splits, call.return_lse, call.tile_rows
    )
    check_kinds(call.q_seqs, call.kv_seqs, q.device)
    check_kind(call.scores.qk_norm)


def _indices(call: Call) -> list[Tensor]:
    """Return the index tensors of the sequences."""
    found = []
    for seqs in (call.q_seqs, call.kv_seqs):
        names = ("start", "stop", "batch_idx", "block_table")
        found += [getattr(seqs, name, None) for name in names]
    return [tensor for tensor in found if tensor is not None]


def _into_out(
    results: tuple[Tensor, Tensor], call: Call, inputs: tuple[Tensor, Tensor, Tensor], way: _Way
) -> tuple[Tensor, Tensor]:
    """Copy the result of an operator into `out` if it is given."""
    result, lse = results
    if call.out is None:
        return result, lse
    if way is _Way.VALUES and call.q_seqs is not None:
        raise UnsupportedError(
            "out and q_seqs are given while a tracer or a dispatch mode looks on: rows that belong "
            "to no sequence could not be left alone; leave out out, and use the result"
        )
    if way is not _Way.SYMBOLS:
        check_out(call.out, inputs, tuple(result.shape), result.dtype)
    return call.out.copy_(result), lse


def _asked_for(results: Sequence[Tensor], call: Call) -> Any:  # noqa: ANN401
    return tuple(results) if call.return_lse else results[0]
