"""Plans the append to a KV cache: one launch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.kernels.append import AppendSpec
from jitattn.plan import arguments
from jitattn.plan.step import Place, Plan, Step
from jitattn.spec.enums import LENGTHS

if TYPE_CHECKING:
    from jitattn.request.problem import Strides

#: Rows (token and head) per CTA iteration, and the least number of iterations.
_TEAMS: Final = AppendSpec.num_threads // 16
_ROUNDS: Final = 4
_MOST_CTAS: Final = 65536


class AppendFacts(NamedTuple):
    """Tensor facts that the plan depends on. Index sizes are in 4-byte words; 0: no index."""

    batch: int  #: sequences
    num_new: int
    len_q: int
    heads_q: int
    heads_kv: int
    head_dim: int
    head_dim_v: int
    k_strides: Strides
    v_strides: Strides
    q_strides: Strides
    q_out_strides: Strides
    k_cache_strides: Strides  #: of (page or batch, row, head)
    v_cache_strides: Strides
    num_pages: int
    page_size: int
    table_width: int
    table_stride: int  #: of the block table, in words
    table_word: int
    used_word: int  #: 0: one length for all, bound at run time
    stop_word: int
    q_rows: int
    q_span: tuple[int, int, bool] | None  #: ragged: word, kind, and whether starts are given
    rotary: tuple[int, int, int, int] | None  #: dim, rows of the tables, strides of cos and of sin
    q_follows: bool


def append(spec: AppendSpec, facts: AppendFacts) -> Plan:
    """Plan the launch that writes new tokens, rotated queries, and the cache lengths afterwards."""
    if not facts.batch:
        return Plan((), {})
    rows = 2 * facts.heads_kv * facts.num_new
    if facts.rotary is not None:
        rows = max(rows, facts.heads_q * facts.len_q)
    most = max(16, _MOST_CTAS // facts.batch)
    ctas = max(1, min(-(-rows // (_TEAMS * _ROUNDS)), most))
    rotary_dim, table_rows, cos_stride, sin_stride = facts.rotary or (0, 1, 0, 0)
    q_word, q_kind, has_q_start = facts.q_span or (1, LENGTHS, False)
    numbers: dict[str, float] = {
        **arguments.strides("k", facts.k_strides),
        **arguments.strides("v", facts.v_strides),
        **arguments.strides("q", facts.q_strides),
        **arguments.strides("q_out", facts.q_out_strides),
        **arguments.page_strides("k_cache", facts.k_cache_strides),
        **arguments.page_strides("v_cache", facts.v_cache_strides),
        "cos_stride": cos_stride,
        "sin_stride": sin_stride,
        "table_stride": facts.table_stride,
        "num_new": facts.num_new,
        "len_q": facts.len_q,
        "heads_q": facts.heads_q,
        "heads_kv": facts.heads_kv,
        "head_dim": facts.head_dim,
        "head_dim_v": facts.head_dim_v,
        "rotary_dim": rotary_dim,
        "q_follows": facts.q_follows,
        "table_rows": table_rows,
        "table_width": facts.table_width,
        "num_pages": facts.num_pages,
        "page_size": max(1, facts.page_size),
        "used_word": facts.used_word or 1,
        "stop_word": facts.stop_word,
        "table_word": facts.table_word or 1,
        "q_word": q_word,
        "q_span_kind": q_kind,
        "q_rows": facts.q_rows,
        "ctas_per_sequence": ctas,
    }
    names = ("k", "v", "q", "k_cache", "v_cache", "q_out", "kv_stop", "used_by_all")
    places = {name: Place(name) for name in names}
    given = {
        "cos": facts.rotary is not None,
        "sin": facts.rotary is not None,
        "used": facts.used_word > 0,
        "q_start": has_q_start,
        "q_stop": facts.q_span is not None,
        "block_table": facts.table_word > 0,
    }
    optional = {name: Place(name) if is_given else None for name, is_given in given.items()}
    arguments.add_optional(optional, numbers, places)
    return Plan((Step(spec, facts.batch * ctas, numbers, places),), {})
