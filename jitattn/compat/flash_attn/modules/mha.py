"""Attention modules under the names, arguments and parameters of FlashAttention 2's."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from jitattn.compat._core import attention
from jitattn.compat.flash_attn._functions import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from jitattn.compat.flash_attn._kvcache import flash_attn_with_kvcache as flash_attn_with_kvcache
from jitattn.compat.flash_attn.layers.rotary import RotaryEmbedding
from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.values.masks import Causal, Full, KeyPadding


def get_alibi_slopes(nheads: int) -> list[float]:
    """Return the slopes of ALiBi for a number of heads: Press et al., arXiv:2108.12409."""
    power = 2 ** math.floor(math.log2(nheads))
    first = 2.0 ** (-8.0 / power)
    slopes = [first ** (idx + 1) for idx in range(power)]
    if power == nheads:
        return slopes
    return slopes + get_alibi_slopes(2 * power)[0::2][: nheads - power]


class _Flash(nn.Module):
    """What the two flash modules hold."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.window_size = window_size
        self.deterministic = deterministic

    def _options(self, causal: bool | None) -> dict[str, Any]:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }


class FlashSelfAttention(_Flash):
    """Self-attention of packed q, k and v."""

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Return attention of qkv, [B, L, 3, H, D], or [total, 3, H, D] with lengths."""
        options = self._options(causal)
        if cu_seqlens is None:
            out: Tensor = flash_attn_qkvpacked_func(qkv, **options)
            return out
        if max_seqlen is None:
            raise InvalidInputError("cu_seqlens needs max_seqlen, the largest length")
        out = flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)
        return out


class FlashCrossAttention(_Flash):
    """Cross-attention of q and packed k and v."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Return attention of q, [B, Lq, H, D], to kv, [B, Lk, 2, Hk, D]; or ragged ones."""
        options = self._options(causal)
        if cu_seqlens is None:
            out: Tensor = flash_attn_kvpacked_func(q, kv, **options)
            return out
        if max_seqlen is None or cu_seqlens_k is None or max_seqlen_k is None:
            raise InvalidInputError(
                "cu_seqlens needs max_seqlen, cu_seqlens_k and max_seqlen_k, of q and of kv"
            )
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        out = flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)
        return out


