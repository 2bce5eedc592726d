"""What changes machine code: `Problem` (what was asked), `Tile` (what we chose), and the specs.

A fact is in a spec if and only if it changes machine code. Lengths, batch, head counts, strides,
pointers and the direction of the diagonal are runtime parameters (`spec/params.py`). Specs are
frozen, hashable, and render to one canonical JSON text, from which the cache key is made.

This module imports nothing of jitattn but its enums, no torch and no CuPy.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from enum import StrEnum
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeAlias, get_origin, get_type_hints

from jitattn.spec.enums import (
    Access,
    BiasKind,
    Dtype,
    MaskKind,
    Numerics,
    RotaryStyle,
    ScoreTarget,
    SeqLayout,
    Staging,
    Switch,
)

if TYPE_CHECKING:
    from collections.abc import Mapping

#: Names of architectures. Whether a compiler knows one is the compiler's affair.
ARCH: Final = re.compile(r"sm_[1-9][0-9]{1,2}[af]?")
#: Largest value of an int field, where it is not that of any other.
_LARGEST: Final = {"head_dim": 256, "head_dim_v": 256, "num_parts": 2}
_LARGEST_OTHER: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """What was asked, as far as it changes machine code."""

    dtype: Dtype
    out_dtype: Dtype
    head_dim: int  #: of q and k, 1…256
    head_dim_v: int  #: of v and out, 1…256
    mask: MaskKind
    numerics: Numerics
    q_layout: SeqLayout = SeqLayout.BATCHED
    kv_layout: SeqLayout = SeqLayout.BATCHED
    access: Access = Access.VEC16
    bias: BiasKind = BiasKind.NONE
    relative_bias: Switch = Switch.OFF
    alibi: Switch = Switch.OFF
    softcap: Switch = Switch.OFF
    sinks: Switch = Switch.OFF
    key_padding: Switch = Switch.OFF
    dense: Switch = Switch.OFF
    dropout: Switch = Switch.OFF
    fixed_shift: Switch = Switch.OFF  #: no running maximum: scores are bounded
    bias_staged: Staging = Staging.OFF
    dense_staged: Staging = Staging.OFF

    @property
    def has_scores(self) -> bool:
        """Whether mask or anything else asks for more than q k^T, scaled."""
        optional = (
            self.relative_bias,
            self.alibi,
            self.softcap,
            self.sinks,
            self.dropout,
            self.fixed_shift,
        )
        return (
            self.mask not in (MaskKind.FULL, MaskKind.CAUSAL)
            or self.bias is not BiasKind.NONE
            or Switch.ON in (*optional, self.key_padding, self.dense)
        )

    @property
    def is_uniform(self) -> bool:
        """Whether all sequences of the batch are alike, and the kernel knows it."""
        batched = self.q_layout is SeqLayout.BATCHED is self.kv_layout
        return batched and self.mask is not MaskKind.BLOCK_LISTS

    @property
    def gather_group(self) -> int:
        """Keys that are looked up together; 0 where they lie one after another."""
        return self.kv_layout.page_group or (16 if self.mask is MaskKind.BLOCK_LISTS else 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """How the work is cut: what we chose for a problem on an architecture."""

    block_q: int  #: rows of a CTA's query tile (after GQA packing)
    block_kv: int  #: keys of one step
    warps_q: int  #: warps side by side along the rows; each owns block_q / warps_q rows
    warps_kv: int  #: warps side by side along the keys of a step
    stages: int  #: K and V buffers; 1 takes two barriers a step, 2 or more one
    min_blocks_per_sm: int  #: what __launch_bounds__ promises

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.warps_q * self.warps_kv


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdTile:
    """How the work of a backward kernel is cut. Each product has its own grid of warps."""

    block_q: int  #: rows of a step
    block_kv: int  #: keys of a CTA
    num_warps: int
    warps_scores: int  #: warps that compute scores
    warps_q: int  #: of them side by side along the rows
    warps_keys: int  #: warps side by side along the rows of dK and dV
    warps_dq: int  #: along the rows of dQ
    stages: int  #: Q and dO buffers; 1 takes four barriers a step, 2 two
    min_blocks_per_sm: int  #: what __launch_bounds__ promises


def padded_head_dim(head_dim: int) -> int:
    """Round a head dimension up to the MMA granularity of 16 columns."""
    return -(-head_dim // 16) * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class _Extra:
    """A field of `BwdSpec` beside those of its problem and its tile."""

    deterministic: Switch


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """The same of `ScoreGradSpec`."""

    target: ScoreTarget


class _Spec:
    """How every spec is rendered."""

    __slots__ = ()
    family: ClassVar[str]
    derived: ClassVar[tuple[str, ...]] = ()  #: properties that the kernel needs beside the fields
    arch: str

    @property
    def parts(self) -> tuple[Any, ...]:
        """Dataclasses whose fields are those of the kernel."""
        return (self,)

    def to_dict(self) -> dict[str, str | int]:
        """Flat fields, in declaration order: family, arch, then the kernel's own."""
        flat: dict[str, str | int] = {"family": self.family, "arch": self.arch}
        for part in self.parts:
            for field in fields(part):
                value = getattr(part, field.name)
                flat[field.name] = value.value if isinstance(value, StrEnum) else value
        return flat

    def to_key(self) -> str:
        """Return the canonical JSON text of the spec (sorted keys, no spaces)."""
        return json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))


