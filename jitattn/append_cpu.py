"""The CPU path of appending to a KV cache: plain indexing, one sequence after another."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from jitattn.errors import InvalidInputError
from jitattn.rotary_cpu import turned_by
from jitattn.sequences import Paged

if TYPE_CHECKING:
    from torch import Tensor

    from jitattn.append import Append


def append_cpu(q: Tensor, turned: Tensor, new: Append) -> None:
    """Write the new tokens into the cache, the turned queries, and the rows in use afterwards.

    Raises
    ------
    InvalidInputError
        A sequence has no room, or a page or row does not exist; nothing was written.
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
            first = torch.arange(len_q) if new.follows else torch.zeros(len_q, dtype=torch.int64)
            turned[own] = turned_by(q[own], used + first, new.rotary)
            keys = turned_by(keys, used + torch.arange(count), new.rotary)
        new.k_cache[pages, in_page] = keys
        new.v_cache[pages, in_page] = new.v[own]
        new.stop[idx] = used + count


def _places(new: Append, idx: int, used: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the pages (or rows of the batch) and the rows in them of a sequence's new tokens."""
    num_pages, page_size = new.k_cache.shape[:2]
    table = [idx]
    if isinstance(new.kv_seqs, Paged):
        table = new.kv_seqs.block_table[idx].tolist()
    elif new.kv_seqs.batch_idx is not None:
        table = [int(new.kv_seqs.batch_idx[idx])]
    room = len(table) * page_size
    if used < 0 or used + count > room:
        raise InvalidInputError(
            f"sequence {idx} would hold {used + count} rows ({used} before the call), but there is "
            f"room for {room}"
        )
    positions = torch.arange(used, used + count)
    pages = [table[position // page_size] for position in positions.tolist()]
    for page in pages:
        if not 0 <= page < num_pages:
            what = "page" if isinstance(new.kv_seqs, Paged) else "row"
            raise InvalidInputError(
                f"sequence {idx} is to be appended to {what} {page} of the cache, but there are "
                f"only {num_pages}"
            )
    return torch.tensor(pages, dtype=torch.int64), positions % max(1, page_size)
