"""Random combinations of masks, biases and other features over random layouts."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st

from jitattn.values.masks import Causal, Dense, Full, KeyPadding, LocalStride, Mask, Window
from jitattn.values.norm import L2Norm

from .layouts import LayoutCase, check_layout, layout_cases
from .patterns import listed_rules, on_device

#: (dtype, head_dim): few, so that few kernels serve thousands of cases.
KINDS = ((torch.bfloat16, 64), (torch.float16, 20))
#: Features by name; each has a kernel for every kind, layout and row class.
FEATURES = (
    "window",
    "window sinks bias row",
    "causal bias32 relative staged",
    "window alibi padding",
    "causal dense staged",
    "causal softcap sinks bias staged",
    "window dense padding bias32",
    "local_stride sinks",
    "block_lists",
    "block_lists alibi padding",
    "block_lists bias sinks staged",
    "causal dropout",
    "block_lists dropout",
    "full cosine padding",
)
#: (q, kv)
LAYOUTS = (("batched", "batched"), ("ragged", "ragged"), ("batched", "paged"))


@dataclass(frozen=True)
class FeatureCase:
    """One call."""

    layout: LayoutCase
    features: str
    rule: Mask
    broadcasts: tuple[bool, bool, bool]  #: bias and dense masks over batch, heads, rows
    hides_all: bool  #: tensors hide whole rows and sequences
    has_batch_slopes: bool
    reach: int
    groups: int
    has_head_scale: bool
    seed: int


@st.composite
def feature_cases(
    draw: st.DrawFn,
    most_rows: int = 300,
    among: tuple[str, ...] = FEATURES,
    placed: tuple[tuple[str, str], ...] = LAYOUTS,
) -> FeatureCase:
    """Draw a case."""
    features = draw(st.sampled_from(among))
    # Keys in pages are normalised when they are stored.
    layouts = [pair for pair in placed if pair[1] != "paged" or "cosine" not in features]
    q_kind, kv_kind = draw(st.sampled_from(layouts))
    layout = draw(layout_cases(most_rows=most_rows))
    dtype, head_dim = draw(st.sampled_from(KINDS))
    lens_q, lens_kv = layout.len_q, layout.len_kv
    if q_kind == "batched":
        lens_q = (max(lens_q),) * len(lens_q)
    if kv_kind == "batched":
        lens_kv = (max(lens_kv),) * len(lens_kv)
    if "staged" in features and q_kind == kv_kind == "batched" and max(lens_q) == 1:
        lens_q = (2,) * len(lens_q)  # one row serves all queries, and needs no staging
    layout = replace(
        layout,
        dtype=dtype,
        head_dim=head_dim,
        q_kind=q_kind,
        kv_kind=kv_kind,
        len_q=lens_q,
        len_kv=lens_kv,
        page_size=16,
        pads_pages=False,
    )
    reach = st.sampled_from((None, 0, 1, 5, 16, 63, 64, 65, 130))
    rule: Mask = {"full": Full(), "causal": Causal()}.get(features.split()[0], Full())
    if features.startswith("window"):
        rule = Window(
            draw(reach),
            draw(st.sampled_from((None, 0, 0, 0, 3, 70))),
            draw(st.sampled_from((0, 0, 1, 4, 17, 64, 200))),
            draw(st.booleans()),
        )
    elif features.startswith("local_stride"):
        rule = LocalStride(
            draw(st.sampled_from((64, 64, 128))),
            draw(st.integers(1, 3)),
            draw(st.integers(1, 4)),
            draw(st.sampled_from((None, 0, 1, 2))),
            draw(st.integers(0, 3)),
            draw(st.integers(0, layout.heads_kv)),
            draw(st.booleans()),
        )
    elif features.startswith("block_lists"):
        heads = (layout.heads_kv * layout.group, layout.heads_kv)
        rule = draw(listed_rules(heads, (max(lens_q), max(lens_kv))))
    elif features.startswith("causal"):
        rule = draw(st.sampled_from((Causal(), Causal("top_left"))))
    return FeatureCase(
        layout=layout,
        features=features,
        rule=rule,
        broadcasts=(draw(st.booleans()), draw(st.booleans()), draw(st.booleans())),
        hides_all=draw(st.booleans()),
        has_batch_slopes=draw(st.booleans()),
        reach=draw(st.sampled_from((0, 3, 100))),
        groups=draw(st.sampled_from((1, 1, 2, 4))),
        has_head_scale=draw(st.booleans()),
        seed=draw(st.integers(0, 2**16)),
    )


def further(case: FeatureCase, device: str, given: dict[str, Any]) -> dict[str, Any]:
    """Build the other arguments of the call; values beyond the lengths are NaN, or attend."""
    generator = torch.Generator().manual_seed(case.seed)
    layout, words = case.layout, case.features.split()
    batch, heads = len(layout.len_q), layout.heads_kv * layout.group
    longest = [max(layout.len_q), max(layout.len_kv)]
    if layout.q_kind == "ragged":
        longest[0] = max(longest[0], given["q_seqs"].max_length())
    if layout.kv_kind == "ragged":
        longest[1] = max(longest[1], given["kv_seqs"].max_length())
    elif layout.kv_kind == "paged":
        longest[1] = given["kv_seqs"].max_length(layout.page_size)
    is_exact = layout.q_kind == layout.kv_kind == "batched"
    room = random.Random(case.seed).choice((0, 1, 16)) if not is_exact else 0

    is_staged, is_row = "staged" in words, "row" in words
    if is_staged and not is_exact:
        longest[0] = max(2, longest[0])

    def matrix() -> torch.Tensor:
        """Draw a bias or dense mask in the broadcast shape of the case."""
        broadcasts = (*case.broadcasts[:2], case.broadcasts[2] and not is_staged)
        if is_row:
            broadcasts = (case.broadcasts[0], True, True)
        sizes = zip(broadcasts, (batch, heads, longest[0]), strict=True)
        shape = [1 if one else size for one, size in sizes]
        return torch.randn(*shape, longest[1] + room, generator=generator)

    def laid_out(matrix: torch.Tensor) -> torch.Tensor:
        skip = 0 if is_staged or is_row else 1
        width = -(-(matrix.shape[3] + skip) // 16) * 16
        storage = matrix.new_ones(*matrix.shape[:3], width)
        if matrix.is_floating_point():
            storage.fill_(float("nan"))
        storage[..., skip : skip + matrix.shape[3]] = matrix
        return storage.to(device)[..., skip : skip + matrix.shape[3]]

    made: dict[str, Any] = {"mask": on_device(case.rule, device)}
    if "bias" in words or "bias32" in words:
        bias = matrix()
        bias[torch.rand(bias.shape, generator=generator) < 0.1] = float("-inf")
        if room:
            bias[..., longest[1] :] = float("nan")
        bias = bias.to(layout.dtype) if "bias" in words else bias
        made["bias"] = laid_out(bias)
    if "relative" in words:
        table = torch.randn(
            1 if case.broadcasts[1] else heads, 2 * case.reach + 1, generator=generator
        )
        made["relative_bias"] = table.to(device)
    if "alibi" in words:
        shape = (batch, heads) if case.has_batch_slopes else (heads,)
        made["alibi_slopes"] = torch.rand(shape, generator=generator).to(device)
    if "softcap" in words:
        made["softcap"] = 2.0
    if "sinks" in words:
        made["sinks"] = (3 * torch.randn(heads, generator=generator)).to(device)
    if "dropout" in words:
        made["dropout_p"] = 0.3
        made["dropout_state"] = torch.tensor([case.seed << 40, case.seed], device=device)
    if "cosine" in words:
        scale = torch.rand(heads, generator=generator).to(device)
        learned = (scale, 1.0) if case.has_head_scale else (None, None)
        made["qk_norm"] = L2Norm(case.groups, *learned)
        made["scale"] = 8.0 / case.groups  # within the bound of fp16
    if "padding" in words:
        keep = torch.rand(batch, longest[1] + room, generator=generator) < 0.8
        if case.hides_all:
            keep[0] = False
        made["mask"] = made["mask"] & KeyPadding(keep.to(device))
    if "dense" in words:
        keep = matrix() < 1.0
        if case.hides_all and longest[0]:
            keep[:, :, 0] = False
        made["mask"] = made["mask"] & Dense(laid_out(keep))
    return made


def check_features(case: FeatureCase, device: str) -> None:
    """Compare the call with the reference."""
    check_layout(case.layout, device, lambda where, given: further(case, where, given))
