"""Cases of context-parallel calls: masks, scores, layouts and lengths."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import jitattn
from jitattn import Causal, Full, KeyPadding, MaskMod, PerHead, Ragged, Window

#: Device and dtype of what cases are made of; a rank on a GPU, which has no fp64, changes them.
DEVICE = ["cpu"]
DTYPE = [torch.float64]
#: Head dims of ranks on a GPU.
GPU_DIMS = (16, 16)
#: Shared gradients, by the name of their argument.
SHARED = ("relative_bias", "alibi_slopes", "sinks", "table")


class Case(NamedTuple):
    """A call: its arguments, sizes and layouts."""

    name: str
    make: Callable[[], dict[str, Any]] = dict
    length: int = 61
    len_kv: int | None = None  #: as `length`
    heads: tuple[int, int] = (8, 4)
    dims: tuple[int, int] = (8, 6)
    batch: int = 2
    dtype: torch.dtype = torch.float64
    layouts: tuple[str, ...] = ("none",)  #: of plans; "none": without one
    layout: str = "bshd"
    lengths: tuple[int, ...] = ()  #: of the first ranks, without a plan
    tolerance: float = 1e-12

    @property
    def is_flat(self) -> bool:
        return self.batch == 0


METHODS = ("ring", "allgather", "ulysses")
ALL = ("contiguous", "zigzag", "striped", "auto")


def drawn(*shape: int, dtype: torch.dtype | None = None, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + seed)
    found = torch.randn(shape, generator=generator, dtype=torch.float64)
    return found.to(DEVICE[0], DTYPE[0] if dtype is None else dtype)


def _ragged(*lengths: int, gap: int = 0) -> Ragged:
    ends = torch.tensor([0, *lengths]).cumsum(0) + gap
    start, length = ends[:-1].int(), torch.tensor(lengths, dtype=torch.int32)
    return Ragged(start.to(DEVICE[0]), length.to(DEVICE[0]))


def _documents(**more: Any) -> dict[str, Any]:
    seqs = _ragged(5, 1, 20, 0, 30, gap=2)
    return {"q_seqs": seqs, "kv_seqs": seqs, **more}


def _pattern(heads: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(heads)
    return (torch.rand(heads, 8, 8, generator=generator) < 0.4).to(DEVICE[0])


def _scored(**more: Any) -> dict[str, Any]:
    table = drawn(8, 61, seed=3).requires_grad_()

    def score(s: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return s + table[h, kv_idx] * 0.5 - 0.01 * (q_idx - kv_idx).abs()

    return {"score_mod": score, "table": table, **more}


def _near(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
    return (q_idx - kv_idx < 9 + h) & (q_idx >= kv_idx)


def _dropped() -> dict[str, Any]:
    state = torch.tensor([5, 2**40 + 7], device=DEVICE[0])
    return {"mask": Causal(), "dropout_p": 0.3, "dropout_state": state}


def _biased(**more: Any) -> dict[str, Any]:
    return {
        "relative_bias": drawn(8, 21, seed=1).requires_grad_(),
        "alibi_slopes": drawn(8, seed=2).abs().requires_grad_(),
        **more,
    }


def _some_heads() -> dict[str, Any]:
    rules = [Causal(), Window(6, 0, 3), Full(), jitattn.LocalStride(8, 2, 3)]
    return {"mask": PerHead(rules)}


LOCAL = jitattn.LocalStride(8, 2, 3, num_dense_heads=1)
TWO_WAYS = jitattn.LocalStride(8, (1, 2), 3, causal=False)

CASES = (
    Case("full"),
    Case("causal", lambda: {"mask": Causal()}, layouts=("none", *ALL)),
    Case("causal fp32", lambda: {"mask": Causal()}, dtype=torch.float32, layouts=("zigzag",),
         tolerance=2e-6),
    Case("causal bf16", lambda: {"mask": Causal()}, dtype=torch.bfloat16, layouts=("zigzag",),
         tolerance=2e-2),
    Case("mqa", lambda: {"mask": Causal()}, heads=(8, 1), layouts=("zigzag",)),
    Case("odd heads", lambda: {"mask": Causal()}, heads=(9, 3), layouts=("none",)),
    Case("mha", lambda: {"mask": Causal()}, heads=(8, 8), layouts=("contiguous",)),
    Case("window", lambda: {"mask": Window(9, 0, 3)}, layouts=("none", *ALL)),
    Case("near window", lambda: {"mask": Window(4, 1, 1)}, layouts=("none", "contiguous")),
    Case("near window bf16", lambda: {"mask": Window(4, 0, 2)}, dtype=torch.bfloat16,
         tolerance=2e-2),
    Case("window both ways", lambda: {"mask": Window(5, 4, 2)}, layouts=ALL[1:]),
    Case("narrow window", lambda: {"mask": Window(0, 0)}, layouts=("striped",)),
    Case("uneven lengths", lambda: {"mask": Window(20, 3)}, lengths=(13, 0, 30)),
    Case("few rows", lambda: {"mask": Causal()}, length=5, layouts=("none", "zigzag", "striped")),
    Case("one row", lambda: {"mask": Window(2, 0, 1, True)}, length=1, len_kv=33),
    Case("cross", lambda: {"mask": Causal()}, length=40, len_kv=61),
    Case("cross top left", lambda: {"mask": Causal("top_left")}, length=61, len_kv=40),
    Case("blind rows", lambda: {"mask": Causal(), **_biased()}, length=61, len_kv=40),
    Case("q_offset", lambda: {"mask": Window(9, 2), "q_offset": 7}, length=20, len_kv=61),
    Case("bhsd", lambda: {"mask": Causal()}, layout="bhsd", layouts=("zigzag",)),
    Case("biases", lambda: _biased(mask=Causal()), layouts=("none", "zigzag", "striped")),
    Case("biases of all pairs", _biased, layouts=("none", "striped")),
    Case("slopes by batch", lambda: {"alibi_slopes": drawn(2, 8).abs().requires_grad_(),
                                     "mask": Causal()}, layouts=("zigzag", "striped")),
    Case("sinks and softcap", lambda: {"mask": Causal(), "softcap": 2.0,
                                       "sinks": drawn(8).requires_grad_()}, layouts=("zigzag",)),
    Case("cosine", lambda: {"mask": Causal(), "qk_norm": jitattn.L2Norm(), "scale": 3.0},
         layouts=("zigzag",)),
    Case("padding", lambda: {"mask": Causal() & KeyPadding(drawn(2, 61) > -1)},
         layouts=("none", "zigzag", "striped")),
    Case("dropout", _dropped, layouts=("none", "zigzag", "striped")),
    Case("dropout and sinks", lambda: {**_dropped(), "sinks": drawn(8).requires_grad_()},
         layouts=("zigzag",)),
    Case("score", lambda: _scored(mask=Causal()), layouts=("none", "zigzag", "striped")),
    Case("function", lambda: {"mask": MaskMod(_near)}, layouts=("auto", "striped")),
    Case("functions", lambda: {"mask": ~MaskMod(_near) | MaskMod(_near, q_offset=4)},
         layouts=("zigzag",)),
    Case("function with offset", lambda: {"mask": MaskMod(_near), "q_offset": "bottom_right"},
         length=40, len_kv=61),
    Case("local stride", lambda: {"mask": LOCAL}, layouts=("none", "zigzag", "striped")),
    Case("local stride both ways", lambda: {"mask": TWO_WAYS}, layouts=("none", "zigzag")),
    Case("local stride mqa", lambda: {"mask": LOCAL}, heads=(9, 3), layouts=("none",)),
    Case("blocks", lambda: {"mask": jitattn.BlockSparse(_pattern(), 8, causal=True)},
         layouts=("none", "auto", "striped")),
    Case("blocks by head", lambda: {"mask": jitattn.BlockSparse(_pattern(4), 8)},
         layouts=("zigzag",)),
    Case("blocks from a row on", lambda: {"mask": jitattn.BlockSparse(_pattern(8), 8, first_row=3)},
         length=40, len_kv=61),
    Case("rules by head", _some_heads, layouts=("none", "zigzag")),
    Case("documents", lambda: _documents(mask=Causal()), batch=0, layouts=("none", *ALL)),
    Case("documents, window", lambda: _documents(mask=Window(6, 0, 2)), batch=0,
         layouts=("none", "zigzag", "striped")),
    Case("documents, all pairs", lambda: _documents(**_biased()), batch=0,
         layouts=("none", "zigzag", "striped")),
    Case("documents, score", lambda: _documents(**_scored(mask=Causal())), batch=0,
         layouts=("none", "zigzag")),
    Case("documents, dropout", lambda: _documents(**_dropped()), batch=0, layouts=("zigzag",)),
    Case("documents, slopes", lambda: _documents(
        mask=Causal(), alibi_slopes=drawn(5, 8).abs().requires_grad_()), batch=0,
         layouts=("none", "zigzag")),
    Case("documents, pattern", lambda: _documents(mask=LOCAL), batch=0, layouts=("zigzag",)),
    Case("documents apart", lambda: {"mask": Causal(), "q_seqs": _ragged(10, 20, 15),
                                     "kv_seqs": _ragged(20, 13, 28)}, batch=0, length=45,
         len_kv=61),
)  # fmt: skip
