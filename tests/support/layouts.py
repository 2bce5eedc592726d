"""Random sequence layouts: gaps, overlaps, padding, shuffled pages, and poison elsewhere.

A case is plain data, drawn by hypothesis and built on any device. Rows that belong to no sequence
hold NaN, unused pages too, and entries of the block table behind a sequence's last page name a page
that does not exist.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st

import jitattn
from jitattn.api.attention import bind
from jitattn.reference import Scores, of_sequence, reference
from jitattn.run.normalize import normalized
from jitattn.values.masks import Causal, Full
from jitattn.values.sequences import Padded, Paged, Ragged

from .baseline import baseline
from .compare import assert_attn_close, assert_lse_close

#: (dtype, head_dim): few, so that few kernels serve thousands of cases.
KINDS = ((torch.bfloat16, 128), (torch.float16, 80), (torch.bfloat16, 20))
_EDGES = (0, 1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 200, 300)
_NO_PAGE = 2**31 - 1


@dataclass(frozen=True)
class LayoutCase:
    """A call. Lengths are those of the sequences."""

    dtype: torch.dtype
    head_dim: int
    heads_kv: int
    group: int
    mask: Full | Causal
    q_kind: str  #: "batched", "ragged", "cu_seqlens", "padded", "left"
    kv_kind: str  #: the same, and "paged"
    len_q: tuple[int, ...]
    len_kv: tuple[int, ...]
    layout: str
    index_dtype: torch.dtype
    page_size: int
    pads_pages: bool  #: the first key is not in row 0 of the first page
    is_packed: bool  #: K and V are views of one tensor
    num_splits: int | None
    gives_out: bool
    seed: int


@st.composite
def layout_cases(draw: st.DrawFn, most_rows: int = 300) -> LayoutCase:
    """Draw a case with at least one side that is not batched."""
    dtype, head_dim = draw(st.sampled_from(KINDS))
    q_kind = draw(st.sampled_from(("batched", "ragged", "cu_seqlens", "padded", "left")))
    kinds = ("ragged", "cu_seqlens", "padded", "left", "paged", "paged")
    kv_kind = draw(st.sampled_from(kinds if q_kind == "batched" else (*kinds, "batched")))
    batch = draw(st.integers(1, 5))
    edges = st.sampled_from([edge for edge in _EDGES if edge <= most_rows])
    short = st.integers(0, 4)

    def lengths(kind: str, values: st.SearchStrategy[int]) -> tuple[int, ...]:
        if kind == "batched":
            return (draw(values),) * batch
        return tuple(draw(values) for _ in range(batch))

    return LayoutCase(
        dtype=dtype,
        head_dim=head_dim,
        heads_kv=draw(st.sampled_from((1, 2))),
        group=draw(st.sampled_from((1, 2, 4))),
        mask=draw(st.sampled_from((Full(), Causal(), Causal("top_left")))),
        q_kind=q_kind,
        kv_kind=kv_kind,
        len_q=lengths(q_kind, draw(st.sampled_from((short, edges)))),
        len_kv=lengths(kv_kind, edges),
        layout=draw(st.sampled_from(("bshd", "bhsd"))),
        index_dtype=draw(st.sampled_from((torch.int32, torch.int64))),
        page_size=draw(st.sampled_from((1, 2, 16, 16, 17, 64))),
        pads_pages=draw(st.sampled_from((False, False, True))),
        is_packed=draw(st.booleans()),
        num_splits=draw(st.sampled_from((None, None, None, 1, 3))),
        gives_out=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def build(case: LayoutCase, device: str) -> tuple[dict[str, Any], list[tuple[torch.Tensor, ...]]]:
    """Return the arguments of the call, and dense q, k and v of each sequence."""
    chance = random.Random(case.seed)
    generator = torch.Generator().manual_seed(case.seed)
    heads_q = case.heads_kv * case.group

    def dense(length: int, heads: int) -> torch.Tensor:
        values = torch.randn(length, heads, case.head_dim, generator=generator)
        return values.to(case.dtype)

    queries = [dense(length, heads_q) for length in case.len_q]
    keys = [dense(length, case.heads_kv) for length in case.len_kv]
    values = [dense(length, case.heads_kv) for length in case.len_kv]
    q, q_seqs = place(case, case.q_kind, [queries], chance, device)
    if case.kv_kind == "paged":
        (k, v), kv_seqs = place_in_pages(case, keys, values, chance, device)
    else:
        (k, v), kv_seqs = place(case, case.kv_kind, [keys, values], chance, device)
    arguments = {
        "q": q[0],
        "k": k,
        "v": v,
        "mask": case.mask,
        "layout": case.layout,
        "num_splits": case.num_splits,
        "q_seqs": q_seqs,
        "kv_seqs": kv_seqs,
    }
    return arguments, list(zip(queries, keys, values, strict=True))


def place(
    case: LayoutCase,
    kind: str,
    several: list[list[torch.Tensor]],
    chance: random.Random,
    device: str,
) -> tuple[list[torch.Tensor], Any]:
    """Place sequences in a tensor; the same places for all lists of `several`."""
    lengths = [len(one) for one in several[0]]
    heads, dim = several[0][0].shape[1:]
    batch, longest = len(lengths), max(lengths, default=0)

    def index(numbers: list[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=case.index_dtype, device=device)

    if kind in ("ragged", "cu_seqlens"):
        gap = 0 if kind == "cu_seqlens" else chance.randrange(4)
        order = list(range(batch))
        if kind == "ragged":
            chance.shuffle(order)
        starts, total = [0] * batch, gap
        for idx in order:
            starts[idx] = total
            total += lengths[idx] + gap
        tensors = []
        for sequences in several:
            flat = torch.full((total + gap, heads, dim), float("nan"), dtype=case.dtype)
            for start, one in zip(starts, sequences, strict=True):
                flat[start : start + len(one)] = one
            tensors.append(flat.to(device))
        if kind == "cu_seqlens":
            cumulative = [0]
            for length in lengths:
                cumulative.append(cumulative[-1] + length)
            return tensors, Ragged.from_cu_seqlens(index(cumulative), max_length=longest)
        bound = chance.choice((None, longest, longest + 7))
        return tensors, Ragged(index(starts), index(lengths), max_length=bound)

    rows = longest if kind == "batched" else longest + chance.randrange(1, 20)
    starts = [rows - length if kind == "left" else 0 for length in lengths]
    tensors = []
    for sequences in several:
        full = torch.full((batch, rows, heads, dim), float("nan"), dtype=case.dtype)
        for idx, (start, one) in enumerate(zip(starts, sequences, strict=True)):
            full[idx, start : start + len(one)] = one
        if case.layout == "bhsd":
            full = full.transpose(1, 2).contiguous()
        tensors.append(full.to(device))
    if kind == "batched":
        return tensors, None
    start = index(starts) if kind == "left" else None
    return tensors, Padded(index(lengths), start)


def place_in_pages(
    case: LayoutCase,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    chance: random.Random,
    device: str,
) -> tuple[list[torch.Tensor], Paged]:
    """Spread keys and values over shuffled pages; the others hold NaN."""
    size, nan = case.page_size, float("nan")
    starts = [chance.randrange(2 * size) if case.pads_pages else 0 for _ in keys]
    counts = [-(-(start + len(one)) // size) for start, one in zip(starts, keys, strict=True)]
    num_pages = sum(counts) + 3
    pages = list(range(num_pages))
    chance.shuffle(pages)
    width = max(counts, default=0) + chance.randrange(1, 3)
    table = torch.full((len(keys), width), _NO_PAGE, dtype=case.index_dtype)
    shape = (num_pages, 2, size, case.heads_kv, case.head_dim)
    packed = torch.full(shape, float("nan"), dtype=case.dtype)
    for idx, count in enumerate(counts):
        for number in range(count):
            page = pages.pop()
            table[idx, number] = page
            for which, rows in enumerate((keys[idx], values[idx])):
                padded = torch.cat((rows.new_full((starts[idx], *rows.shape[1:]), nan), rows))
                part = padded[number * size : (number + 1) * size]
                packed[page, which, : len(part)] = part
    packed = packed.to(device)
    k, v = packed[:, 0], packed[:, 1]
    if not case.is_packed:
        k, v = k.contiguous(), v.contiguous()
    lengths = torch.tensor([len(one) for one in keys], dtype=case.index_dtype, device=device)
    start = torch.tensor(starts, dtype=case.index_dtype, device=device) if case.pads_pages else None
    return [k, v], Paged(table.to(device), lengths, start=start)


def check_layout(
    case: LayoutCase,
    device: str,
    more: Callable[[str, dict[str, Any]], dict[str, Any]] | None = None,
) -> None:
    """Compare `jitattn.attention` with the reference, and check that other rows are 0 or unchanged.

    `more(device, arguments)` gives further arguments, the mask among them.
    """
    arguments, dense = build(case, device)
    if more is not None:
        arguments |= more(device, arguments)
    q = arguments["q"]
    out = None
    if case.gives_out:
        out = torch.full_like(q, 7.0)
    result, lse = jitattn.attention(**arguments, out=out, return_lse=True)
    assert out is None or result is out
    rounded = _units(arguments) if device == "cuda" and "qk_norm" in arguments else None
    # The truth is computed on the CPU: thousands of small operations are slow on a GPU.
    arguments, dense = build(case, "cpu")
    if more is not None:
        arguments |= more("cpu", arguments)
    changes = Scores(**{name: arguments[name] for name in Scores._fields if name in arguments})
    result, lse = result.cpu(), lse.cpu()
    same = {name: value for name, value in arguments.items() if name != "num_splits"}
    if rounded is not None:
        same |= {"q": rounded[0], "k": rounded[1], "qk_norm": None}
    truth, lse_truth = reference(**same, return_lse=True)
    base, lse_base = torch.zeros_like(truth), torch.full_like(lse_truth, float("-inf"))
    for idx, (own_q, own_k, own_v) in enumerate(dense):
        if not len(own_q):
            continue
        own, own_lse = baseline(
            own_q[None],
            own_k[None],
            own_v[None],
            mask=of_sequence(arguments["mask"], idx),
            changes=changes.of_sequence(idx),
            scale=arguments.get("scale"),
            layout="bshd",
            out_dtype=None,
        )
        target, lse_target = _rows(case, arguments["q_seqs"], idx, base, lse_base, len(own_q))
        target.copy_(own[0])
        lse_target.copy_(own_lse[0])
    untouched = torch.isneginf(lse_truth) & ~_own(case, arguments["q_seqs"], lse_truth, dense)
    if case.gives_out:
        foreign = _like_out(case, untouched, result)
        assert torch.equal(result[foreign], torch.full_like(result[foreign], 7.0))
        result = result.clone()
        result[foreign] = 0.0
    context = f"{case}"
    base = base.to(result.dtype)
    assert_attn_close("out", result, truth, base, dtype=case.dtype, context=context)
    assert_lse_close("lse", lse, lse_truth, lse_base.float(), context=context)


def _units(arguments: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return q and k as the kernel normalizes them, which other tests compare with the truth."""
    given = {name: value for name, value in arguments.items() if name not in ("q", "k", "v")}
    tensors, call = bind(arguments["q"], arguments["k"], arguments["v"], given)
    q, k = normalized(tensors["q"], tensors["k"], arguments["qk_norm"], call)
    return q.cpu(), k.cpu()


