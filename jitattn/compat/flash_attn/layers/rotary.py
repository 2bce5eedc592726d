"""Rotary position embedding as FlashAttention has it, by `jitattn.apply_rotary`.

Su et al., "RoFormer", arXiv:2104.09864. In fp32, rounded once; on a GPU one kernel, forward and
backward. What writes to its argument takes leaves that require grad, as the original's; autograd
follows what it returns, and the gradient that comes in is not written to. (While keys are appended
to a cache, `flash_attn_with_kvcache` turns them.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import torch

from jitattn.api.apply_rotary import rotate
from jitattn.compat._errors import CheckFailedError, errors_as
from jitattn.run.rotary import Part
from jitattn.run.rotary_operators import WHOLE
from jitattn.values.rotary import Rotary

if TYPE_CHECKING:
    from torch import Tensor

_WORDS: Final = {"offset": "seqlen_offsets", "Rotary": "cos and sin"}
_ALL: Final = slice(None)


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Return (-b, a) of the pairs (a, b): columns 2i and 2i + 1, or i and i + half."""
    if interleaved:
        pairs = x.reshape(*x.shape[:-1], -1, 2)
        return torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """Rotate x [B, L, H, D] by tables [L, rotary_dim / 2] or [B, L, rotary_dim / 2]."""
    rotary_dim = 2 * cos.shape[-1]
    wide_cos, wide_sin = (_widened(table, interleaved)[..., None, :] for table in (cos, sin))
    turned, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    turned = turned * wide_cos + rotate_half(turned, interleaved) * wide_sin
    return torch.cat((turned, rest), dim=-1)


@errors_as(CheckFailedError, _WORDS)
def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
) -> Tensor:
    """Rotate vectors by their positions.

    Parameters
    ----------
    x : Tensor, [B, L, H, D], or [total, H, D] with `cu_seqlens`
    cos, sin : Tensor, [positions, rotary_dim / 2]
        rotary_dim is at most D; further columns stay.
    interleaved : bool
        Columns 2i and 2i + 1 are a pair (GPT-J), rather than i and i + rotary_dim / 2 (GPT-NeoX).
    inplace : bool
        Write the result to x.
    seqlen_offsets : int or Tensor [B]
        Position of the first row of each sequence.
    cu_seqlens : Tensor, [B + 1], optional
    max_seqlen : int, optional
        Taken for the sake of callers; nothing needs it.

    Returns
    -------
    Tensor, as x
        Rows of no sequence, and rows at positions that the tables do not have, are as they were.

    Raises
    ------
    CheckFailedError
        The tables are too wide, or too short where that can be seen without asking the device.
    """
    del max_seqlen
    if x.dim() != (4 if cu_seqlens is None else 3):
        raise CheckFailedError(
            f"x has shape {list(x.shape)}: it must be [batch, seqlen, nheads, headdim], or "
            "[total, nheads, headdim] with cu_seqlens"
        )
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.contiguous()
    tables = (_tables(cos, sin, interleaved),)
    return rotate(x, tables, _offsets(seqlen_offsets), cu_seqlens, WHOLE, inplace=bool(inplace))


apply_rotary_emb_func = apply_rotary_emb


@errors_as(CheckFailedError, _WORDS)
def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
) -> Tensor:
    """Rotate q and k of a packed qkv by their positions, in place.

    Parameters
    ----------
    qkv : Tensor, [B, L, 3, H, D], or [B, L, Hq + 2 Hkv, D] with `num_heads_q`
    cos_k, sin_k : Tensor, as cos and sin, optional
        Others for k.
    num_heads_q : int, optional
        Hq.

    The others are those of `apply_rotary_emb`.

    Returns
    -------
    Tensor, as qkv, over the same memory
    """
    q, k, both, v = _places(qkv, num_heads_q)
    tables = [_tables(cos, sin, interleaved)]
    parts: tuple[Part, ...] = (Part((_ALL, _ALL, both), 0),)
    if cos_k is not None or sin_k is not None:
        own = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        tables.append(_tables(*own, interleaved))
        parts = (Part((_ALL, _ALL, q), 0), Part((_ALL, _ALL, k), 1))
    kept = ((_ALL, _ALL, v),)
    return rotate(qkv, tables, _offsets(seqlen_offsets), None, parts, kept, inplace=True)


def _places(
    qkv: Tensor, num_heads_q: int | None
) -> tuple[slice | int, slice | int, slice, slice | int]:
    """Return the slices of q, k, q and k, and v in the third dimension."""
    if qkv.dim() == 5 and qkv.shape[2] == 3:
        return 0, 1, slice(2), 2
    if qkv.dim() != 4:
        raise CheckFailedError(
            f"qkv has shape {list(qkv.shape)}: it must be [B, L, 3, H, D], or "
            "[B, L, Hq + 2 Hkv, D] with num_heads_q"
        )
    if num_heads_q is None:
        raise CheckFailedError("num_heads_q is missing: qkv has 4 dimensions, heads of q first")
    both = (qkv.shape[2] + num_heads_q) // 2
    if not 0 <= num_heads_q <= both or 2 * both != qkv.shape[2] + num_heads_q:
        raise CheckFailedError(
            f"num_heads_q={num_heads_q}: qkv has {qkv.shape[2]} heads, which must be num_heads_q "
            "and twice those of k"
        )
    return slice(num_heads_q), slice(num_heads_q, both), slice(both), slice(both, None)


