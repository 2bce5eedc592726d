"""Registers `attention_with_kvcache` as a torch.library operator, for `torch.compile`.

``jitattn::attention_with_kvcache`` writes to the cache. Beside q and the caches it takes the call
as ``jitattn::attention`` does (operator_encoding.py), and the other arguments behind it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.run.kvcache import KvCache, run_with_kvcache
from jitattn.run.operator_encoding import Encoded, Reader, encoder, filled, read_call
from jitattn.run.operators import fake_results, refuse_in_graph
from jitattn.values.autocast import outside_autocast
from jitattn.values.rotary import Rotary

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.request.problem import Call


def encode_with_kvcache(cache: KvCache, call: Call) -> Encoded:
    """Encode a call as operator arguments; `torch.compile` traces this."""
    writer = encoder(call)
    length, rotary = cache.length, cache.rotary
    writer.integer(length if isinstance(length, int) else None)
    for tensor in (
        None if isinstance(length, int) else length,
        cache.k,
        cache.v,
        cache.left_pad,
        cache.batch_idx,
        cache.block_table,
        None if rotary is None else rotary.cos,
        None if rotary is None else rotary.sin,
    ):
        writer.tensor(tensor)
    writer.integer(None if rotary is None else rotary.interleaved)
    writer.integer(cache.max_length)
    return writer.encoded()


def call_kvcache_operator(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache: KvCache, call: Call
) -> Any:  # noqa: ANN401 - Tensor or (Tensor, Tensor)
    """Call the operator, and return the output, with the LSE on request.

    Raises
    ------
    UnsupportedError
        An operator cannot have the call.
    """
    refuse_in_graph(call)
    given = encode_with_kvcache(cache, call)
    out, lse = torch.ops.jitattn.attention_with_kvcache(q, k_cache, v_cache, *filled(given, q))
    return (out, lse) if call.return_lse else out


@outside_autocast
def _with_kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor]:
    reader = Reader(tensors, ints, floats)
    call = read_call(reader)
    number = reader.integer()
    length, k, v, left_pad, batch_idx, block_table, cos, sin = (reader.tensor() for _ in range(8))
    interleaved = reader.integer()
    rotary = None if cos is None else Rotary(cos, sin, interleaved=bool(interleaved))
    cache = KvCache(
        k,
        v,
        length if number is None else number,
        rotary,
        left_pad,
        batch_idx,
        block_table,
        reader.integer(),
    )
    with torch.no_grad():
        out, lse = run_with_kvcache(q, k_cache, v_cache, cache, call)
    return out.contiguous(), lse.contiguous()


def _with_kvcache_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    tensors: list[Tensor],
    ints: list[int],
    floats: list[float],
) -> tuple[Tensor, Tensor]:
    del k_cache, tensors, floats
    return fake_results(q, v_cache, ints)


_library: Any = torch.library.Library("jitattn", "FRAGMENT")
_library.define(
    "attention_with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor[] tensors, "
    "int[] ints, float[] floats) -> (Tensor, Tensor)"
)
_library.impl("attention_with_kvcache", _with_kvcache, "CompositeExplicitAutograd")
torch.library.register_fake("jitattn::attention_with_kvcache", _with_kvcache_fake, lib=_library)