class _Plain(nn.Module):
    """What the two modules with key padding hold."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, causal: bool | None, keep: Tensor | None
    ) -> Tensor:
        mask: Any = Causal() if (self.causal if causal is None else causal) else Full()
        if keep is not None:
            mask = mask & KeyPadding(keep.bool())
        dropout = self.drop.p if self.training else 0.0
        out: Tensor = attention(q, k, v, mask=mask, scale=self.softmax_scale, dropout_p=dropout)
        return out


class SelfAttention(_Plain):
    """Self-attention of packed q, k and v, with key padding."""

    def forward(
        self, qkv: Tensor, causal: bool | None = None, key_padding_mask: Tensor | None = None
    ) -> Tensor:
        """Return attention of qkv, [B, L, 3, H, D]; `key_padding_mask` [B, L], True = attend."""
        q, k, v = qkv.unbind(2)
        return self._attend(q, k, v, causal, key_padding_mask)


class CrossAttention(_Plain):
    """Cross-attention of q and packed k and v, with key padding."""

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """Return attention of q, [B, Lq, H, D], to kv, [B, Lk, 2, Hk, D]."""
        k, v = kv.unbind(2)
        return self._attend(q, k, v, causal, key_padding_mask)


class MHA(nn.Module):
    """Multi-head attention with its projections: grouped heads, rotary embedding, ALiBi, windows.

    The arguments are the original's. Refused: `dwconv`, `checkpointing`, `fused_bias_fc`, and at a
    call `inference_params` and `mixer_subset` (decode with `flash_attn_with_kvcache`).

    Parameters
    ----------
    embed_dim, num_heads : int
    num_heads_kv : int, default num_heads
    cross_attn : bool
        k and v come from `x_kv`.
    qkv_proj_bias, out_proj_bias : bool
    dropout : float
        Of attention weights, in training.
    softmax_scale : float, default 1 / sqrt(head_dim)
    causal : bool
    layer_idx : int, optional
    rotary_emb_dim : int
        0: no rotary embedding.
    rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved
        As `RotaryEmbedding` has them.
    use_alibi : bool
    window_size : (int, int)
    use_flash_attn : bool
        Needed for windows, ALiBi and lengths, and without effect otherwise: all is jitattn's.
    return_residual : bool
        Return (out, x).
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        refused = {"dwconv": dwconv, "checkpointing": checkpointing, "fused_bias_fc": fused_bias_fc}
        for name, value in refused.items():
            if value:
                raise UnsupportedError(f"MHA({name}=True): leave it out")
        if (use_alibi or window_size != (-1, -1)) and not use_flash_attn:
            raise InvalidInputError("MHA: use_alibi and window_size need use_flash_attn=True")
        self.embed_dim, self.num_heads = embed_dim, num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if num_heads % self.num_heads_kv or embed_dim % num_heads:
            raise InvalidInputError(
                f"MHA: embed_dim={embed_dim}, num_heads={num_heads}, "
                f"num_heads_kv={self.num_heads_kv}: each must divide the one before"
            )
        self.head_dim = embed_dim // num_heads
        self.cross_attn, self.causal, self.layer_idx = cross_attn, causal, layer_idx
        self.use_flash_attn, self.return_residual = use_flash_attn, return_residual
        self.rotary_emb_dim = rotary_emb_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        if rotary_emb_dim > 0:
            if cross_attn:
                raise UnsupportedError("MHA: rotary_emb_dim with cross_attn: leave one out")
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **made)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **made)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **made)
        options: dict[str, Any] = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        slopes = None
        if use_alibi:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device, dtype=torch.float32)
        if use_flash_attn:
            options |= {"window_size": window_size, "alibi_slopes": slopes}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**options)
        cross = FlashCrossAttention if use_flash_attn else CrossAttention
        self.inner_cross_attn = cross(**options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **made)

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: Tensor | None = None,
        inference_params: object = None,
        **kwargs: Any,  # noqa: ANN401 - of the inner module
    ) -> Any:  # noqa: ANN401 - Tensor, or two with `return_residual`
        """Return attention of x, [B, L, embed_dim], or [total, embed_dim] with lengths.

        Parameters
        ----------
        x : Tensor
        x_kv : Tensor, [B, Lk, embed_dim], optional
            With `cross_attn`: what is attended to, x if left out.
        key_padding_mask : Tensor, [B, Lk], bool, optional
            True = attend; without `use_flash_attn`.
        cu_seqlens, max_seqlen : Tensor, int
            Lengths; with `use_flash_attn`.
        """
        if inference_params is not None or mixer_subset is not None:
            raise UnsupportedError(
                "MHA: inference_params and mixer_subset: decode with flash_attn_with_kvcache"
            )
        if key_padding_mask is not None and self.use_flash_attn:
            raise InvalidInputError(
                "MHA(use_flash_attn=True): key_padding_mask: unpad with bert_padding, and give "
                "cu_seqlens"
            )
        if cu_seqlens is not None and not self.use_flash_attn:
            raise InvalidInputError("MHA: cu_seqlens needs use_flash_attn=True")
        if self.use_flash_attn:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        else:
            kwargs["key_padding_mask"] = key_padding_mask
        if self.cross_attn:
            q = self.Wq(x).unflatten(-1, (self.num_heads, self.head_dim))
            kv = self.Wkv(x if x_kv is None else x_kv)
            out = self.inner_cross_attn(q, self._by_head(kv, 2), **kwargs)
        else:
            out = self._self_attention(self.Wqkv(x), kwargs)
        out = self.out_proj(out.flatten(-2))
        return (out, x) if self.return_residual else out

    def _by_head(self, packed: Tensor, parts: int) -> Tensor:
        found: Tensor = packed.unflatten(-1, (parts, self.num_heads_kv, self.head_dim))
        return found

    def _self_attention(self, packed: Tensor, kwargs: dict[str, Any]) -> Tensor:
        cu_seqlens, max_seqlen = kwargs.get("cu_seqlens"), kwargs.get("max_seqlen")
        if self.num_heads == self.num_heads_kv:
            qkv = self._by_head(packed, 3)
            if self.rotary_emb_dim > 0:
                _refuse_lengths(cu_seqlens)
                qkv = self.rotary_emb(qkv)
            own: Tensor = self.inner_attn(qkv, **kwargs)
            return own
        q, kv = packed.split([self.embed_dim, packed.shape[-1] - self.embed_dim], dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        kv = self._by_head(kv, 2)
        if self.rotary_emb_dim > 0:
            _refuse_lengths(cu_seqlens)
            q, kv = self.rotary_emb(q.contiguous(), kv.contiguous())
        if cu_seqlens is not None:
            kwargs |= {"cu_seqlens_k": cu_seqlens, "max_seqlen_k": max_seqlen}
        out: Tensor = self.inner_cross_attn(q, kv, **kwargs)
        return out


class ParallelMHA(nn.Module):
    """Refused: multi-head attention split over processes by the original's own collectives."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        process_group: object,
        **more: Any,  # noqa: ANN401 - the original's
    ) -> None:
        super().__init__()
        raise UnsupportedError(
            "ParallelMHA: split MHA with torch.distributed.tensor.parallel.parallelize_module"
        )


def _refuse_lengths(cu_seqlens: Tensor | None) -> None:
    if cu_seqlens is not None:
        raise UnsupportedError(
            "MHA: rotary embedding with cu_seqlens: turn q and k with layers.rotary, whose "
            "functions take them, and call flash_attn_varlen_func"
        )
