"""A causal transformer with cosine attention, by the original's names and arguments.

Unlike there, `attn_l2norm_groups` reaches the attention. `use_cuda_kernel=False` takes the plain
PyTorch oracle, as the original does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from jitattn.api.attention import attention
from jitattn.compat.flash_cosine_sim_attention import (
    flash_cosine_sim_attention,
    plain_cosine_sim_attention,
)
from jitattn.errors import InvalidInputError
from jitattn.values.masks import Causal

if TYPE_CHECKING:
    from torch import Tensor


def non_cosine_sim_attn_fn(q: Tensor, k: Tensor, v: Tensor, **kwargs: Any) -> Tensor:  # noqa: ANN401
    """Compute plain causal softmax attention, scaled by 1 / sqrt(D); ignores further arguments."""
    del kwargs
    out: Tensor = attention(q, k, v, mask=Causal(), layout="bhsd")
    return out


def FeedForward(dim: int, mult: int = 4, pre_norm: bool = False) -> nn.Sequential:  # noqa: N802
    """Return a feed-forward net, after a norm with `pre_norm`."""
    return nn.Sequential(
        nn.LayerNorm(dim) if pre_norm else nn.Identity(),
        nn.Linear(dim, dim * mult, bias=False),
        nn.GELU(),
        nn.Linear(dim * mult, dim, bias=False),
    )


class Attention(nn.Module):
    """Causal self-attention of [B, L, dim].

    Parameters
    ----------
    dim, dim_head, heads : int
    scale : float
        Factor of the cosines.
    l2norm_groups : int
    pre_norm : bool
        Normalise the input.
    use_cuda_kernel : bool
        False: the plain PyTorch oracle.
    non_cosine_sim_attn : bool
        Ordinary softmax attention instead.
    **kwargs
        Further arguments of `flash_cosine_sim_attention`.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 64,
        heads: int = 8,
        scale: float = 8,
        l2norm_groups: int = 1,
        pre_norm: bool = False,
        use_cuda_kernel: bool = False,
        non_cosine_sim_attn: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        if l2norm_groups < 1 or dim_head % l2norm_groups:
            raise InvalidInputError(
                f"l2norm_groups={l2norm_groups}: it must divide dim_head, which is {dim_head}"
            )
        self.norm = nn.LayerNorm(dim) if pre_norm else nn.Identity()
        self.heads, self.scale, self.groups = heads, scale, l2norm_groups
        self.attn_fn: Any = plain_cosine_sim_attention
        if use_cuda_kernel:
            self.attn_fn = flash_cosine_sim_attention
        if non_cosine_sim_attn:
            self.attn_fn = non_cosine_sim_attn_fn
        self.attn_fn_kwargs = kwargs
        inner = dim_head * heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, inner, bias=False) for _ in range(3))
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [B, L, dim], and so the result."""
        x = self.norm(x)
        q, k, v = (
            project(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for project in (self.to_q, self.to_k, self.to_v)
        )
        given = {"causal": True, "scale": self.scale, "groups": self.groups}
        out = self.attn_fn(q, k, v, **{**given, **self.attn_fn_kwargs})
        result: Tensor = self.to_out(out.transpose(1, 2).flatten(2))
        return result


class _Residual(nn.Module):
    """A residual layer, with post-norm unless pre-norm is used.

    Wang et al., "DeepNet", arXiv:2203.00555, weights inputs by (2 depth)^(1/4) then.
    """

    def __init__(self, layer: nn.Module, dim: int, scale: float, pre_norm: bool) -> None:
        super().__init__()
        self.layer, self.scale = layer, scale
        self.norm = nn.Identity() if pre_norm else nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.norm(self.layer(x) + x * self.scale)
        return result


class CosineSimCausalTransformer(nn.Module):
    """A causal language model.

    Parameters
    ----------
    num_tokens, dim, max_seq_len, depth : int
    attn_scale : float
    attn_l2norm_groups, heads, dim_head : int
    use_cuda_kernel, pre_norm, non_cosine_sim_attn : bool
        As `Attention` has them; without `pre_norm`, norms follow the sums.
    **kwargs
        Further arguments of `Attention`.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        dim: int,
        max_seq_len: int,
        depth: int,
        attn_scale: float = 8,
        attn_l2norm_groups: int = 1,
        heads: int = 8,
        dim_head: int = 64,
        use_cuda_kernel: bool = False,
        pre_norm: bool = False,
        non_cosine_sim_attn: bool = False,
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.token_emb, self.pos_emb = nn.Embedding(num_tokens, dim), nn.Embedding(max_seq_len, dim)
        given = {
            "dim_head": dim_head,
            "heads": heads,
            "scale": attn_scale,
            "l2norm_groups": attn_l2norm_groups,
            "use_cuda_kernel": use_cuda_kernel,
            "non_cosine_sim_attn": non_cosine_sim_attn,
            **kwargs,
        }
        scale = 1.0 if pre_norm else (2 * depth) ** 0.25
        self.layers = nn.Sequential(
            *(
                part
                for _ in range(depth)
                for part in (
                    _Residual(Attention(dim, pre_norm=pre_norm, **given), dim, scale, pre_norm),
                    _Residual(FeedForward(dim, pre_norm=pre_norm), dim, scale, pre_norm),
                )
            )
        )
        self.to_logits = nn.Sequential(
            nn.LayerNorm(dim) if pre_norm else nn.Identity(),
            nn.Linear(dim, num_tokens, bias=False),
        )

    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor:
        """x: [B, L] tokens; logits [B, L, num_tokens], or the loss of each token after the first.

        Raises
        ------
        InvalidInputError
            L is over `max_seq_len`.
        """
        labels = x[:, 1:]
        if return_loss:
            x = x[:, :-1]
        if x.shape[1] > self.max_seq_len:
            raise InvalidInputError(
                f"x has {x.shape[1]} tokens: at most max_seq_len={self.max_seq_len} are allowed"
            )
        hidden = self.token_emb(x) + self.pos_emb(torch.arange(x.shape[1], device=x.device))
        logits: Tensor = self.to_logits(self.layers(hidden))
        if not return_loss:
            return logits
        return functional.cross_entropy(logits.transpose(1, 2), labels)

    @torch.no_grad()
    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        **kwargs: Any,  # noqa: ANN401
    ) -> Tensor:
        """Sample tokens that continue a prompt.

        Parameters
        ----------
        start_tokens : Tensor, [B, L]
        seq_len : int
            Tokens to draw.
        temperature : float
        filter_thres : float
            Part of the tokens, the least likely ones, that is never drawn.

        Returns
        -------
        Tensor, [B, seq_len]

        Raises
        ------
        InvalidInputError
            The start has no token to go on from.
        """
        if seq_len > 0 and start_tokens.shape[1] == 0:
            raise InvalidInputError(
                f"start_tokens has shape {list(start_tokens.shape)}: there must be at least one "
                "token to draw the next one after; begin with a token that stands for the start"
            )
        was_training = self.training
        self.eval()
        out = start_tokens
        for _ in range(seq_len):
            logits = self.forward(out[:, -self.max_seq_len :], **kwargs)[:, -1]
            count = max(1, int((1 - filter_thres) * logits.shape[-1]))
            lowest = logits.topk(count, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
            drawn = torch.multinomial(torch.softmax(logits / temperature, dim=-1), 1)
            out = torch.cat((out, drawn), dim=1)
        self.train(was_training)
        return out[:, start_tokens.shape[1] :]
