"""Tests that changes of run-time facts alone never recompile a kernel."""

from __future__ import annotations

import random

import pytest
import torch

import jitattn
from jitattn.jit import build
from jitattn.run import forward
from tests.support.inputs import random_qkv

pytestmark = pytest.mark.real_gpu


def test_lengths_batch_heads_and_strides_compile_nothing() -> None:
    draw = random.Random(7)

    def call(len_q: int, sign: int) -> None:
        heads_kv = draw.randint(1, 3)
        group = draw.choice((1, 1, 2)) if len_q < 8 else 1
        q, k, v = random_qkv(
            draw.randint(1, 3),
            len_q,
            draw.randint(1, 900),
            heads_kv * group,
            heads_kv,
            64,
            dtype=torch.bfloat16,
            device="cuda",
        )
        layout = draw.choice(("bshd", "bhsd"))
        if layout == "bhsd":
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        jitattn.attention(
            q,
            k,
            v,
            mask=jitattn.Causal(draw.choice(("bottom_right", "top_left"))),
            scale=sign * draw.uniform(0, 1),
            layout=layout,
            num_splits=draw.choice((1, 2, 5)),
            return_lse=draw.random() < 0.5,
        )

    classes = ((1, 8), (17, 64), (65, 500))  # one kernel each, of long queries one for each sign
    for low, high in classes:
        for idx in range(6):
            call(draw.randint(low, high), (-1) ** idx)
    before = build.stats()
    for low, high in classes:
        for idx in range(30):
            call(draw.randint(low, high), (-1) ** idx)
    after = build.stats()
    assert (after.compiled, after.disk_hits) == (before.compiled, before.disk_hits)


def test_splitting_for_the_first_time_compiles_nothing() -> None:
    tensors = {"dtype": torch.bfloat16, "device": "cuda"}
    forward.forget_kernels()
    build.clear_memory()
    short = random_qkv(1, 4, 50, 2, 2, 64, **tensors)
    assert jitattn.explain(*short).num_splits == 1
    jitattn.attention(*short)
    before = build.stats()
    long = random_qkv(1, 4, 9000, 2, 2, 64, **tensors)
    assert jitattn.explain(*long).num_splits > 1
    jitattn.attention(*long)
    assert build.stats() == before
