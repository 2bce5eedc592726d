"""Tests which backward passes take the wgmma kernel, and how TMA is told where its operands lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from jitattn.jit.launch import MOST_MAPS
from jitattn.jit.tensor_maps import BoxedTensor
from jitattn.kernels.bwd_sm90 import BwdSm90Spec, bwd_sm90_spec, refusal_of_backward
from jitattn.kernels.matrix import problem
from jitattn.plan import wgmma_backward
from jitattn.plan.step import Step
from jitattn.request.layouts import parse_any
from jitattn.spec.enums import Dtype, MaskKind, SeqLayout, Switch
from tests.cpu.plan.test_plan import CALLS, Device, backward_of, call_of, check

TAKEN = {
    "plain", "causal", "window", "stride", "padding", "bound", "ragged", "padded", "few keys",
    "8 bits", "8 bits, ragged",
}  # fmt: skip


def main_step(given: dict[str, Any], *, deterministic: bool = False) -> Step:
    plan = backward_of(given, "sm_90", deterministic=deterministic).plan
    return next(step for step in plan.steps if step.spec.family in ("bwd", "bwd_sm90"))


@pytest.mark.parametrize("name", [name for name in CALLS if name != "splits"])
def test_calls_that_are_served(name: str) -> None:
    step = main_step(CALLS[name])
    assert isinstance(step.spec, BwdSm90Spec) == (name in TAKEN)
    if name in TAKEN:
        assert tuple(name for name, _ in step.maps) == step.spec.tensor_maps
        check(backward_of(CALLS[name], "sm_90").plan)


def chosen(given: dict[str, Any], **more: Any) -> wgmma_backward.BackwardChoice:
    q, k, call = call_of(given)
    parsed = parse_any(q, k, k, call)
    runtime = parsed.runtime._replace(scale=abs(parsed.runtime.scale))
    arguments = {"deterministic": False, **more}
    return wgmma_backward.choice(parsed.problem, runtime, Device("sm_90"), **arguments)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "fp32": ({"dtype": torch.float32}, {}, "numerics"),
    "unaligned": ({"dim": 33}, {}, "multiples of 16 bytes"),
    "wide": ({"dim": 192}, {}, "head dims above 128"),
    "lists": (CALLS["lists"], {}, "listed"),
    "softcap": ({"softcap": 3.0}, {}, "changes scores"),
    "small scale": ({"scale": 1e-33}, {}, "scale"),
    "rows by index": (CALLS["rows by index"], {}, "share rows"),
    "pages": (CALLS["pages"], {}, "pages"),
    "stride in order": (CALLS["stride"], {"deterministic": True}, "local + stride"),
    "LSE of sinks": ({"sinks": torch.zeros(4)}, {"has_d_lse": True}, "sinks"),
    "expanded rows": ({}, {"d_out_strides": (64, 0, 64)}, ""),
    "overlapping rows": ({}, {"d_out_strides": (64, 8, 64)}, "overlap"),
}


@pytest.mark.parametrize(("given", "more", "reason"), REFUSED.values(), ids=REFUSED)
def test_other_calls_say_why(given: dict[str, Any], more: dict[str, Any], reason: str) -> None:
    found = chosen(given, **more)
    assert found.spec is None
    assert reason in found.refusal


def test_sinks_without_a_gradient_of_the_lse_are_in_the_lse() -> None:
    assert chosen({"sinks": torch.zeros(4)}).spec is not None
    preprocess = backward_of(CALLS["plain"], "sm_90").plan.steps[0]
    assert preprocess.numbers["folds_sinks"] == 1
    assert backward_of(CALLS["plain"], "sm_80").plan.steps[0].numbers["folds_sinks"] == 0


def test_another_architecture_has_none() -> None:
    q, k, call = call_of({})
    parsed = parse_any(q, k, k, call)
    for arch in ("sm_80", "sm_89"):
        found = wgmma_backward.choice(
            parsed.problem, parsed.runtime, Device(arch), deterministic=False
        )
        assert "wgmma" in found.refusal


def test_maps_of_a_batch() -> None:
    step = main_step({})
    tile = step.spec.tile
    of_q = BoxedTensor(
        "fp16", (64, 300, 4, 2), (4 * 128, 128, 300 * 4 * 128), (64, tile.block_q, 1, 1)
    )
    of_k = BoxedTensor(
        "fp16", (64, 300, 2, 2), (2 * 128, 128, 300 * 2 * 128), (64, tile.block_kv, 1, 1)
    )
    assert dict(step.maps) == {"q": of_q, "k": of_k, "v": of_k, "d_out": of_q}


def test_maps_of_sequences_have_all_rows() -> None:
    boxed = dict(main_step(CALLS["ragged"]).maps)
    assert boxed["q"].shape == boxed["d_out"].shape == (64, 600, 4, 1)
    assert boxed["k"].shape == boxed["v"].shape == (64, 600, 2, 1)


@pytest.mark.parametrize(
    ("given", "deterministic", "heads"),
    [({}, False, 1), (CALLS["causal"], False, 2), ({}, True, 4), (CALLS["causal"], True, 4)],
)
def test_sections(given: dict[str, Any], deterministic: bool, heads: int) -> None:
    """In fixed order, the blocks of a head are as far apart as they can be."""
    step = main_step(given, deterministic=deterministic)
    assert step.numbers["section_heads"] == heads


@pytest.mark.parametrize("dim", range(8, 129, 8))
@pytest.mark.parametrize("dim_v", [8, 64, 128])
def test_tiles_fit_the_multiprocessor(dim: int, dim_v: int) -> None:
    ragged = {"q_layout": SeqLayout.RAGGED, "kv_layout": SeqLayout.RAGGED}
    for more in ({}, ragged):
        spec = bwd_sm90_spec(problem(Dtype.BF16, dim, head_dim_v=dim_v, **more))
        tile = spec.tile
        assert spec.smem_bytes <= 227 * 1024
        assert spec.num_threads == 384
        assert len(spec.tensor_maps) <= MOST_MAPS
        # Sums of dK and dV, and of S and dP where these are held together; P.
        held = (dim + 15) // 16 * 8 + (dim_v + 15) // 16 * 8
        scores = tile.block_q * (2 if tile.overlaps is Switch.ON else 1) // 2 + tile.block_q // 4
        assert held + scores <= (216 if tile.piece_columns == 64 else 224)


def test_scores_that_are_served() -> None:
    asked = problem(Dtype.BF16, 64)
    assert refusal_of_backward(asked) is None
    assert refusal_of_backward(replace(asked, key_padding=Switch.ON, sinks=Switch.ON)) is None
    assert refusal_of_backward(replace(asked, mask=MaskKind.LOCAL_STRIDE)) is None
    for name in ("relative_bias", "alibi", "softcap", "dense", "dropout"):
        assert refusal_of_backward(replace(asked, **{name: Switch.ON})) is not None
