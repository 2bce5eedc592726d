"""Keyword arguments of the public functions, as type checkers see them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, TypedDict

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch
    from torch import Tensor

    from jitattn.values.mask_functions import QOffset
    from jitattn.values.masks import Mask
    from jitattn.values.norm import L2Norm
    from jitattn.values.rotary import Rotary
    from jitattn.values.sequences import KvSequences, QSequences, Ragged

Layout: TypeAlias = Literal["bshd", "bhsd"]
GearNumber: TypeAlias = Literal[0, 1, 2, 3, 4]
TileRows: TypeAlias = Literal[16, 64, 128]


class SupportsDLPack(Protocol):
    """An array of another library: CuPy, JAX, numpy."""

    def __dlpack__(self) -> object:
        """Return a capsule of its memory."""
        ...

    def __dlpack_device__(self) -> tuple[int, int]:
        """Return the kind and the number of its device."""
        ...


class _Common(TypedDict, total=False):
    mask: Mask
    scale: float | None
    layout: Layout
    gear: GearNumber | None
    out_dtype: torch.dtype | None
    num_splits: int | None
    bias: Tensor | None
    relative_bias: Tensor | None
    alibi_slopes: Tensor | None
    softcap: float | None
    sinks: Tensor | None
    score_mod: Callable[[Any, Any, Any, Any, Any], Any] | None
    q_offset: QOffset | None


class AttentionOptions(_Common, total=False):
    """Keyword arguments of `attention` but `return_lse`."""

    out: Tensor | None
    q_seqs: QSequences
    kv_seqs: KvSequences
    dropout_p: float
    dropout_state: Tensor | None
    qk_norm: L2Norm | None
    deterministic: bool
    tile_rows: TileRows | None


class KvCacheOptions(_Common, total=False):
    """Keyword arguments of `attention_with_kvcache` but `length` and `return_lse`."""

    out: Tensor | None
    rotary: Rotary | None
    left_pad: Tensor | None
    batch_idx: Tensor | None
    block_table: Tensor | None
    max_length: int | None
    q_seqs: Ragged | None
