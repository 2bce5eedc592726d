"""Plans the forward pass: operand preparation, then the attention kernel.

Kernels, tile, packing and split count depend on the problem, the sizes and the GPU alone, never on
tensor contents or addresses.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

from jitattn.errors import UnsupportedError
from jitattn.jit.launch import MAX_GRID
from jitattn.kernels.fwd import fwd_spec
from jitattn.kernels.fwd_sm90 import FwdSm90Spec
from jitattn.kernels.tiles import choose_splits, combine_cost, heads_per_tile
from jitattn.plan import arguments, prepare, wgmma
from jitattn.plan.step import Buffer, Place, Plan, Step
from jitattn.spec.arguments import NO_LEFT, divisor
from jitattn.spec.enums import TILE_ROWS, MaskKind, RowClass
from jitattn.values.gears import gear_of

if TYPE_CHECKING:
    from collections.abc import Hashable

    from jitattn.kernels.fwd import FwdSpec
    from jitattn.kernels.fwd_sm90 import Sm90Tile
    from jitattn.kernels.tiles import Tile
    from jitattn.plan.step import Device
    from jitattn.request.problem import Call, Runtime, Strides
    from jitattn.request.request import Request
    from jitattn.spec.kernel_spec import Problem

#: Arguments bound at run time, so that decoding steps with growing key counts share a plan.
LENGTHS: Final = ("len_kv", "diagonal")
#: Keys are counted in 32 bits.
_MOST_KEYS: Final = 2**31 - 1
#: Calls with more query tiles than this multiple of the resident CTAs are not split.
_BALANCED_TILES: Final = 4


class Tiling(NamedTuple):
    """The tiling of a call: kernel, GQA packing, split count and grid size."""

    spec: FwdSpec | FwdSm90Spec
    rows: RowClass
    heads_per_tile: int
    num_q_tiles: int  #: of the longest sequence
    num_splits: int  #: 0: computed by every CTA from the lengths
    num_slots: int  #: CTAs that fit the GPU at once
    num_ctas: int  #: a persistent kernel computes the work of several in each
    refusal: str  #: why a wgmma kernel does not serve a call with long queries; empty if it does


class Forward(NamedTuple):
    """The plan of a forward pass, with the facts that `run` and `explain` need."""

    plan: Plan
    problem: Problem  #: of the attention kernel
    tiling: Tiling
    longest_listed: int  #: positions that block lists cover; 0 where there are none
    tile_positions: int
    along_mean: str = ""  #: buffer to add to the LSE, unscaled: quantized calls


def forward(
    problem: Problem,
    runtime: Runtime,
    call: Call,
    out_strides: Strides,
    lse_strides: tuple[int, int] | None,
    device: Device,
) -> Forward:
    """Plan a call with at least one row.

    Parameters
    ----------
    problem, runtime : Problem, Runtime
        As the call was parsed.
    call : Call
    out_strides : (int, int, int)
        Of the result, as (batch, row, head).
    lse_strides : (int, int), optional
        Of the LSE, as (batch, head); None: it is not asked for.
    device : Device

    Raises
    ------
    LaunchError
        A kernel is not loaded and the stream is capturing a graph.
    UnsupportedError
        The call needs more CTAs than a grid has.
    """
    if gear_of(call.gear, problem.dtype) == 4 and wgmma.may_serve(problem, device):
        call = call._replace(gear=3)  # faster on wgmma than 8 bits on mma.sync
    prepared = prepare.operands(problem, runtime, call, device.arch)
    kernel_problem, kernel_runtime = prepared.problem, prepared.runtime
    tiling = tile(kernel_problem, kernel_runtime, call.num_splits, call.tile_rows, device)
    positions = tile_positions(tiling.spec.tile.block_q, tiling.heads_per_tile)
    step, buffers = _attend(prepared, tiling, out_strides, lse_strides, positions)
    counters = max(prepared.plan.num_counters, num_counters(tiling))
    longest = 0
    if runtime.listed is not None:
        longest = max(runtime.len_kv, runtime.diagonal + runtime.len_q)
    return Forward(
        Plan((*prepared.plan.steps, step), {**prepared.plan.buffers, **buffers}, counters),
        kernel_problem,
        tiling,
        longest,
        positions,
        prepared.along_mean,
    )


def lengths_of(request: Request) -> dict[str, int]:
    """Return the lengths that a plan takes at run time, beside addresses."""
    return {"len_kv": request.len_kv, "diagonal": request.diagonal}


def deciding_facts(
    problem: Problem,
    runtime: Runtime,
    call: Call,
    out_strides: Strides,
    lse_strides: tuple[int, int] | None,
    device: Device,
) -> tuple[Hashable, ...] | None:
    """Return the cache key of a plan that serves other key counts too; None if the call has none.

    In such a plan the key count decides the tiling only. Prepared operands, score modifications and
    sequence arguments depend on the key count in further ways, so these calls have no such key.
    """
    if not _is_own_kernel(problem, runtime, call, device.arch):
        return None
    tiling = tile(problem, runtime, call.num_splits, call.tile_rows, device)
    if tiling.spec.tensor_maps:  # they hold the key count
        return None
    return (
        problem, tiling[1:], runtime._replace(len_kv=0, diagonal=0), out_strides, lse_strides,
        device.arch,
    )  # fmt: skip


def keys_per_block(problem: Problem, runtime: Runtime, call: Call, device: Device) -> int | None:
    """Return the keys per block, if nothing but the number of key blocks decides the tiling.

    Like calls with other key counts then have the same plan as this one, whatever their counts, if
    they have the same number of blocks. None: at some key counts, operands are prepared, or
    `deciding_facts` has no key.
    """
    # Only products of sizes beyond a bound, and keys at all, make a call prepare its operands.
    longest = runtime._replace(len_kv=_MOST_KEYS)
    if not _is_own_kernel(problem, longest, call, device.arch):
        return None
    tiling = tile(problem, runtime, call.num_splits, call.tile_rows, device)
    if tiling.rows is RowClass.MANY and wgmma.may_serve(problem, device):
        return None  # which family does depends on the key count
    return tiling.spec.tile.block_kv


def _is_own_kernel(problem: Problem, runtime: Runtime, call: Call, arch: str) -> bool:
    """Return whether a call takes batched operands as they are, and modifies no scores."""
    if any(one is not None for one in (runtime.scores, runtime.indices, runtime.listed)):
        return False
    return prepare.kernel_problem(problem, runtime, call, arch) is None


def tile(
    problem: Problem,
    runtime: Runtime,
    num_splits: int | None,
    tile_rows: int | None,
    device: Device,
) -> Tiling:
    """Choose tile, packing and splits.

    Raises
    ------
    UnsupportedError
        The call needs more CTAs than a grid has.
    """
    packed = _packed(runtime)
    num_rows = runtime.len_q * packed
    rows = RowClass.MANY
    if tile_rows is not None:
        rows = TILE_ROWS[tile_rows]
    elif num_rows <= RowClass.ROWS64:
        rows = RowClass.ROWS16 if num_rows <= RowClass.ROWS16 else RowClass.ROWS64
    chosen = wgmma.Choice(None, refusal="the queries are short")
    if rows is RowClass.MANY:
        chosen = wgmma.choice(problem, runtime, packed, device)
    spec: FwdSpec | FwdSm90Spec
    if chosen.spec is None:
        spec = fwd_spec(problem, device.arch, rows)
    else:
        spec, packed = chosen.spec, chosen.heads_per_tile
        num_rows = runtime.len_q * packed
    num_slots = device.slots(spec)
    block_q = spec.tile.block_q
    if runtime.listed is not None:
        # Tiles are aligned to the block lists, so the first one may begin before row 0.
        num_rows += (tile_positions(block_q, packed) - 1) * packed
    num_q_tiles = -(-num_rows // block_q)
    head_tiles = runtime.heads_q // packed
    num_tiles = num_q_tiles * runtime.batch
    if runtime.indices is not None and (rows_in_all := runtime.indices.q_rows_in_all) is not None:
        # A bound from the total row count: at most one partial tile for each sequence.
        beyond = num_rows - runtime.len_q * packed
        rows_in_all = rows_in_all * packed + beyond * runtime.batch
        num_tiles = min(num_tiles, rows_in_all // block_q + runtime.batch)
    num_items = num_tiles
    if runtime.indices is None:
        if num_splits is None:
            num_splits = choose_splits(
                num_tiles * head_tiles,
                blocks_seen(problem, runtime, spec.tile),
                num_slots,
                combine_cost(block_q),
            )
        num_items *= num_splits
    elif num_splits is not None:
        num_items *= num_splits
    elif (
        num_tiles * head_tiles > _BALANCED_TILES * num_slots
        # A merge takes longer than all blocks of the longest sequence.
        or -(-runtime.len_kv // spec.tile.block_kv) <= combine_cost(block_q)
    ):
        num_splits = 1
    else:
        # Each query tile may get one item more than its share of the slots.
        num_splits, num_items = 0, num_tiles + num_slots // head_tiles + 1
    num_ctas = num_items * head_tiles
    if num_ctas > MAX_GRID - (num_slots if spec.tensor_maps else 0):  # items are counted beyond
        raise UnsupportedError(
            f"the call needs {num_ctas} CTAs: a grid has at most 2**31 - 1; split the batch"
        )
    return Tiling(spec, rows, packed, num_q_tiles, num_splits, num_slots, num_ctas, chosen.refusal)


def num_counters(tiling: Tiling) -> int:
    """Return the counters of a tiling: of arrivals, one for each CTA, and of drawn tiles."""
    return (tiling.num_ctas if tiling.num_splits != 1 else 0) + bool(tiling.spec.tensor_maps)


def tile_positions(block_q: int, packed: int) -> int:
    """Return the query positions per tile, given the number of packed heads."""
    return max(1, block_q // packed)


def _packed(runtime: Runtime) -> int:
    """Return the number of query heads packed into a tile."""
    group = runtime.heads_q // runtime.heads_kv
    packed = heads_per_tile(runtime.len_q, group)
    if runtime.listed is None or packed == 1:
        return packed
    # A tile has a single block list and a power-of-two number of positions.
    return packed if runtime.heads_agree and packed & (packed - 1) == 0 else 1


def blocks_seen(problem: Problem, runtime: Runtime, tile: Tile | Sm90Tile) -> int:
    """Return the number of key blocks that a query tile visits in a uniform batch."""
    num_blocks = -(-runtime.len_kv // tile.block_kv)
    scores = runtime.scores
    if scores is None:
        return num_blocks
    if problem.mask is MaskKind.LOCAL_STRIDE:
        per_block = (1 << scores.block_log2) // tile.block_kv
        seen = (scores.local_blocks + 3) * per_block + num_blocks // scores.stride
        return min(num_blocks, seen)
    if problem.mask is not MaskKind.WINDOW or scores.left <= NO_LEFT:
        return num_blocks
    reach = min(runtime.diagonal, runtime.len_kv) - scores.left + min(runtime.len_q, tile.block_q)
    return min(num_blocks, reach // tile.block_kv + 2 - (-scores.keep_first // tile.block_kv))


def _attend(
    prepared: prepare.Prepared,
    tiling: Tiling,
    out_strides: Strides,
    lse_strides: tuple[int, int] | None,
    positions: int,
) -> tuple[Step, dict[str, Buffer]]:
    """Plan the launch of the attention kernel, and its workspace."""
    problem, runtime, spec = prepared.problem, prepared.runtime, tiling.spec
    packed = tiling.heads_per_tile
    multiplier, shift = divisor(packed)
    row_stride, head_stride = lse_strides or (0, 0)
    numbers: dict[str, float] = {
        **arguments.strides("q", runtime.q_strides),
        **arguments.strides("k", runtime.k_strides),
        **arguments.strides("v", runtime.v_strides),
        **arguments.strides("out", out_strides),
        "lse_stride_batch": row_stride,
        "lse_stride_head": head_stride,
        "batch": runtime.batch,
        "len_q": runtime.len_q,
        "heads_q": runtime.heads_q,
        "heads_per_kv": runtime.heads_q // runtime.heads_kv,
        "heads_per_tile": packed,
        "num_q_tiles": tiling.num_q_tiles,
        "num_splits": tiling.num_splits,
        "num_slots": tiling.num_slots,
        "negate_q": runtime.scale < 0,
        "row_div_mul": multiplier,
        "row_div_shift": shift,
        "scale_log2": arguments.positive_scale(runtime) * arguments.LOG2_E,
    }
    places = {**prepared.inputs, "out": Place("out"), **{name: Place(name) for name in LENGTHS}}
    if lse_strides is None:
        numbers["lse"] = 0
    else:
        places["lse"] = Place("lse")
    buffers: dict[str, Buffer] = {}
    if tiling.num_splits == 1:
        numbers |= dict.fromkeys(("partial_out", "partial_lse", "arrivals"), 0)
    else:
        # One allocation: the partial outputs of all items, then their LSEs.
        num_rows = tiling.num_ctas * spec.tile.block_q
        values = num_rows * problem.head_dim_v
        buffers["partial"] = Buffer((values + num_rows,), "fp32")
        places["partial_out"] = Place("partial")
        places["partial_lse"] = Place("partial", 4 * values)
        places["arrivals"] = Place("counters")
    more_numbers, more_places = arguments.tail(problem, runtime, positions)
    numbers |= {**more_numbers, **prepared.scale_numbers}
    places |= {**more_places, **prepared.scale_places}
    if not isinstance(spec, FwdSm90Spec):
        return Step(spec, tiling.num_ctas, numbers, places), buffers
    numbers["num_items"] = tiling.num_ctas
    numbers["section_heads"] = wgmma.section_heads(problem, runtime, packed)
    numbers["piece_rows"] = wgmma.piece_rows(problem, runtime, spec.tile)
    places["tile_counter"] = Place("counters", 4 * (num_counters(tiling) - 1))
    maps = wgmma.maps_of(problem, runtime, spec.tile, packed)
    return Step(spec, min(tiling.num_ctas, tiling.num_slots), numbers, places, maps), buffers