def rows_of(seqs: Any, idx: int, length: int) -> slice:
    """Return the rows of a sequence: of a flat tensor, or of its own entry of a batch."""
    start = 0 if seqs is None or seqs.start is None else int(seqs.start[idx])
    return slice(start, start + length)


def _rows(
    case: LayoutCase, seqs: Any, idx: int, out: torch.Tensor, lse: torch.Tensor, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return views of a sequence's rows: out [L, H, D], LSE [H, L]."""
    where = rows_of(seqs, idx, length)
    if isinstance(seqs, Ragged):
        return out[where], lse[:, where]
    own = out[idx].transpose(0, 1) if case.layout == "bhsd" else out[idx]
    return own[where], lse[idx][:, where]


def _own(
    case: LayoutCase, seqs: Any, lse: torch.Tensor, dense: list[tuple[torch.Tensor, ...]]
) -> torch.Tensor:
    """Return the mask of LSE elements that belong to a sequence."""
    own = torch.zeros_like(lse, dtype=torch.bool)
    for idx, (own_q, _, _) in enumerate(dense):
        where = rows_of(seqs, idx, len(own_q))
        (own if isinstance(seqs, Ragged) else own[idx])[:, where] = True
    return own


def _like_out(case: LayoutCase, rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Convert a mask over the LSE to one over the rows of out."""
    if rows.dim() == 2 or case.layout == "bshd":
        rows = rows.transpose(-1, -2)
    return rows
