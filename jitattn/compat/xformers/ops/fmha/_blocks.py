"""Block-diagonal biases: sequences one after another, each of which sees its own keys alone."""

from __future__ import annotations

import dataclasses
import operator
from typing import TYPE_CHECKING, Any

import torch
from torch.compiler import is_dynamo_compiling

from jitattn.compat._errors import check
from jitattn.compat.xformers.ops.fmha._bias import (
    AttentionBias,
    Translated,
    as_bias,
    check_window,
)
from jitattn.compat.xformers.ops.fmha._lengths import _SeqLenInfo, default_device
from jitattn.compat.xformers.ops.fmha._reach import Reach
from jitattn.errors import InvalidInputError
from jitattn.values.sequences import Ragged

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Self

    from torch import Tensor

    from jitattn.values.sequences import Paged


class Blocks(AttentionBias):
    """Base of biases over sequences, of which `q_seqinfo` and `k_seqinfo` say where they lie."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: Any

    def _reach(self) -> Reach:
        """Return which keys of its own sequence a query sees."""
        return Reach()

    def to(self, device: torch.device | str) -> Self:
        """Return the bias with its tensors on a device."""
        fields = {"q_seqinfo": self.q_seqinfo.to(device)}
        shared = self.k_seqinfo is self.q_seqinfo
        fields["k_seqinfo"] = fields["q_seqinfo"] if shared else self.k_seqinfo.to(device)
        return dataclasses.replace(self, **fields)  # type: ignore[type-var]

    def materialize(
        self,
        shape: tuple[int, ...],
        dtype: torch.dtype = torch.float32,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Return 0 where a key is visible, -inf elsewhere, [*, total_q, total_k]."""
        wanted = (self.q_seqinfo.seqstart_py[-1], self.k_seqinfo.seqstart_py[-1])
        check(
            tuple(shape[-2:]) == wanted,
            f"shape={tuple(shape)}: the sequences have {wanted[0]} queries and {wanted[1]} keys",
        )
        seen = torch.zeros(*wanted, dtype=torch.bool, device=device)
        spans = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=False)
        for (q_start, q_stop), (k_start, k_stop) in spans:
            own = self._reach().seen(q_stop - q_start, k_stop - k_start, device)
            seen[q_start:q_stop, k_start:k_stop] = own
        return as_bias(seen, shape, dtype)

    def _translated(self) -> Translated:
        """Return mask and sequences; kept while the values that they are made of are the same."""
        if is_dynamo_compiling():
            return self._made()
        parts = self._parts()
        kept: tuple[list[Any], Translated] | None = self.__dict__.get("_kept")
        if kept is not None and all(map(operator.is_, kept[0], parts)):
            return kept[1]
        made = self._made()
        self.__dict__["_kept"] = parts, made
        return made

    def _made(self) -> Translated:
        return Translated(
            self._reach().rule(self._lengths_are_equal()),
            None,
            Ragged.from_cu_seqlens(self.q_seqinfo.seqstart, max(0, self.q_seqinfo.max_seqlen)),
            self._keys(),
        )

    def _parts(self) -> list[Any]:
        """Return what sequences are made of, which callers may replace."""
        return [*vars(self.q_seqinfo).values(), *vars(self.k_seqinfo).values()]

    def _lengths_are_equal(self) -> bool:
        """Return whether every sequence has as many queries as keys, and will."""
        return self.q_seqinfo is self.k_seqinfo

    def _keys(self) -> Ragged | Paged:
        """Return the sequences of keys."""
        raise NotImplementedError


