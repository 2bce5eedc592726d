"""CPU path of appending to a KV cache: plain indexing, one sequence after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.cpu.rotary import turned_by
from jitattn.errors import InvalidInputError
from jitattn.values.autocast import outside_autocast
from jitattn.values.sequences import Padded, Paged

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.run.append import Append
    from jitattn.run.kvcache import KvCache
    from jitattn.values.sequences import KvSequences


def check_contents(
    cache: KvCache, kv_seqs: KvSequences, new: Append | None, room: int, rows: int
) -> None:
    """Check the contents of index tensors on the CPU, in the words of `attention_with_kvcache`.

    Parameters
    ----------
    cache : KvCache
    kv_seqs : Padded or Paged
        Layout of the keys; their stops are only known if nothing is appended.
    new : Append, optional
    room : int
        Largest number of rows of a sequence.
    rows : int
        Batch rows of the cache, or pages.

    Raises
    ------
    InvalidInputError
    """
    if not isinstance(kv_seqs, Padded | Paged):
        return
    batch = kv_seqs.batch
    used = [cache.length] * batch if isinstance(cache.length, int) else cache.length.tolist()
    counts = [0] * batch
    if new is not None:
        counts = [new.k.shape[1 if new.layout == "bshd" else 2]] * batch
        if new.q_seqs is not None:
            counts = new.q_seqs.length.tolist()
    padding = [0] * batch if cache.left_pad is None else cache.left_pad.tolist()
    for idx, (length, count, left) in enumerate(zip(used, counts, padding, strict=True)):
        if length < 0 or length + count > room:
            raise InvalidInputError(
                f"length: sequence {idx} would hold {length + count} rows ({length} before the "
                f"call), but there is room for {room}"
            )
        if not 0 <= left <= length + max(0, count):
            raise InvalidInputError(
                f"left_pad: sequence {idx} begins with {left} rows that are no keys, but holds "
                f"{length + count}"
            )
    if cache.batch_idx is not None:
        for idx, row in enumerate(cache.batch_idx.tolist()):
            if not 0 <= row < rows:
                raise InvalidInputError(
                    f"batch_idx: sequence {idx} is in row {row} of the cache, but there are only "
                    f"{rows}"
                )
    if cache.block_table is None:
        return
    page_size = max(1, room // max(1, cache.block_table.shape[1]))
    for idx, pages in enumerate(cache.block_table.tolist()):
        first, last = padding[idx] // page_size, -(-(used[idx] + counts[idx]) // page_size)
        for page in pages[first:last]:
            if not 0 <= page < rows:
                raise InvalidInputError(
                    f"block_table: sequence {idx} is in page {page} of the cache, but there are "
                    f"only {rows}"
                )


@outside_autocast
def append_cpu(q: Tensor, turned: Tensor, new: Append) -> None:
    """Write the new tokens to the cache, the rotated queries, and the new stops.

    Raises
    ------
    InvalidInputError
        A sequence of q_seqs leaves the tensor; nothing was written.
    """
    is_paged = isinstance(new.kv_seqs, Paged)
    if new.layout == "bhsd" and new.q_seqs is None:
        q, turned = q.transpose(1, 2), turned.transpose(1, 2)
        new = new._replace(k=new.k.transpose(1, 2), v=new.v.transpose(1, 2))
    if new.layout == "bhsd" and not is_paged:
        caches = (new.k_cache.transpose(1, 2), new.v_cache.transpose(1, 2))
        new = new._replace(k_cache=caches[0], v_cache=caches[1])
    batch, rows = len(new.stop), q.shape[0 if new.q_seqs is not None else 1]
    lengths = [new.length] * batch if isinstance(new.length, int) else new.length.tolist()
    tokens, places = [], []
    for idx, used in enumerate(lengths):
        own: tuple[int | slice, ...] = (idx,)
        count, len_q = new.k.shape[1], rows
        if new.q_seqs is not None:
            start = 0 if new.q_seqs.start is None else int(new.q_seqs.start[idx])
            count = len_q = int(new.q_seqs.length[idx])
            own = (slice(start, start + count),)
            if start < 0 or count < 0 or start + count > rows:
                raise InvalidInputError(
                    f"q_seqs: sequence {idx} is the rows {start} to {start + count - 1}, but there "
                    f"are only {rows}"
                )
        tokens.append((own, count, len_q))
        places.append(_places(new, idx, used, count))
    for idx, used in enumerate(lengths):
        own, count, len_q = tokens[idx]
        pages, in_page = places[idx]
        keys = new.k[own]
        if new.rotary is not None:
            first = range(len_q) if new.follows else [0] * len_q
            turned[own] = turned_by(q[own], used + _indices(first), new.rotary)
            keys = turned_by(keys, used + _indices(range(count)), new.rotary)
        new.k_cache[pages, in_page] = keys
        new.v_cache[pages, in_page] = new.v[own]
        new.stop[idx] = used + count


def _places(new: Append, idx: int, used: int, count: int) -> tuple[Tensor, Tensor]:
    """Return pages (or batch rows), and rows within them, of a sequence's new tokens."""
    page_size = new.k_cache.shape[1]
    table = [idx]
    if isinstance(new.kv_seqs, Paged):
        table = new.kv_seqs.block_table[idx].tolist()
    elif new.kv_seqs.batch_idx is not None:
        table = [int(new.kv_seqs.batch_idx[idx])]
    positions = range(used, used + count)
    pages = [table[position // page_size] for position in positions]
    rows = [position % page_size for position in positions]
    return _indices(pages), _indices(rows)


def _indices(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64, device="cpu")
