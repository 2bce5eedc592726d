"""Named grids of cases: SMOKE, EDGE and FULL.

A kernel is compiled for each distinct spec (dtypes, head dims, mask kind, alignment class, row
class), at a third to two thirds of a second each: so lengths, heads, batches, strides,
scales and splits vary freely, and specs are chosen. EDGE stays below 80 specs, FULL below 250
(`test_masks.py` counts them).

Left out on purpose: every product of everything. Head dims meet each dtype once; the row classes,
masks and variants meet each other on head dims 64 and 128 only, because no code path depends on
both a row class and a particular head dim beyond what the head dims themselves cover.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

import torch

from jitattn.values.masks import Causal, Full, Mask

FP16, BF16, FP32 = torch.float16, torch.bfloat16, torch.float32
DTYPE_NAMES = {FP16: "fp16", BF16: "bf16", FP32: "fp32"}
FULL_MASK, BOTTOM_RIGHT, TOP_LEFT = Full(), Causal(), Causal("top_left")
MASK_NAMES: dict[Mask, str] = {FULL_MASK: "full", BOTTOM_RIGHT: "causal", TOP_LEFT: "top_left"}

#: Memory layouts of the tensors (`inputs.strides_for`).
VARIANTS = (
    "plain",  # contiguous
    "batch_gap",  # batch stride larger than dense: a slice of a cache with room
    "row_gap",  # row stride larger, still 16-byte rows: q, k and v fused in one projection
    "odd_row",  # row stride no multiple of 16 bytes: the ELEMENT class
    "unaligned",  # starts one element after a 16-byte boundary: the ELEMENT class
    "one_head",  # head stride 0: every head is the same memory, as after expand
    "wide_row",  # row stride of 2**20 elements: offsets inside a tile pass 2**26
)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A call of `attention`."""

    dtype: torch.dtype = BF16
    head_dim: int = 64
    head_dim_v: int = 64
    mask: Mask = BOTTOM_RIGHT
    batch: int = 2
    len_q: int = 100
    len_kv: int = 100
    heads_q: int = 2
    heads_kv: int = 2
    scale: float | None = None
    layout: str = "bshd"
    variant: str = "plain"
    num_splits: int | None = None
    out_dtype: torch.dtype | None = None

    @property
    def name(self) -> str:
        """Unique name, readable in a test id."""
        parts = [
            DTYPE_NAMES[self.dtype],
            f"d{self.head_dim}x{self.head_dim_v}",
            MASK_NAMES[self.mask],
            f"b{self.batch}",
            f"q{self.len_q}",
            f"k{self.len_kv}",
            f"h{self.heads_q}_{self.heads_kv}",
        ]
        parts += [self.layout] * (self.layout != "bshd")
        parts += [self.variant] * (self.variant != "plain")
        parts += [] if self.scale is None else [f"scale{self.scale:g}"]
        parts += [] if self.num_splits is None else [f"s{self.num_splits}"]
        parts += [] if self.out_dtype is None else [f"out_{DTYPE_NAMES[self.out_dtype]}"]
        return "-".join(parts)

    @property
    def result_dtype(self) -> torch.dtype:
        return self.dtype if self.out_dtype is None else self.out_dtype

    @property
    def rows(self) -> int:
        """Query rows per KV head after GQA packing, which determine the row class."""
        return self.len_q * (self.heads_q // self.heads_kv if self.heads_kv else 1)

    @property
    def cap_scale(self) -> float:
        """Factor by which large scores widen the fp32 cap, as errors of scores are relative."""
        if self.scale is None or self.dtype is not FP32:
            return 1.0
        return max(1.0, abs(self.scale) * self.head_dim**0.5)

    def with_variant(self, variant: str) -> Case:
        return replace(self, variant=variant)


#: (D, Dv) of EDGE.
EDGE_DIMS = (
    (1, 1),  # one column: 15 of 16 padded, ELEMENT access
    (8, 8),  # half an MMA tile, the smallest row of 16 bytes (16-bit dtypes)
    (33, 33),  # odd: no row but the first is aligned, ELEMENT access
    (40, 40),  # 8 columns past a multiple of 16 (Stable Diffusion)
    (64, 64),  # the common small head
    (72, 72),  # multiple of 8 between 64 and 80
    (80, 80),  # no power of two: the general swizzle
    (96, 96),  # 192-byte rows: another swizzle span
    (112, 112),  # the last multiple of 16 below 128
    (128, 128),  # the common large head
    (160, 160),  # above 128: other tiles
    (192, 192),  # as 160, power-of-two-like rows of 384 bytes
    (256, 256),  # the largest: least shared memory left
    (192, 128),  # D > Dv (DeepSeek)
    (64, 80),  # D < Dv
    (128, 1),  # a value row of one element: ELEMENT access with a large D
)
#: Further head dims of FULL: every multiple of 16 and some odd ones.
FULL_DIMS = (
    *EDGE_DIMS,
    (16, 16),  # one MMA tile exactly
    (24, 24),  # 8 past it
    (48, 48),
    (100, 100),  # 200 bytes: 8-byte rows, ELEMENT access
    (144, 144),
    (208, 208),
    (255, 255),  # the largest odd one
    (256, 64),  # far apart
)
#: Lengths around the tiles: nothing, one, and one either side of 16 (ROWS16 and MMA rows), 64 (keys
#: of a step, ROWS64) and 128 (rows of the large tile), and something with several blocks.
EDGE_LENGTHS = (0, 1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 300)


def _smoke() -> tuple[Case, ...]:
    """Return a few cases: each dtype, mask, layout and the short-query path once."""
    return (
        Case(),
        Case(dtype=FP16, mask=FULL_MASK, head_dim=128, head_dim_v=128, layout="bhsd"),
        Case(dtype=FP32, mask=TOP_LEFT, len_q=70, len_kv=130),
        Case(len_q=1, len_kv=300, heads_q=8, heads_kv=1, mask=FULL_MASK),
        Case(len_q=8, len_kv=500, heads_q=4, num_splits=3),
        Case(len_q=5, len_kv=0),
        Case(len_q=130, len_kv=60, dtype=FP16),  # the first 70 rows see nothing
        Case(head_dim=33, head_dim_v=20, dtype=FP32, variant="unaligned"),
    )


def _dims(dims: tuple[tuple[int, int], ...]) -> list[Case]:
    """Return each head dim with each dtype; masks and row classes alternate."""
    cases = []
    for idx, (head_dim, head_dim_v) in enumerate(dims):
        shape = {"head_dim": head_dim, "head_dim_v": head_dim_v}
        short = ({"len_q": 5, "len_kv": 150}, {"len_q": 50, "len_kv": 77})[idx % 2]
        cases += [
            # MANY rows, more than two tiles of either side, ends in the middle of both.
            Case(**shape, dtype=BF16, mask=BOTTOM_RIGHT, len_q=141, len_kv=203),
            Case(**shape, dtype=FP16, mask=FULL_MASK, **short),
            Case(
                **shape,
                dtype=FP32,
                mask=(BOTTOM_RIGHT, FULL_MASK)[idx % 2],
                len_q=77,
                len_kv=141,
                heads_kv=1,
            ),
        ]
    return cases


def _lengths() -> list[Case]:
    """Return pairs of lengths, in three families of one dtype and head dim each."""
    cases = []
    masks = (FULL_MASK, BOTTOM_RIGHT, TOP_LEFT)
    for idx, len_q in enumerate(EDGE_LENGTHS):
        for step, len_kv in enumerate(EDGE_LENGTHS):
            # Each pair once, with alternating masks and dtypes: every length meets all of them.
            mask = masks[(idx + step) % 3]
            if (idx * 5 + step) % 3 == 0:
                cases.append(Case(len_q=len_q, len_kv=len_kv, mask=mask))
            elif (idx * 5 + step) % 3 == 1:
                cases.append(
                    Case(
                        len_q=len_q, len_kv=len_kv, mask=mask, dtype=FP16, head_dim=128,
                        head_dim_v=128, batch=1,
                    )
                )  # fmt: skip
            else:
                cases.append(
                    Case(len_q=len_q, len_kv=len_kv, mask=mask, dtype=FP32, heads_q=1, heads_kv=1)
                )
    return cases


def _heads() -> list[Case]:
    """Return GQA ratios through the row packing, and head or batch counts of 0."""
    ratios = (
        (3, 3),  # GQA 1: nothing packed
        (6, 2),  # GQA 3: no power of two, so rows / 3 by the fast divisor
        (16, 2),  # GQA 8: the common one
        (32, 1),  # MQA: one kv head; len_q 1 fills two tiles of 16
    )
    cases = []
    for heads_q, heads_kv in ratios:
        shape = {"heads_q": heads_q, "heads_kv": heads_kv}
        cases += [
            Case(**shape, len_q=1, len_kv=200),  # decode
            Case(**shape, len_q=2, len_kv=65, mask=FULL_MASK),
            Case(**shape, len_q=5, len_kv=130),  # packed rows cross the row classes
            Case(**shape, len_q=129, len_kv=140, batch=1),
        ]
    return [
        *cases,
        Case(batch=0),
        Case(heads_q=0, heads_kv=0),
        Case(batch=5, heads_q=7, heads_kv=7, len_q=3, len_kv=64),  # odd grid sizes
    ]


def _memory() -> list[Case]:
    """Return strides, alignments and 64-bit row offsets, with long and short queries."""
    cases = []
    for variant in VARIANTS[1:]:
        long = {"len_q": 100, "len_kv": 77}
        short = {"len_q": 3, "len_kv": 77, "mask": FULL_MASK}
        if variant == "wide_row":  # 2 MiB a row: few rows
            long, short = {"len_q": 12, "len_kv": 20, "batch": 1}, {"len_q": 2, "len_kv": 20}
        for layout in ("bshd", "bhsd"):
            cases.append(Case(**long, variant=variant, layout=layout, heads_q=4))
            if variant != "wide_row" or layout == "bhsd":
                cases.append(Case(**short, variant=variant, layout=layout))
        if variant in ("unaligned", "one_head"):
            cases.append(Case(**long, variant=variant, dtype=FP32))
    return cases


def _splits() -> list[Case]:
    """Return split-KV cases: one, two, an odd number, more splits than key blocks."""
    shape = {"head_dim": 128, "head_dim_v": 128, "heads_q": 8, "heads_kv": 2}
    cases = [
        Case(**shape, len_q=4, len_kv=len_kv, mask=mask, num_splits=splits)
        for splits, len_kv in ((1, 700), (2, 700), (7, 700), (7, 100), (64, 200))
        for mask in (FULL_MASK, BOTTOM_RIGHT)
    ]
    return [
        *cases,
        Case(len_q=150, len_kv=260, num_splits=3),  # many rows, split on demand
        Case(len_q=4, len_kv=3, num_splits=2),  # causal rows that see nothing, in every split
        Case(len_q=4, len_kv=0, num_splits=4),
        Case(dtype=FP32, len_q=6, len_kv=400, num_splits=5),
        Case(dtype=FP16, len_q=6, len_kv=400, head_dim=72, head_dim_v=72, num_splits=2),
        Case(len_q=6, len_kv=300, num_splits=4, layout="bhsd", variant="row_gap"),
    ]


def _scales() -> list[Case]:
    """Return scales that move the maximum: the kernel folds a sign into q, and rescales lazily."""
    return [
        Case(scale=scale, dtype=dtype)
        for scale in (
            -0.125,  # the smallest product wins
            0.0,  # every key weighs the same
            2.0,  # one key takes nearly all; maxima rise by more than the lazy bound
            1e-6,  # exponents all alike
        )
        for dtype in (BF16, FP32)
    ]


def _out_dtypes() -> list[Case]:
    """Return fp32 outputs, directly and through the combine kernel."""
    return [
        Case(out_dtype=FP32),
        Case(out_dtype=FP32, len_q=4, len_kv=200, num_splits=3),
        Case(out_dtype=FP32, dtype=FP16, mask=FULL_MASK, head_dim=128, head_dim_v=128),
        Case(out_dtype=FP32, head_dim=33, head_dim_v=33),
    ]


def _full() -> list[Case]:
    """Return more head dims with both masks and every dtype; lengths and heads are random."""
    draw = random.Random(20)
    cases = []
    for head_dim, head_dim_v in FULL_DIMS:
        for dtype in (BF16, FP16, FP32):
            for mask in (FULL_MASK, BOTTOM_RIGHT):
                short = draw.random() < 0.4
                heads_kv = draw.choice((1, 2, 3))
                cases.append(
                    Case(
                        dtype=dtype,
                        head_dim=head_dim,
                        head_dim_v=head_dim_v,
                        mask=mask,
                        batch=draw.choice((1, 2, 3)),
                        len_q=draw.choice((1, 4, 9)) if short else draw.randint(100, 700),
                        len_kv=draw.randint(1, 3000),
                        heads_kv=heads_kv,
                        heads_q=heads_kv * draw.choice((1, 2, 5)),
                        layout=draw.choice(("bshd", "bhsd")),
                    )
                )
    return cases


SMOKE: tuple[Case, ...] = _smoke()
EDGE: tuple[Case, ...] = tuple(
    dict.fromkeys(
        _dims(EDGE_DIMS)
        + _lengths()
        + _heads()
        + _memory()
        + _splits()
        + _scales()
        + _out_dtypes()
        + list(_smoke())
    )
)
FULL: tuple[Case, ...] = tuple(case for case in dict.fromkeys(_full()) if case not in set(EDGE))


def spec_facts(case: Case) -> tuple[object, ...]:
    """Return the facts of a case that determine its forward kernel."""
    row_class = 16 if case.rows <= 16 else 64 if case.rows <= 64 else 0
    size = 4 if case.dtype is FP32 else 2
    aligned = (
        case.variant not in ("odd_row", "unaligned")
        and case.head_dim * size % 16 == 0
        and case.head_dim_v * size % 16 == 0
    )
    return (
        case.dtype,
        case.result_dtype,
        case.head_dim,
        case.head_dim_v,
        case.mask == FULL_MASK,
        aligned,
        row_class,
    )