@dataclass(frozen=True, slots=True, kw_only=True)
class FwdSpec(_Spec):
    """The forward kernel."""

    family: ClassVar[str] = "fwd"
    problem: Problem
    tile: Tile
    arch: str  #: "sm_80", "sm_90" …

    @property
    def parts(self) -> tuple[Any, ...]:
        """Dataclasses whose fields are those of the kernel."""
        return self.problem, self.tile

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return self.tile.num_threads

    @property
    def params(self) -> str:
        """Name of the parameter struct (`spec/params.py`)."""
        numerics = self.problem.numerics
        scaled = "_scaled" if numerics.is_quantized or numerics.num_parts else ""
        return f"fwd{_params_suffix(self.problem)}{scaled}"

    @property
    def holds_q(self) -> bool:
        """Whether Q stays in registers; `traits.cuh` has the same rule."""
        problem, tile = self.problem, self.tile
        dim = padded_head_dim(problem.head_dim)
        if not problem.numerics.is_quantized or dim > 128:
            return False
        if problem.numerics is Numerics.INT8_F16:
            return tile.block_kv <= (32 if dim > 64 else 64)
        has_gap = problem.mask in (MaskKind.WINDOW, MaskKind.LOCAL_STRIDE)
        return tile.stages > 1 and not has_gap

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA; `traits.cuh` asserts the same number."""
        problem, tile = self.problem, self.tile
        dim, dim_v = padded_head_dim(problem.head_dim), padded_head_dim(problem.head_dim_v)
        size = 2 * problem.numerics.num_parts or problem.dtype.bytes
        size_qk = 1 if problem.numerics.is_quantized else size
        s_q = tile.block_q * dim * size_qk
        if problem.numerics is Numerics.INT8_F16:
            # Sums in fp16 that wait, and the maxima that they are for: where Q was, if it is held.
            s_parked = tile.block_q * (2 * dim_v + 16)
            s_q = max(s_q, s_parked) if self.holds_q else s_q + s_parked
        s_kv = tile.stages * tile.block_kv * (dim * size_qk + dim_v * size)
        # After the loop the same space carries the output tile, and the partial results of the
        # warps that split the keys: r_o, m and l of every warp_kv but the first, in fp32.
        s_out = tile.block_q * dim_v * (2 if problem.out_dtype is not Dtype.FP32 else 0)
        s_merge = (tile.warps_kv - 1) * tile.block_q * (dim_v + 2) * 4
        # Behind that: the plan of a CTA, and the rows of keys that are gathered.
        s_rows = 0
        if group := problem.gather_group:
            group = group if tile.num_threads >= 128 else 1
            batch = 8 if group == 16 else 4  # blocks that are looked up together
            s_rows = 2 * batch * (tile.block_kv // group) * 16
            if problem.mask is MaskKind.BLOCK_LISTS:
                s_rows += 2 * batch * (tile.block_kv // 16) * 8
        # And tiles of a bias and of a dense mask, with room between their rows.
        s_matrices = 0
        if problem.bias_staged is not Staging.OFF:
            wide = problem.bias is BiasKind.FP32 or problem.dtype is Dtype.FP32
            pitch = tile.block_kv * 4 + 32 if wide else tile.block_kv * 2 + 16
            rows = tile.block_q if problem.bias_staged is Staging.MATRIX else 1
            s_matrices += tile.stages * rows * pitch
        if problem.dense_staged is Staging.MATRIX:
            s_matrices += tile.stages * tile.block_q * (tile.block_kv + 16)
        return max(s_q + s_kv, s_out, s_merge) + 64 + s_rows + s_matrices


def _params_suffix(problem: Problem) -> str:
    """Name what a kernel reads beside the fields that every one of its family has."""
    if problem.mask is MaskKind.BLOCK_LISTS:
        return "_list"
    if problem.has_scores:
        return "_score"
    return "" if problem.is_uniform else "_seq"


class _BackwardSpec(_Spec):
    """What the kernels with a backward tile have in common."""

    __slots__ = ()
    problem: Problem
    tile: BwdTile

    @property
    def num_threads(self) -> int:
        """Threads of a CTA."""
        return 32 * self.tile.num_warps

    @property
    def params(self) -> str:
        """Name of the parameter struct (`spec/params.py`)."""
        scaled = "_scaled" if self.problem.numerics.num_parts else ""
        return f"bwd{_params_suffix(self.problem)}{scaled}"

    @property
    def smem_bytes(self) -> int:
        """Dynamic shared memory of a CTA; `bwd_traits.cuh` asserts the same number."""
        problem, tile = self.problem, self.tile
        dims = padded_head_dim(problem.head_dim) + padded_head_dim(problem.head_dim_v)
        rows = tile.block_kv + tile.stages * tile.block_q
        size = (rows * dims + 2 * tile.block_q * tile.block_kv) * problem.dtype.bytes
        stats = 3 if problem.sinks is Switch.ON else 2
        size += 2 * 4 * stats * tile.block_q
        if problem.numerics.num_parts:  # scales of Q, dO and dS
            size += 2 * 16 + 4 * tile.warps_scores
        if problem.mask is MaskKind.BLOCK_LISTS:
            groups = tile.block_kv // 16
            size += 2 * 8 * groups + 2 * (self.num_threads // 8) + self.num_threads * groups * 4
        return size


@dataclass(frozen=True, slots=True, kw_only=True)
class BwdSpec(_BackwardSpec):
    """The backward kernel: dK, dV, and the sums of dQ."""

    family: ClassVar[str] = "bwd"
    problem: Problem  #: as `backward_problem` has it
    tile: BwdTile
    deterministic: Switch  #: key blocks add to dQ in their order
    arch: str

    @property
    def parts(self) -> tuple[Any, ...]:
        """Dataclasses whose fields are those of the kernel."""
        return self.problem, self.tile, _Extra(deterministic=self.deterministic)

    @property
    def in_fragments(self) -> bool:
        """Whether the sums of dQ lie in fragment order."""
        return self.problem.q_layout == self.problem.kv_layout == SeqLayout.BATCHED

    @property
    def dq_columns(self) -> int:
        """Columns of a query tile's sums in fragment order."""
        across = self.tile.num_warps // self.tile.warps_dq
        units = padded_head_dim(self.problem.head_dim) // 16
        return across * -(-units // across) * 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreGradSpec(_BackwardSpec):
    """The kernel for gradients of what is added to scores."""

    family: ClassVar[str] = "bwd_scores"
    problem: Problem  #: as `backward_problem` has it
    tile: BwdTile
    target: ScoreTarget
    arch: str

    @property
    def parts(self) -> tuple[Any, ...]:
        """Dataclasses whose fields are those of the kernel."""
        return self.problem, self.tile, _Target(target=self.target)


@dataclass(frozen=True, slots=True, kw_only=True)
class StatsSpec(_Spec):
    """The kernel that prepares LSE and delta of every row for the backward kernel."""

    family: ClassVar[str] = "stats"
    params: ClassVar[str] = "stats"
    derived: ClassVar[tuple[str, ...]] = ("lanes",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of out and dO
    head_dim_v: int
    access: Access
    arch: str

    @property
    def lanes(self) -> int:
        """Lanes that share a row: a power of two, with two accesses each or more, if it has two."""
        wide = 16 // self.dtype.bytes if self.access is Access.VEC16 else 1
        accesses = self.head_dim_v // wide
        return min(32, 1 << (max(accesses // 2, 1).bit_length() - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundSpec(_Spec):
    """The kernel that makes dQ of its sums in fragment order."""

    family: ClassVar[str] = "round"
    params: ClassVar[str] = "round"
    derived: ClassVar[tuple[str, ...]] = ("column_tiles",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    block_q: int  #: of the backward kernel
    num_warps: int
    warps_dq: int
    arch: str

    @property
    def column_tiles(self) -> int:
        """Tiles of 16 rows and 8 columns that a warp rounds."""
        return 4 if padded_head_dim(self.head_dim) % 32 == 0 else 2


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfGradients(_Spec):
    """What the kernels that add up fp32 parts of a gradient have in common."""

    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of the gradient
    head_dim: int
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SumPartsSpec(_OfGradients):
    """The kernel for parts in the order of the gradient."""

    family: ClassVar[str] = "sum_parts"
    params: ClassVar[str] = "sum_parts"


@dataclass(frozen=True, slots=True, kw_only=True)
class ScatterSpec(_OfGradients):
    """The kernel for dK or dV of keys that sequences share, of parts by sequences."""

    family: ClassVar[str] = "kv_scatter"
    params: ClassVar[str] = "kv_scatter"


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfParts(_Spec):
    """What the kernels over results for disjoint sets of keys have in common."""

    num_threads: ClassVar[int] = 128
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of the parts
    out_dtype: Dtype
    head_dim_v: int
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeSpec(_OfParts):
    """The kernel that merges them, in a fixed order."""

    family: ClassVar[str] = "merge"
    params: ClassVar[str] = "merge"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeGradSpec(_OfParts):
    """The kernel for the gradient of a merge."""

    family: ClassVar[str] = "merge_grad"
    params: ClassVar[str] = "merge_grad"


@dataclass(frozen=True, slots=True, kw_only=True)
class AppendSpec(_Spec):
    """The kernel that appends to a KV cache, with rotary embedding; head dims are parameters."""

    family: ClassVar[str] = "append"
    params: ClassVar[str] = "append"
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    table_dtype: Dtype  #: of cos and sin
    rotary: RotaryStyle
    access: Access
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RotarySpec(_Spec):
    """The kernel of a rotary embedding and of its gradient; dims are parameters."""

    family: ClassVar[str] = "rotary"
    params: ClassVar[str] = "rotary"
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    table_dtype: Dtype  #: of cos and sin
    interleaved: Switch  #: columns 2i and 2i + 1 are a pair, rather than i and i + rotary_dim / 2
    access: Access
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _OfSlices(_Spec):
    """What the kernels over slices of vectors have in common."""

    derived: ClassVar[tuple[str, ...]] = ("lanes",)
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    groups: int
    access: Access
    arch: str

    @property
    def lanes(self) -> int:
        """Lanes that share a slice: a power of two, with at least one access each."""
        size = self.head_dim // self.groups
        wide = 16 // self.dtype.bytes
        is_wide = self.access is Access.VEC16 and size % wide == 0
        accesses = size // wide if is_wide else size
        return min(32, 1 << (accesses.bit_length() - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class NormSpec(_OfSlices):
    """The kernel that scales q and k to length 1, by groups of columns."""

    family: ClassVar[str] = "norm"
    params: ClassVar[str] = "norm"


@dataclass(frozen=True, slots=True, kw_only=True)
class NormGradSpec(_OfSlices):
    """The kernel for its gradient, of q or of k."""

    family: ClassVar[str] = "norm_grad"
    params: ClassVar[str] = "norm_grad"


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelStatsSpec(_Spec):
    """The kernel that finds the mean and the range of every channel of q and k."""

    family: ClassVar[str] = "channel_stats"
    params: ClassVar[str] = "quant"
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    chunk_rows: int  #: of a CTA
    paged: Switch  #: whether k lies in pages
    values: Switch  #: whether v is to be scaled as well
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitHalvesSpec(_Spec):
    """The kernel that makes fp16 parts of q, k and v, and for a backward kernel of dO."""

    family: ClassVar[str] = "split_halves"
    params: ClassVar[str] = "split"
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype  #: of q, k and v: fp32
    head_dim: int
    head_dim_v: int
    num_parts: int  #: 2, or 1: the high one
    gradients: Switch  #: dO too; q by blocks of rows, as all others
    arch: str


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantizeSpec(_Spec):
    """The kernel that brings q and k to 8 bits."""

    family: ClassVar[str] = "quantize"
    params: ClassVar[str] = "quant"
    num_threads: ClassVar[int] = 256
    smem_bytes: ClassVar[int] = 0
    dtype: Dtype
    head_dim: int
    paged: Switch  #: as in `ChannelStatsSpec`
    values: Switch  #: whether v comes to fp16, as in `ChannelStatsSpec`
    arch: str


#: Kernels whose fields are all that there is to them: no tile is chosen.
PlainSpec: TypeAlias = (
    MergeSpec
    | MergeGradSpec
    | AppendSpec
    | RotarySpec
    | NormSpec
    | NormGradSpec
    | StatsSpec
    | RoundSpec
    | SumPartsSpec
    | ScatterSpec
    | ChannelStatsSpec
    | QuantizeSpec
    | SplitHalvesSpec
)
KernelSpec: TypeAlias = FwdSpec | BwdSpec | ScoreGradSpec | PlainSpec

PLAIN_FAMILIES: Final[dict[str, type[PlainSpec]]] = {
    MergeSpec.family: MergeSpec,
    MergeGradSpec.family: MergeGradSpec,
    AppendSpec.family: AppendSpec,
    RotarySpec.family: RotarySpec,
    NormSpec.family: NormSpec,
    NormGradSpec.family: NormGradSpec,
    StatsSpec.family: StatsSpec,
    RoundSpec.family: RoundSpec,
    SumPartsSpec.family: SumPartsSpec,
    ScatterSpec.family: ScatterSpec,
    ChannelStatsSpec.family: ChannelStatsSpec,
    QuantizeSpec.family: QuantizeSpec,
    SplitHalvesSpec.family: SplitHalvesSpec,
}
#: Entry file and symbol of each family: cuda_src/entry/<family>.cu holds jitattn_<family>.
FAMILIES: Final = (
    FwdSpec.family,
    BwdSpec.family,
    ScoreGradSpec.family,
    *PLAIN_FAMILIES,
)


def entry_symbol(spec: KernelSpec) -> str:
    """Name of the one extern "C" kernel in the cubin of `spec`."""
    return f"jitattn_{spec.family}"


def spec_from_dict(flat: Mapping[str, Any]) -> KernelSpec:
    """Build the spec whose `to_dict` this is.

    Raises
    ------
    ValueError
        It is of no known family, a field is missing or unknown, or a value is of another kind or
        none that a kernel can have. `render` takes whatever this returns.
    """
    values = dict(flat)
    family, arch = values.pop("family", None), values.pop("arch", None)
    if not (isinstance(arch, str) and ARCH.fullmatch(arch)):
        raise ValueError(f"no architecture in the spec {flat}")
    plain = PLAIN_FAMILIES.get(str(family))
    if plain is not None:
        spec: KernelSpec = plain(arch=arch, **_typed(plain, values, flat))
    elif family == FwdSpec.family:
        problem = Problem(**_typed(Problem, values, flat))
        spec = FwdSpec(problem=problem, tile=Tile(**_typed(Tile, values, flat)), arch=arch)
    elif family in (BwdSpec.family, ScoreGradSpec.family):
        problem, tile = Problem(**_typed(Problem, values, flat)), _typed(BwdTile, values, flat)
        cut = BwdTile(**tile)
        if family == BwdSpec.family:
            extra = _typed(_Extra, values, flat)
            spec = BwdSpec(problem=problem, tile=cut, arch=arch, **extra)
        else:
            extra = _typed(_Target, values, flat)
            spec = ScoreGradSpec(problem=problem, tile=cut, arch=arch, **extra)
    else:
        raise ValueError(f"unknown family in the spec {flat}")
    if values:
        raise ValueError(f"unknown fields {sorted(values)} in the spec {flat}")
    reason = impossible(spec)
    if reason is not None:
        raise ValueError(f"{reason} in the spec {flat}")
    return spec


def impossible(spec: KernelSpec) -> str | None:
    """Name the number of a spec that no kernel can have; None if all are possible."""
    for part in spec.parts:
        for field in fields(part):
            value = getattr(part, field.name)
            most = _LARGEST.get(field.name, _LARGEST_OTHER)
            if type(value) is int and not 1 <= value <= most:
                return f"{field.name}={value}: it must be from 1 to {most}"
    if isinstance(spec, _OfSlices) and spec.head_dim % spec.groups:
        return f"groups={spec.groups}: it must divide head_dim={spec.head_dim}"
    return None


def _typed(kind: type, values: dict[str, Any], flat: Mapping[str, Any]) -> dict[str, Any]:
    """Take the fields of a dataclass out of `values`, each as the type that it is declared with."""
    typed = {}
    for name, hint in get_type_hints(kind).items():
        if name == "arch" or get_origin(hint) is ClassVar:
            continue
        if name not in values:
            raise ValueError(f"field {name} is missing in the spec {flat}")
        value = values.pop(name)
        if issubclass(hint, StrEnum):
            value = hint(value)
        elif type(value) is not hint:
            raise ValueError(f"field {name} is {value!r} in the spec {flat}")
        typed[name] = value
    return typed


def arch_number(arch: str) -> int:
    """'sm_90' → 90, 'sm_90a' → 90."""
    return int(arch.removeprefix("sm_").rstrip("af"))
