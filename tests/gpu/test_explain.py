"""Tests that `explain` reports the kernel and launches of `attention`."""

from __future__ import annotations

import json

import pytest
import torch

import jitattn
from tests.support.inputs import random_qkv


@pytest.mark.real_gpu
def test_record_of_a_chat_call(arch: str) -> None:
    q, k, v = random_qkv(1, 8, 4096, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    record = jitattn.explain(q, k, v, mask=jitattn.Causal())
    assert record.path == "cuda"
    assert record.kernel["arch"] == arch
    assert record.kernel["mask"] == "causal"
    assert record.row_class == "ROWS64"
    assert record.heads_per_tile == 4
    assert record.num_splits > 1
    assert record.num_ctas == 2 * record.num_splits  # one query tile for each kv head
    assert 0 < record.registers <= 255
    assert record.smem_bytes > 0
    assert json.loads(json.dumps(record.to_dict()))["num_splits"] == record.num_splits
    text = str(record)
    assert f"{record.num_splits} splits" in text
    assert "64 rows" in text


def test_nothing_is_launched() -> None:
    q, k, v = random_qkv(1, 8, 100, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    out = torch.full_like(q, float("nan"))
    jitattn.explain(q, k, v, out=out)
    assert out.isnan().all()


def test_asked_splits_are_reported() -> None:
    q, k, v = random_qkv(1, 8, 1000, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    record = jitattn.explain(q, k, v, num_splits=3)
    assert record.num_splits == 3
    assert any("num_splits=3" in reason for reason in record.why)


def test_element_access_is_named() -> None:
    q, k, v = random_qkv(1, 8, 1000, 8, 2, 33, dtype=torch.bfloat16, device="cuda")
    record = jitattn.explain(q, k, v)
    assert record.kernel["access"] == "element"
    assert any("16 bytes" in reason for reason in record.why)


def test_reported_splits_are_those_of_the_call() -> None:
    q, k, v = random_qkv(1, 8, 4096, 8, 2, 128, dtype=torch.bfloat16, device="cuda")
    splits = jitattn.explain(q, k, v).num_splits
    assert splits > 1
    chosen = jitattn.attention(q, k, v)
    assert torch.equal(chosen, jitattn.attention(q, k, v, num_splits=splits))
    assert not torch.equal(chosen, jitattn.attention(q, k, v, num_splits=1))


def test_text_names_the_tile() -> None:
    q, k, v = random_qkv(1, 300, 300, 2, 2, 128, dtype=torch.bfloat16, device="cuda")
    record = jitattn.explain(q, k, v)
    tile = record.kernel
    assert f"{tile['block_q']} rows x {tile['block_kv']} keys" in str(record)
    assert record.row_class == "MANY"


def test_result_without_elements_has_no_kernel() -> None:
    q = torch.empty(1, 0, 2, 64, device="cuda", dtype=torch.bfloat16)
    record = jitattn.explain(q, q, q)
    assert record.path == "none"
    assert record.kernel == {}


def test_the_kernel_of_gradients_is_that_of_the_call() -> None:
    q, k, v = (torch.randn(1, 64, 2, 64, device="cuda", requires_grad=True) for _ in range(3))
    with torch.enable_grad():
        small = jitattn.explain(q, k, v, mask=jitattn.LocalStride(16, 2, 3))
        listed = jitattn.explain(q, k, v, mask=jitattn.LocalStride(8, 2, 3))
    assert small.kernel["mask"] == listed.kernel["mask"] == "block_lists"
    assert small.backward["mask"] == "fine_stride"
    assert listed.backward["mask"] == "block_lists"
