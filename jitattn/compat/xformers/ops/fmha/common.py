"""Inputs and operators of memory-efficient attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

import torch

from jitattn.compat.xformers.ops.fmha._attend import attend, gradients

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from jitattn.compat.xformers.ops.fmha._bias import AttentionBias


@dataclass
class Inputs:
    """The arguments of a call, as `memory_efficient_attention` takes them."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_bias: Tensor | AttentionBias | None = None
    p: float = 0.0
    scale: float | None = None
    output_dtype: torch.dtype | None = None
    is_partial: bool = False

    @property
    def device(self) -> torch.device:
        """Device of the inputs."""
        return self.query.device

    @property
    def scale_float(self) -> float:
        """The scale of the scores."""
        return float(self.query.shape[-1] ** -0.5 if self.scale is None else self.scale)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of query, key and value."""
        return sum(x.untyped_storage().nbytes() for x in (self.query, self.key, self.value))

    def get_output_dtype(self) -> torch.dtype:
        """Return the dtype of the result: of partial ones fp32, unless it is given."""
        if self.output_dtype is not None:
            return self.output_dtype
        is_wide = self.query.dtype is torch.float64
        return torch.float32 if self.is_partial and not is_wide else self.query.dtype

    def get_qkv_in_bmghk(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return query, key and value as [B, L, G, H, D]."""
        missing = 5 - self.query.dim()
        shape = (slice(None), slice(None), *(None,) * missing)
        return self.query[shape], self.key[shape], self.value[shape]


@dataclass
class Context:
    """What a forward pass leaves for its backward pass."""

    lse: Tensor
    out: Tensor
    op_bw: type[AttentionBwOpBase] | None = None
    rng_state: Any | None = None
    qkv_share_storage: bool = False


@dataclass
class Gradients:
    """Gradients of a call. That of a bias is made by `memory_efficient_attention` alone."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    db: Tensor | None = None


class AttentionOpBase:
    """Base of the operators that `op` may name: one computes what all others do."""

    OPERATOR: ClassVar[Any] = True
    SUPPORTED_DEVICES: ClassVar[set[str]] = {"cpu", "cuda"}
    CUDA_MINIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int]] = (8, 0)
    CUDA_MAXIMUM_COMPUTE_CAPABILITY: ClassVar[tuple[int, int] | None] = None
    SUPPORTED_DTYPES: ClassVar[set[torch.dtype]] = {torch.float32, torch.float16, torch.bfloat16}
    SUPPORTED_MAX_K: ClassVar[float] = 256
    SUPPORTED_MIN_K: ClassVar[int] = 1
    SUPPORTS_DROPOUT: ClassVar[bool] = True
    SUPPORTS_CUSTOM_SCALE: ClassVar[bool] = True
    SUPPORTS_DIFFERENT_VALUE_EMBED: ClassVar[bool] = True
    SUPPORTS_OUTPUT_DTYPE: ClassVar[bool] = True
    SUPPORTS_PARTIAL: ClassVar[bool] = True
    SUPPORTS_BMGHK: ClassVar[bool] = True
    IS_DETERMINISTIC: ClassVar[bool] = True
    VARLEN_LSE_PACKED: ClassVar[bool] = True
    OPERATOR_CATEGORY: ClassVar[str] = "memory_efficient_attention"
    NAME: ClassVar[str] = "jitattn"

    @classmethod
    def is_available(cls) -> bool:
        """Return True: kernels are compiled when they are first needed."""
        return True

    @classmethod
    def supports(cls, d: Inputs) -> bool:
        """Return whether a call with these inputs has a kernel."""
        return not cls.not_supported_reasons(d)

    @classmethod
    def shape_not_supported_reasons(
        cls,
        Mq: int,  # noqa: N803 - the original's names
        Mkv: int,  # noqa: N803
        K: int,  # noqa: N803
        Kv: int,  # noqa: N803
    ) -> list[str]:
        """Return why sizes have no kernel; empty if they have one."""
        del Mq, Mkv
        return (
            [] if max(K, Kv) <= cls.SUPPORTED_MAX_K else [f"head dim above {cls.SUPPORTED_MAX_K}"]
        )

    @classmethod
    def not_supported_reasons(cls, d: Inputs) -> list[str]:
        """Return why inputs have no kernel; empty if they have one."""
        sizes = (d.query.shape[1], d.key.shape[1], d.query.shape[-1], d.value.shape[-1])
        reasons = cls.shape_not_supported_reasons(*sizes)
        if d.query.device.type not in cls.SUPPORTED_DEVICES:
            reasons.append(f"device={d.query.device.type} (supported: {cls.SUPPORTED_DEVICES})")
        if d.query.dtype not in cls.SUPPORTED_DTYPES:
            reasons.append(f"dtype={d.query.dtype} (supported: {cls.SUPPORTED_DTYPES})")
        return reasons


class AttentionFwOpBase(AttentionOpBase):
    """Base of forward operators."""

    ERROR_ATOL: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float32: 3e-4,
        torch.float16: 4e-3,
        torch.bfloat16: 2e-2,
    }
    ERROR_RTOL: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float32: 2e-5,
        torch.float16: 4e-4,
        torch.bfloat16: 5e-3,
    }

    @classmethod
    def apply(cls, inp: Inputs, needs_gradient: bool) -> tuple[Tensor, Context | None]:
        """Return the result, and with `needs_gradient` what `AttentionBwOpBase.apply` needs."""
        given = (inp.query, inp.key, inp.value, inp.attn_bias, inp.p, inp.scale)
        dtype = inp.get_output_dtype()
        if not needs_gradient:
            result: Tensor = attend(*given, dtype, return_lse=False)
            return result, None
        out, lse = attend(*given, dtype, return_lse=True)
        return out, Context(lse=lse, out=out)


class AttentionBwOpBase(AttentionOpBase):
    """Base of backward operators."""

    ERROR_ATOL: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float32: 9e-4,
        torch.float16: 0.2,
        torch.bfloat16: 0.9,
    }
    ERROR_RTOL: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float32: 1e-4,
        torch.float16: 2e-2,
        torch.bfloat16: 0.1,
    }
    SUPPORTS_ATTN_BIAS_GRAD: ClassVar[bool] = True

    @classmethod
    def apply(cls, ctx: Context, inp: Inputs, grad: Tensor) -> Gradients:
        """Return the gradients of query, key and value."""
        given = (inp.query, inp.key, inp.value, inp.attn_bias, inp.scale)
        return Gradients(*gradients(grad, ctx.out, ctx.lse, *given))


#: What `op` may be: a forward and a backward operator.
AttentionOp: TypeAlias = tuple[type[AttentionFwOpBase] | None, type[AttentionBwOpBase] | None]


def bmk2bmhk(tensor: Tensor, num_heads: int) -> Tensor:
    """Return a tensor [B * num_heads, L, D] as [B, L, num_heads, D]; one of four dims as it is."""
    if tensor.dim() == 4:
        return tensor
    heads: Tensor = tensor.unflatten(0, (-1, num_heads))
    return heads.transpose(1, 2)


def check_lastdim_alignment_stride1(
    reasons: list[str], name: str, x: Tensor, alignment: int
) -> None:
    """Append to `reasons` what the last dim of a tensor lacks: no alignment is asked for here."""
    del alignment
    if x.stride(-1) > 1:
        reasons.append(f"{name}.stride(-1) is {x.stride(-1)}: call .contiguous()")
