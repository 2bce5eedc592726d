"""Mask values. Frozen; this module imports no torch.

True means attend. `a & b` is the intersection: at most one positional rule
(`Full`, `Causal`, `Window`, `LocalStride`, `BlockSparse`, `PerHead`), at most one `KeyPadding`, at
most one `Dense`, and any number of `MaskMod`. (A `Causal` and a `Window` are one window, and a
`BlockSparse` may be causal.)

A rule's `graph_number` names it in exported graphs, which hold its fields as well: a number is
never used again for another.

All can be copied, deep-copied and pickled. Rules made of numbers are compared and hashed by value.
A mask that holds a tensor (`BlockSparse`, `KeyPadding`, `Dense`, and their intersections) equals
only itself, not even a copy, as tensors are not compared.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, ClassVar, Final, Literal, TypeAlias, get_args

from jitattn.errors import InvalidInputError
from jitattn.spec.enums import MaskKind
from jitattn.values.frozen import short_text
from jitattn.values.given import integer
from jitattn.values.mask_base import KernelMask, check_block_size, is_count
from jitattn.values.mask_functions import FunctionOfPairs

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from jitattn.values.functions import Function

Align: TypeAlias = Literal["bottom_right", "top_left"]
_MAX_REACH = 2**30
_MOST_SHOWN = 3  # rules of a `PerHead` in messages
#: Block sizes of local + stride patterns that need no lists: whole kernel blocks.
_KERNEL_BLOCKS = (64, 128)


class _Mask:
    """Base of all masks, which defines `&`."""

    __slots__ = ()

    def __and__(self, other: object) -> Mask:
        if not isinstance(other, _Mask):
            return NotImplemented
        return both(self, other)

    def __repr__(self) -> str:
        """Return kind and fields; of tensors, dtype and shape."""
        held = ((one.name, getattr(self, one.name)) for one in fields(self))  # type: ignore[arg-type]
        shown = (f"{name}={short_text(value)}" for name, value in held if value is not None)
        return f"{type(self).__name__}({', '.join(shown)})"


@dataclass(frozen=True, slots=True)
class Full(_Mask):
    """Full mask: every query sees every key."""

    graph_number: ClassVar[int] = 0

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        del heads_q, heads_kv
        return KernelMask(MaskKind.FULL)


@dataclass(frozen=True, slots=True)
class Causal(_Mask):
    """Causal mask: a query sees its own position and all before it.

    Parameters
    ----------
    align : "bottom_right" or "top_left"
        Corner of the [Lq, Lkv] score matrix that the diagonal passes through. Bottom-right (the
        default) lets the last query see every key: key <= query + Lkv - Lq. Top-left lets the
        first query see the first key only: key <= query. They differ when Lq != Lkv.
    """

    graph_number: ClassVar[int] = 1

    align: Align = "bottom_right"

    def __post_init__(self) -> None:
        """Refuse an unknown `align`."""
        if self.align not in get_args(Align):
            raise InvalidInputError(
                f"Causal(align={self.align!r}): align must be one of {get_args(Align)}"
            )

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        del heads_q, heads_kv
        return KernelMask(MaskKind.CAUSAL, self.align == "bottom_right")


@dataclass(frozen=True, slots=True)
class Window(_Mask):
    """Sliding-window mask: a query sees keys around its position, and optionally the first keys.

    With p = query + Lkv - Lq, the query's position among the keys, it sees the keys from p - left
    to p + right, and of the first `keep_first` keys those up to p + right. Lengths and positions
    are those of each sequence.

    Parameters
    ----------
    left, right : int or None
        Number of visible keys before and after the query's position; None for all.
    keep_first : int
        Number of first keys that the left bound does not hide (attention sinks).
    full_on_decode : bool
        Lift the left bound for sequences with one query.
    """

    graph_number: ClassVar[int] = 2

    left: int | None = None
    right: int | None = None
    keep_first: int = 0
    full_on_decode: bool = False

    def __post_init__(self) -> None:
        """Refuse invalid bounds."""
        for name in ("left", "right", "keep_first"):
            value = getattr(self, name)
            if value is None and name != "keep_first":
                continue
            if not is_count(self, name, value, 0, 2**31 - 1):
                allowed = "an int of at least 0" + ("" if name == "keep_first" else ", or None")
                raise InvalidInputError(f"Window({name}={value!r}): it must be {allowed}")
        if type(self.full_on_decode) is not bool:
            raise InvalidInputError(
                f"Window(full_on_decode={self.full_on_decode!r}): it must be True or False"
            )

    @property
    def reach(self) -> tuple[int, int, int]:
        """Return (left, right, keep_first), with the largest length in place of None."""
        left = _MAX_REACH if self.left is None else min(self.left, _MAX_REACH)
        right = _MAX_REACH if self.right is None else min(self.right, _MAX_REACH)
        return left, right, min(self.keep_first, _MAX_REACH)

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        del heads_q, heads_kv
        left, right, keep_first = self.reach
        numbers = {"left": -left, "keep_first": keep_first, "full_on_decode": self.full_on_decode}
        return KernelMask(MaskKind.WINDOW, True, right, numbers)


@dataclass(frozen=True, slots=True)
class LocalStride(_Mask):
    """Block-sparse local + stride pattern (phi-3-small, dkernel).

    Queries and keys are cut into blocks, queries by their positions among the keys. With i and j a
    query's and a key's block, and h the kv head: causal, a query sees a key up to its own position
    if i - j < local_blocks, or (j + h * head_step + head_offset) % vert_stride == 0, or its head is
    one of the last `num_dense_heads`. Not causal, it sees a key if d % vert_stride == 0, where d
    counts the blocks between j and the local ones on its side, the same for all heads.

    Parameters
    ----------
    block_size : 8, 16, 32, 64 or 128
        Queries and keys per block. On a GPU, kernels compute causal patterns in blocks of 64 and
        128, and gradients of those in blocks of 16 and 32, directly; others use block lists, made
        by the first call.
    local_blocks : int, or (int, int) if not causal
        Number of visible blocks around a query's own, which is included; to the left and right.
    vert_stride : int
        1 is dense.
    head_step : int, default max(1, vert_stride // Hq)
        Offset between the strides of consecutive KV heads.
    head_offset : int
    num_dense_heads : int
        Number of KV heads, the last ones, that are causal without sparsity.
    homo_head : bool
        The same pattern for all heads: a head_step of 0.
    causal : bool
        Not causal, a query before the first key (if Lq > Lkv) also sees no key.
    """

    graph_number: ClassVar[int] = 3

    block_size: int
    local_blocks: int | tuple[int, int]
    vert_stride: int
    head_step: int | None = None
    head_offset: int = 0
    num_dense_heads: int = 0
    homo_head: bool = False
    causal: bool = True

    def __post_init__(self) -> None:
        """Refuse an invalid pattern."""
        check_block_size(self, self.block_size)
        local = self.local_blocks
        if isinstance(local, tuple):
            if self.causal or len(local) != 2:
                raise InvalidInputError(
                    f"LocalStride(local_blocks={local!r}): two numbers are for causal=False"
                )
            if type(local[0]) is not int or type(local[1]) is not int:
                pair = tuple(
                    number if integer(number) is None else integer(number) for number in local
                )
                object.__setattr__(self, "local_blocks", pair)
        for name, value, least in (
            ("local_blocks", self.local[0], 1),
            ("local_blocks", self.local[1], 1),
            ("vert_stride", self.vert_stride, 1),
            ("head_step", self.head_step, 0),
            ("head_offset", self.head_offset, 0),
            ("num_dense_heads", self.num_dense_heads, 0),
        ):
            if name == "head_step" and value is None:
                continue
            if not is_count(self, name, value, least, 2**16 - 1):
                raise InvalidInputError(
                    f"LocalStride({name}={value!r}): it must be an int from {least} to {2**16 - 1}"
                )

    @property
    def local(self) -> tuple[int, int]:
        """Local blocks to the left and to the right."""
        local = self.local_blocks
        return local if isinstance(local, tuple) else (local, local)

    def step(self, heads_q: int) -> int:
        """Return the offset between the strides of consecutive KV heads."""
        if self.homo_head:
            return 0
        return max(1, self.vert_stride // heads_q) if self.head_step is None else self.head_step

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        is_whole = self.causal and self.block_size in _KERNEL_BLOCKS
        kind = MaskKind.LOCAL_STRIDE if is_whole else MaskKind.BLOCK_LISTS
        numbers = {
            "local_blocks": self.local[0],
            "stride": self.vert_stride,
            "head_step": self.step(max(1, heads_q)),
            "head_shift": self.head_offset,
            "first_dense": heads_kv - self.num_dense_heads,
            "block_log2": self.block_size.bit_length() - 1,
        }
        return KernelMask(kind, True, 0, numbers)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class BlockSparse(_Mask):
    """Block-sparse mask with an arbitrary pattern.

    The query at position p = query + Lkv - Lq among the keys sees key j if
    ``pattern[head, p // block_size, j // block_size]``. Pairs outside the pattern are hidden.

    Parameters
    ----------
    pattern : Tensor, [rows, columns] or [heads, rows, columns], bool
        True = attend; one for all heads, one per KV head or one per query head. It may be
        rectangular. The first call makes block lists from it for the GPU, which are kept as long as
        its memory, and made again by the first call after a write to it. A tensor made under
        `torch.inference_mode` is compared with its earlier contents at every call, which waits for
        the GPU. Writes that torch does not see (by another library over DLPack): see `changed`.
    block_size : 8, 16, 32, 64 or 128
        Queries and keys per block.
    causal : bool
        Also hide keys after the query's position, within blocks too. As ``& Causal()``.
    first_row : int, optional
        Position of query 0 in each sequence, in place of Lkv - Lq: for a part of the queries, as in
        sequence partition.
    """

    graph_number: ClassVar[int] = 4

    pattern: Tensor
    block_size: int
    causal: bool = False
    first_row: int | None = None

    def __post_init__(self) -> None:
        """Refuse an invalid pattern."""
        check_block_size(self, self.block_size)
        shape, dtype = getattr(self.pattern, "shape", None), getattr(self.pattern, "dtype", None)
        if shape is None or len(shape) not in (2, 3) or str(dtype) != "torch.bool":
            raise InvalidInputError(
                f"BlockSparse(pattern) is {dtype} {shape and list(shape)}: it must be a torch.bool "
                "tensor [rows, columns] or [heads, rows, columns]"
            )
        first = self.first_row
        if first is not None and not is_count(self, "first_row", first, 0, _MAX_REACH - 1):
            raise InvalidInputError(
                f"BlockSparse(first_row={first!r}): it must be an int from 0, or None for Lkv - Lq"
            )

    def changed(self) -> None:
        """Report a write to the pattern that torch cannot see.

        Torch counts its own writes. A kernel of another library that writes to the memory of the
        pattern over DLPack, or to a raw pointer, is not counted: call this after it.
        """
        from jitattn.values.write_tracking import mark_as_written

        mark_as_written(self.pattern)

    @property
    def blocks(self) -> Tensor:
        """Pattern as [heads, rows, columns]."""
        return self.pattern if self.pattern.dim() == 3 else self.pattern[None]

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        del heads_q, heads_kv
        return KernelMask(MaskKind.BLOCK_LISTS, self.first_row is None, self.first_row or 0)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class FunctionBlocks(_Mask):
    """Blocks of 64 x 64 pairs of which a traced mask sees any: a kernel makes lists of them.

    Internal: it goes with its function, which says what is seen within the blocks.
    """

    function: Function
    batch: int  #: sequences that the mask tells apart, or 1
    by_head: bool  #: query heads differ
    len_q: int
    len_kv: int

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it: lists, whose rows count from 0."""
        del heads_q, heads_kv
        return KernelMask(MaskKind.BLOCK_LISTS, False)


@dataclass(frozen=True, slots=True, repr=False)
class PerHead(_Mask):
    """Per-head rules, computed in one launch.

    Parameters
    ----------
    rules : sequence of Full, Causal, Window, LocalStride or BlockSparse
        One per query head, or one per KV head.
    """

    graph_number: ClassVar[int] = 5

    rules: tuple[HeadRule, ...]

    def __init__(self, rules: Sequence[HeadRule]) -> None:
        """Refuse rules that are not allowed for a single head."""
        object.__setattr__(self, "rules", tuple(rules))
        for rule in self.rules:
            if not isinstance(rule, HeadRule):
                raise InvalidInputError(
                    f"PerHead([... {rule!r} ...]): each must be a Full, Causal, Window, "
                    "LocalStride or BlockSparse; intersect tensors with the whole of it"
                )
            if rule == Causal("top_left") or getattr(rule, "first_row", None) is not None:
                raise InvalidInputError(
                    f"PerHead([... {rule!r} ...]): positions count from the end, as in Causal() "
                    "and with first_row=None"
                )

    def __repr__(self) -> str:
        """Return the rules, the first ones of many."""
        shown = list(map(repr, self.rules[:_MOST_SHOWN]))
        if len(self.rules) > _MOST_SHOWN:
            shown.append(f"... {len(self.rules)} rules in all")
        return f"PerHead([{', '.join(shown)}])"

    def kernel_mask(self, heads_q: int, heads_kv: int) -> KernelMask:
        """Return what kernels are told of it, in calls with so many heads."""
        del heads_q, heads_kv
        return KernelMask(MaskKind.BLOCK_LISTS, True)


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class KeyPadding(_Mask):
    """Padding mask: hides keys from all queries of their sequence.

    Hidden keys and values must still be finite: a NaN or an infinity may reach results.

    Parameters
    ----------
    keep : Tensor, [B, Lkv], bool
        True = attend. With `kv_seqs`, columns count from a sequence's first key.
    """

    keep: Tensor


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Dense(_Mask):
    """Arbitrary mask as a matrix; costs its memory and the time to read it.

    Parameters
    ----------
    keep : Tensor, [B or 1, Hq or 1, Lq or 1, Lkv] or [Lq or 1, Lkv], bool
        True = attend. With `q_seqs` or `kv_seqs`, rows and columns count from the first ones of
        each sequence. With two dimensions it is for all sequences and heads; `keep` then has four.
    """

    keep: Tensor

    def __post_init__(self) -> None:
        """Add the dimensions of sequences and heads to a matrix."""
        if len(getattr(self.keep, "shape", ())) == 2:
            object.__setattr__(self, "keep", self.keep[None, None])


@dataclass(frozen=True, slots=True, repr=False)
class MaskMod(FunctionOfPairs, _Mask):
    """A mask written as a function: query `q_idx` sees key `kv_idx` where it is true.

    The function is called once, with symbols, and becomes part of the kernel; see
    `values/traced_operations.py` for what can be traced. Combine several with ``&``, ``|`` and
    ``~``.

    Parameters
    ----------
    function : callable
        ``f(b, h, q_idx, kv_idx) -> bool``. b counts sequences, h query heads; q_idx and kv_idx
        count rows and keys of the sequence from 0, as in top-left alignment, whatever other masks
        do. On a GPU the blocks that it sees are found anew when torch counts a write to a tensor
        that it reads; after one that torch does not count (through ``.data``, by the replay of a
        graph, by another library over DLPack), call `torch.autograd.graph.increment_version`.
    q_offset : int, Tensor [B] of ints, or "bottom_right"
        Added to q_idx: the position of the first query among the keys, for all sequences or for
        each; "bottom_right" is Lkv - Lq of each.

    Examples
    --------
    >>> causal = MaskMod(lambda b, h, q, kv: q >= kv)
    >>> documents = torch.tensor([[0, 0, 1, 1]])
    >>> mask = causal & MaskMod(lambda b, h, q, kv: documents[b, q] == documents[b, kv])
    """


_FULL = Full()


@dataclass(frozen=True, slots=True, eq=False, repr=False)
class Both(_Mask):
    """Intersection of a positional rule, mask tensors and functions; made by `&`."""

    rule: Rule  # no default: it would break a graph of torch 2.11
    key_padding: KeyPadding | None = None
    dense: Dense | None = None
    function: MaskMod | None = None

    def __repr__(self) -> str:
        """Return the parts as they are written."""
        rule = None if isinstance(self.rule, Full) else self.rule
        parts = (rule, self.key_padding, self.dense, self.function)
        return " & ".join(repr(part) for part in parts if part is not None)


HeadRule: TypeAlias = Full | Causal | Window | LocalStride | BlockSparse
Rule: TypeAlias = HeadRule | FunctionBlocks | PerHead
Mask: TypeAlias = Rule | KeyPadding | Dense | MaskMod | Both
#: Rules made of numbers, which are compared and hashed by value.
BY_VALUE: Final = frozenset(get_args(Rule)) - {BlockSparse, FunctionBlocks, PerHead}


def is_mask(value: object) -> bool:
    """Return whether a value is a mask."""
    return isinstance(value, _Mask)


def parts_of(mask: _Mask) -> Both:
    """Split a mask into rule, key padding and dense mask."""
    if isinstance(mask, Both):
        return mask
    if isinstance(mask, KeyPadding):
        return Both(_FULL, key_padding=mask)
    if isinstance(mask, Dense):
        return Both(_FULL, dense=mask)
    if isinstance(mask, MaskMod):
        return Both(_FULL, function=mask)
    if isinstance(mask, Rule):
        return Both(mask)
    raise InvalidInputError(f"mask={mask!r}: it is none of jitattn's masks")


def both(one: _Mask, other: _Mask) -> Mask:
    """Return the intersection of two masks.

    Raises
    ------
    InvalidInputError
        They hold two rules, or two tensors of one type, that cannot be combined.
    """
    first, second = parts_of(one), parts_of(other)
    for name in ("key_padding", "dense"):
        if getattr(first, name) is not None and getattr(second, name) is not None:
            raise InvalidInputError(
                f"{one} & {other}: at most one {name} takes part; intersect their tensors with &"
            )
    rule = _one_rule(first.rule, second.rule)
    function = first.function or second.function
    if first.function is not None and second.function is not None:
        function = first.function.both(second.function)
    padding, dense = first.key_padding or second.key_padding, first.dense or second.dense
    if padding is None and dense is None and function is None:
        return rule
    if padding is None and dense is None and function is not None and rule == _FULL:
        return function
    return Both(rule, padding, dense, function)


def _one_rule(one: Rule, other: Rule) -> Rule:
    if isinstance(one, Full) or one == other:
        return other
    if isinstance(other, Full):
        return one
    for window, causal in ((one, other), (other, one)):
        if isinstance(window, Window) and causal == Causal():
            return replace(window, right=0)
        if isinstance(window, BlockSparse) and causal == Causal() and window.first_row is None:
            return replace(window, causal=True)
        if isinstance(window, LocalStride) and window.causal and causal == Causal():
            return window
    raise InvalidInputError(
        f"{one} & {other}: at most one rule of positions takes part in a mask; use a Dense mask, "
        "or say it as one Window"
    )
