"""Plans the merge of results over disjoint sets of keys, and its gradient."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from jitattn.plan import arguments
from jitattn.plan.step import Place, Plan, Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from jitattn.kernels.combine import CombineGradSpec, CombineSpec

#: Strides in elements, of (part, batch, row, head).
PartStrides: TypeAlias = tuple[int, int, int, int]


class MergeSizes(NamedTuple):
    """Sizes of the partial results, [num_parts, B, Lq, Hq, Dv]."""

    num_parts: int
    batch: int
    len_q: int
    heads_q: int


def merge(
    spec: CombineSpec, sizes: MergeSizes, part_strides: PartStrides, lse_strides: PartStrides
) -> Plan:
    """Plan the merge of partial results."""
    numbers = {**_numbers(sizes, part_strides), **_by_part("lse", lse_strides)}
    return _plan(spec, sizes, numbers, ("parts", "part_lses", "out", "lse"))


def merge_gradient(
    spec: CombineGradSpec, sizes: MergeSizes, part_strides: PartStrides, *, has_d_lse: bool
) -> Plan:
    """Plan the gradients of partial results and their LSEs."""
    numbers = _numbers(sizes, part_strides)
    names = ["parts", "part_lses", "out", "lse", "d_out", "d_parts", "d_part_lses"]
    if has_d_lse:
        names.append("d_lse")
    else:
        numbers["d_lse"] = 0
    return _plan(spec, sizes, numbers, names)


def _plan(
    spec: CombineSpec | CombineGradSpec,
    sizes: MergeSizes,
    numbers: dict[str, float],
    names: Sequence[str],
) -> Plan:
    if not numbers["num_rows"]:
        return Plan((), {})
    rows_per_cta = spec.num_threads // 32  # one per warp
    num_ctas = -(-sizes.batch * sizes.heads_q * sizes.len_q // rows_per_cta)
    places = {name: Place(name) for name in names}
    return Plan((Step(spec, num_ctas, numbers, places),), {})


def _numbers(sizes: MergeSizes, part_strides: PartStrides) -> dict[str, float]:
    return {
        **_by_part("part", part_strides),
        "num_rows": sizes.batch * sizes.heads_q * sizes.len_q,
        "len_q": sizes.len_q,
        "heads_q": sizes.heads_q,
        "num_parts": sizes.num_parts,
    }


def _by_part(name: str, strides: PartStrides) -> dict[str, float]:
    return {f"{name}_stride_part": strides[0], **arguments.strides(name, strides[1:])}