@errors_as(CheckFailedError, _WORDS)
def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
) -> Tensor:
    """Rotate k of a packed kv [B, L, 2, H, D] by its positions, in place.

    Returns
    -------
    Tensor, as kv, over the same memory
    """
    if kv.dim() != 5 or kv.shape[2] != 2:
        raise CheckFailedError(f"kv has shape {list(kv.shape)}: it must be [B, L, 2, H, D]")
    tables = (_tables(cos, sin, interleaved),)
    parts, kept = (Part((_ALL, _ALL, 0), 0),), ((_ALL, _ALL, 1),)
    return rotate(kv, tables, _offsets(seqlen_offsets), None, parts, kept, inplace=True)


class ApplyRotaryEmb:
    """The function class of `apply_rotary_emb`, with `apply`."""

    apply = staticmethod(apply_rotary_emb)


class ApplyRotaryEmbQKV_:  # noqa: N801 - the original's name
    """The function class of `apply_rotary_emb_qkv_`."""

    apply = staticmethod(apply_rotary_emb_qkv_)


class ApplyRotaryEmbKV_:  # noqa: N801
    """The function class of `apply_rotary_emb_kv_`."""

    apply = staticmethod(apply_rotary_emb_kv_)


class RotaryEmbedding(torch.nn.Module):
    """Rotates queries and keys in place by its own tables, which grow on demand.

    Parameters
    ----------
    dim : int
        rotary_dim.
    base : float
        Pair i turns by position * base^(-2i / dim).
    interleaved : bool
        As in `apply_rotary_emb`.
    scale_base : float, optional
        Scale pair i at position p by ((2i + 0.4 dim) / (1.4 dim))^((p - n / 2) / scale_base), for n
        positions, and keys by its inverse: XPos, Sun et al., arXiv:2212.10554.
    device : torch.device, optional
    """

    inv_freq: Tensor
    scale: Tensor | None

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        scale = None if scale_base is None else (self._pairs(device) + 0.4 * dim) / (1.4 * dim)
        self.register_buffer("scale", scale, persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _pairs(self, device: torch.device | str | None) -> Tensor:
        return torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)

    def _compute_inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        return 1.0 / (self.base ** (self._pairs(device) / self.dim))

    def _update_cos_sin_cache(
        self,
        seqlen: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Extend the tables to a number of positions, if they are too short."""
        found = self._cos_cached
        if (
            found is not None
            and seqlen <= self._seq_len_cached
            and (found.device, found.dtype) == (device, dtype)
            and not (self.training and found.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # A 16-bit model has 16-bit buffers, but large positions need fp32.
        is_wide = self.inv_freq.dtype is torch.float32
        frequencies = self.inv_freq if is_wide else self._compute_inv_freq(device)
        position = torch.arange(seqlen, device=device, dtype=torch.float32)
        angle = position[:, None] * frequencies.to(device)
        cos, sin = angle.cos(), angle.sin()
        if self.scale is None or self.scale_base is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        power = (position - seqlen // 2) / self.scale_base
        scale = self.scale.to(device=device, dtype=torch.float32) ** power[:, None]
        self._cos_cached, self._sin_cached = (cos * scale).to(dtype), (sin * scale).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / scale).to(dtype), (sin / scale).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotate q and k of qkv as `apply_rotary_emb_qkv_` does, or of q and kv.

        Parameters
        ----------
        qkv : Tensor
            With `kv`: q, [B, L, H, D].
        kv : Tensor, [B, L, 2, H, D], optional
        seqlen_offset : int or Tensor [B]
        max_seqlen : int, optional
            Positions that the tables must have; of an int offset, they follow.

        Returns
        -------
        Tensor, or two
            What was given, turned in place.
        """
        if max_seqlen is not None:
            self._update_cos_sin_cache(max_seqlen, qkv.device, qkv.dtype)
        elif isinstance(seqlen_offset, int):
            self._update_cos_sin_cache(qkv.shape[1] + seqlen_offset, qkv.device, qkv.dtype)
        cos, sin = self._cos_cached, self._sin_cached
        if cos is None or sin is None:
            raise CheckFailedError(
                "max_seqlen is missing: with offsets on the device, nothing says how many "
                "positions the tables must have"
            )
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv, cos, sin, cos_k, sin_k, self.interleaved, seqlen_offset, num_heads_q
            )
        q = apply_rotary_emb(qkv, cos, sin, self.interleaved, True, seqlen_offset)
        own = (cos if cos_k is None else cos_k, sin if sin_k is None else sin_k)
        return q, apply_rotary_emb_kv_(kv, *own, self.interleaved, seqlen_offset)


def _tables(cos: Tensor, sin: Tensor, interleaved: bool) -> Rotary:
    """Return the tables in the core's form: one dtype, contiguous rows."""
    if cos.dim() != 2 or cos.shape != sin.shape:
        raise CheckFailedError(
            f"cos {list(cos.shape)} and sin {list(sin.shape)}: both must be [positions, "
            "rotary_dim / 2]"
        )
    if cos.dtype != sin.dtype:
        cos, sin = cos.float(), sin.float()
    return Rotary(cos.contiguous(), sin.contiguous(), interleaved=bool(interleaved))


def _offsets(seqlen_offsets: int | Tensor) -> int | Tensor:
    if isinstance(seqlen_offsets, torch.Tensor):
        return seqlen_offsets.contiguous()
    return seqlen_offsets


def _widened(table: Tensor, interleaved: bool) -> Tensor:
    return table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