@dataclasses.dataclass(eq=False)
class BlockDiagonalMask(Blocks):
    """Sequences one after another, in q and in k: [1, total, H, D]."""

    q_seqinfo: _SeqLenInfo
    k_seqinfo: _SeqLenInfo
    _batch_sizes: Sequence[int] | None = None

    @classmethod
    def from_seqlens(
        cls,
        q_seqlen: Sequence[int],
        kv_seqlen: Sequence[int] | None = None,
        *,
        device: torch.device | None = None,
    ) -> Self:
        """Make the bias from lengths of queries, and of keys where they differ."""
        check(
            kv_seqlen is None or len(q_seqlen) == len(kv_seqlen),
            f"q_seqlen has {len(q_seqlen)} entries and kv_seqlen {len(kv_seqlen or ())}: both need "
            "one for every sequence",
        )
        where = default_device(device)
        q_seqinfo = k_seqinfo = _SeqLenInfo.from_seqlens(q_seqlen, device=where)
        if kv_seqlen is not None and list(q_seqlen) != list(kv_seqlen):
            k_seqinfo = _SeqLenInfo.from_seqlens(kv_seqlen, device=where)
        return cls(q_seqinfo=q_seqinfo, k_seqinfo=k_seqinfo)

    @classmethod
    def from_tensor_list(cls, tensors: Sequence[Tensor]) -> tuple[Self, Tensor]:
        """Return the bias of tensors [B_i, L_i, *], and these as one [1, total, *]."""
        bias, joined, _, _ = cls.from_tensor_lists_qkv(tensors, tensors)
        return bias, joined

    @classmethod
    def from_tensor_lists_qkv(
        cls,
        tensors_q: Sequence[Tensor],
        tensors_k: Sequence[Tensor],
        tensors_v: Sequence[Tensor] | None = None,
    ) -> tuple[Self, Tensor, Tensor, Tensor | None]:
        """Return the bias of lists of q, k and v, and each as one tensor [1, total, *]."""
        check(
            len(tensors_q) == len(tensors_k)
            and all(q.shape[0] == k.shape[0] for q, k in zip(tensors_q, tensors_k, strict=True)),
            "tensors_q and tensors_k: they must be as many, of equal batch sizes",
        )
        check(
            tensors_v is None
            or [v.shape[:2] for v in tensors_v] == [k.shape[:2] for k in tensors_k],
            "tensors_v: each must have the batch size and the length of its tensor in tensors_k",
        )
        lengths = [[x.shape[1] for x in some for _ in range(len(x))] for some in
                   (tensors_q, tensors_k)]  # fmt: skip
        bias = cls.from_seqlens(*lengths, device=tensors_q[0].device)
        bias._batch_sizes = [x.shape[0] for x in tensors_q]
        joined = _joined(tensors_q)
        keys = joined if tensors_k is tensors_q else _joined(tensors_k)
        return bias, joined, keys, None if tensors_v is None else _joined(tensors_v)

    def split_queries(self, tensor: Tensor) -> Sequence[Tensor]:
        """Split [1, total_q, *] into the tensors that it was made of."""
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def split_kv(self, tensor: Tensor) -> Sequence[Tensor]:
        """Split [1, total_k, *] into the tensors that it was made of."""
        return self.k_seqinfo.split(tensor, self._batch_sizes)

    def split(self, tensor: Tensor) -> Sequence[Tensor]:
        """Split [1, total, *] into the tensors that it was made of, q or k alike."""
        check(
            self.q_seqinfo is self.k_seqinfo,
            "split: queries and keys have lengths of their own; call split_queries or split_kv",
        )
        return self.q_seqinfo.split(tensor, self._batch_sizes)

    def make_causal(self) -> BlockDiagonalCausalMask:
        """Return the bias with every sequence causal from its top left."""
        return BlockDiagonalCausalMask(self.q_seqinfo, self.k_seqinfo, self._batch_sizes)

    def make_causal_from_bottomright(self) -> BlockDiagonalCausalFromBottomRightMask:
        """Return the bias with every sequence causal from its bottom right."""
        return BlockDiagonalCausalFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes
        )

    def make_local_attention(self, window_size: int) -> BlockDiagonalCausalLocalAttentionMask:
        """Return the bias with a causal window from the top left."""
        return BlockDiagonalCausalLocalAttentionMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )

    def make_local_attention_from_bottomright(
        self, window_size: int
    ) -> BlockDiagonalCausalLocalAttentionFromBottomRightMask:
        """Return the bias with a causal window from the bottom right."""
        return BlockDiagonalCausalLocalAttentionFromBottomRightMask(
            self.q_seqinfo, self.k_seqinfo, self._batch_sizes, window_size
        )

    def _keys(self) -> Ragged:
        return Ragged.from_cu_seqlens(self.k_seqinfo.seqstart, max(0, self.k_seqinfo.max_seqlen))


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalMask(BlockDiagonalMask):
    """`BlockDiagonalMask` with every sequence causal from its top left."""

    def _reach(self) -> Reach:
        return Reach(None, 0, from_bottom_right=False)


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalFromBottomRightMask(BlockDiagonalMask):
    """`BlockDiagonalMask` with every sequence causal from its bottom right; Lkv >= Lq in each."""

    def __post_init__(self) -> None:
        spans = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=False)
        for number, ((q_start, q_stop), (k_start, k_stop)) in enumerate(spans):
            if k_stop - k_start < q_stop - q_start:
                raise InvalidInputError(
                    f"sequence {number} has {q_stop - q_start} queries and {k_stop - k_start} "
                    "keys: it must have as many keys, or more"
                )

    def _reach(self) -> Reach:
        return Reach(None, 0)


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionMask(BlockDiagonalCausalMask):
    """`BlockDiagonalCausalMask` with a window of `window_size` keys, the query's own among them."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        check_window(self._window_size)
        spans = zip(self.q_seqinfo.intervals(), self.k_seqinfo.intervals(), strict=False)
        for (q_start, q_stop), (k_start, k_stop) in spans:
            if q_stop - q_start - self._window_size >= k_stop - k_start:
                raise NoVisibleKeysError(
                    f"{q_stop - q_start} queries and {k_stop - k_start} keys: with a window of "
                    f"{self._window_size}, the last queries see none"
                )

    def _reach(self) -> Reach:
        return Reach(self._window_size - 1, 0, from_bottom_right=False)


@dataclasses.dataclass(eq=False)
class BlockDiagonalCausalLocalAttentionFromBottomRightMask(BlockDiagonalCausalFromBottomRightMask):
    """`BlockDiagonalCausalFromBottomRightMask` with a window of `window_size` keys."""

    _window_size: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_window(self._window_size)

    def _reach(self) -> Reach:
        return Reach(self._window_size - 1, 0)


class NoVisibleKeysError(InvalidInputError, RuntimeError):
    """A window leaves queries without keys; a RuntimeError, as there."""


def _joined(tensors: Sequence[Tensor]) -> Tensor:
    """Return tensors [B_i, L_i, *] as one [1, total, *]."""
    return torch.cat([x.reshape(1, -1, *x.shape[2:]) for x in tensors], dim=1)
