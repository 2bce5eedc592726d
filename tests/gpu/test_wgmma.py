"""Tests the wgmma kernels of sm_90: every layout, mask and score modification that they serve."""

from __future__ import annotations

import itertools
import math
import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import jitattn
from jitattn import Causal, Full, KeyPadding, LocalStride, Padded, Ragged, Window
from jitattn.kernels.matrix import problem
from jitattn.run import forward
from jitattn.spec.enums import Dtype, MaskKind, RowClass
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.precompile import CompileOnce, kernels_of
from tests.support.wgmma import BF16, FP16, LIMIT, check, drawn

DIMS = [
    (64, 64),
    (128, 128),
    (256, 256),
    (8, 8),
    (40, 40),
    (80, 80),
    (96, 96),
    (192, 128),
    (64, 256),
]


@pytest.fixture(scope="module", autouse=True)
def _precompiled(wgmma_family: None, arch: str, compile_once: CompileOnce) -> None:
    masks, dtypes = (MaskKind.FULL, MaskKind.CAUSAL), (Dtype.FP16, Dtype.BF16)
    specs = [
        spec
        for (dim, dim_v), mask, dtype in itertools.product(DIMS, masks, dtypes)
        for spec in kernels_of(problem(dtype, dim, mask, head_dim_v=dim_v), arch, RowClass.MANY)
    ]
    assert compile_once(specs) == []


@pytest.mark.parametrize("dims", DIMS, ids=str)
@pytest.mark.parametrize("dtype", [FP16, BF16], ids=str)
@pytest.mark.parametrize("mask", [Full(), Causal(), Causal("top_left")], ids=str)
def test_head_dims(dims: tuple[int, int], dtype: torch.dtype, mask: Any) -> None:
    for len_q, len_kv in ((300, 300), (129, 1000), (520, 70), (700, 1)):
        q = drawn(2, len_q, 4, dims[0], dtype=dtype)
        k = drawn(2, len_kv, 4, dims[0], dtype=dtype)
        check(q, k, drawn(2, len_kv, 4, dims[1], dtype=dtype), mask=mask)


FEATURES: dict[str, dict[str, Any]] = {
    "window": {"mask": Window(200, 0)},
    "window, first keys": {"mask": Window(200, 30, keep_first=150)},
    "narrow window": {"mask": Window(5, 0, keep_first=1)},
    "ahead": {"mask": Window(30, 300)},
    "stride": {"mask": LocalStride(64, 2, 3)},
    "stride by head": {"mask": LocalStride(128, 1, 2, head_step=1)},
    "fp32 out": {"out_dtype": torch.float32},
    "softcap": {"softcap": 3.0, "mask": Causal()},
    "scale": {"scale": 0.7},
    "scale 0": {"scale": 0.0},
    "splits": {"num_splits": 3},
    "splits of causal": {"num_splits": 4, "mask": Causal()},
    "splits of a window": {"num_splits": 2, "mask": Window(300, 0, keep_first=4)},
}


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("name", FEATURES)
def test_features(name: str, dim: int) -> None:
    q, k, v = drawn(2, 700, 6, dim), drawn(2, 900, 2, dim), drawn(2, 900, 2, dim)
    check(q, k, v, **FEATURES[name])


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_features_with_tensors(dim: int) -> None:
    q, k, v = (drawn(2, 700, 4, dim) for _ in range(3))
    check(q, k, v, sinks=torch.randn(4, device="cuda"), mask=Causal())
    keep = torch.rand(2, 700, device="cuda") > 0.5
    keep[1] = False  # rows that see nothing
    out = check(q, k, v, mask=KeyPadding(keep))
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    state = torch.tensor([5, 7], device="cuda")
    given = {"dropout_p": 0.3, "dropout_state": state}
    assert jitattn.explain(q, k, v, **given).kernel["family"] == "fwd_sm90"
    out = jitattn.attention(q, k, v, **given)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JITATTN_FAMILY", "sm80")
        forward.forget_kernels()
        other = jitattn.attention(q, k, v, **given)  # drops the same weights
    forward.forget_kernels()
    assert rel_l2(out, other) < LIMIT[BF16]


@pytest.mark.parametrize("layout", ["bshd", "bhsd"])
def test_strides(layout: str) -> None:
    """Gaps between rows, expanded heads and batches, and heads first."""
    room = drawn(2, 500, 3, 4, 128)
    q, k, v = room[:, :, 0], room[:, :, 1], room[:, :, 2, :1].expand(-1, -1, 4, -1)
    k = k[:1].expand(2, -1, -1, -1)
    if layout == "bhsd":
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    check(q, k, v, mask=Causal(), layout=layout)


@pytest.mark.parametrize("mask", [Full(), Causal(), Window(60, 0, keep_first=3)], ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("num_splits", [None, 1, 3])
def test_ragged(dim: int, mask: Any, num_splits: int | None) -> None:
    """Rows between sequences hold what is no number."""
    lengths, gap = [300, 1, 0, 129, 700, 64], 5
    starts = [sum(lengths[:i]) + gap * (i + 1) for i in range(len(lengths))]
    rows = starts[-1] + lengths[-1] + gap
    q, k, v = (torch.full((rows, 2, dim), math.nan, device="cuda", dtype=BF16) for _ in range(3))
    for start, length in zip(starts, lengths, strict=True):
        for x in (q, k, v):
            x[start : start + length] = drawn(length, 2, dim)
    seqs = Ragged(torch.tensor(starts, device="cuda"), torch.tensor(lengths, device="cuda"), 700)
    out = check(q, k, v, q_seqs=seqs, kv_seqs=seqs, mask=mask, num_splits=num_splits)
    assert out.isfinite().all()


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_neighbours_change_no_bit(dim: int) -> None:
    """Rows of other sequences beside those of a tile have no part in its sums."""
    lengths = torch.tensor([300, 130, 180, 333], device="cuda")
    ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
    q, k, v = (drawn(943, 2, dim) for _ in range(3))
    q[300:430] *= 50
    seqs = Ragged.from_cu_seqlens(ends, 333)
    given = {"mask": Causal(), "num_splits": 1}
    out = check(q, k, v, q_seqs=seqs, kv_seqs=seqs, **given)
    for begin, end in itertools.pairwise(ends.tolist()):
        alone = Ragged.from_cu_seqlens(torch.tensor([0, end - begin], device="cuda").int(), 333)
        qkv = (x[begin:end].clone() for x in (q, k, v))
        own = jitattn.attention(*qkv, q_seqs=alone, kv_seqs=alone, **given)
        assert torch.equal(own, out[begin:end])


@pytest.mark.parametrize("ragged", ["q", "kv"])
def test_one_side_ragged(ragged: str) -> None:
    q, k, v = (drawn(2, 300, 2, 128) for _ in range(3))
    ends = torch.tensor([0, 300, 600], device="cuda", dtype=torch.int32)
    seqs = Ragged.from_cu_seqlens(ends, 300)
    if ragged == "q":
        check(q.flatten(0, 1), k, v, q_seqs=seqs, mask=Causal())
    else:
        check(q, k.flatten(0, 1), v.flatten(0, 1), kv_seqs=seqs, mask=Causal())


@pytest.mark.real_gpu
def test_a_fresh_thread() -> None:
    """Encoding maps needs a context, which a thread without CUDA calls lacks."""
    q, k, v = (drawn(1, 300, 2, 128) for _ in range(3))
    truth = jitattn.attention(q, k, v)
    forward.forget_kernels()
    outs: list[torch.Tensor] = []

    def call() -> None:
        with torch.no_grad():
            outs.append(jitattn.attention(q, k, v))

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert torch.equal(outs[0], truth)
    assert jitattn.explain(q, k, v).kernel["family"] == "fwd_sm90"


def test_padded_and_rows_by_index() -> None:
    q, cache = drawn(3, 200, 4, 128), drawn(5, 400, 2, 128)
    lengths = torch.tensor([400, 0, 131], device="cuda")
    for row, length in ((4, 400), (2, 0), (0, 131)):
        cache[row, length:] = math.nan
    where = Padded(lengths, batch_idx=torch.tensor([4, 2, 0], device="cuda"))
    out = check(q, cache, cache, kv_seqs=where, mask=Causal())
    assert torch.equal(out[1], torch.zeros_like(out[1]))
    k, v = drawn(3, 400, 2, 128), drawn(3, 400, 2, 128)
    for row, length in enumerate((100, 0, 32)):
        k[row, length:] = v[row, length:] = math.nan
    of_k = Padded(torch.tensor([100, 0, 32], device="cuda"))
    check(q, k, v, q_seqs=Padded(lengths // 2), kv_seqs=of_k)


@pytest.mark.real_gpu
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_many_tiles_on_each_multiprocessor(dim: int) -> None:
    """Tiles are drawn from a counter that every launch leaves at 0."""
    q, k, v = (drawn(3, 1100, 32, dim) for _ in range(3))
    first = check(q, k, v, mask=Causal())
    for _ in range(20):
        assert torch.equal(jitattn.attention(q, k, v, mask=Causal()), first)


def test_other_keys_change_nothing_in_a_batch() -> None:
    """With a fixed number of splits, the same inputs in a larger batch give the same bits."""
    q, k, v = (drawn(4, 500, 2, 128) for _ in range(3))
    whole = jitattn.attention(q, k, v, mask=Causal(), num_splits=2)
    for idx in range(4):
        one = slice(idx, idx + 1)
        alone = jitattn.attention(q[one], k[one], v[one], mask=Causal(), num_splits=2)
        assert torch.equal(alone, whole[one])


@pytest.mark.real_gpu
def test_a_captured_call_takes_new_contents() -> None:
    q, k, v = (drawn(1, 400, 4, 128) for _ in range(3))
    jitattn.attention(q, k, v)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v)
    for _ in range(3):
        q.normal_()
        v.normal_()
        graph.replay()
        assert torch.equal(out, jitattn.attention(q, k, v))


@pytest.mark.real_gpu
def test_two_streams_draw_their_own_tiles() -> None:
    inputs = [tuple(drawn(2, 1500, 16, 64) for _ in range(3)) for _ in range(2)]
    truths = [jitattn.attention(*qkv) for qkv in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(10):
        outs = []
        for stream, qkv in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                outs.append(jitattn.attention(*qkv))
        torch.cuda.synchronize()
        assert all(map(torch.equal, outs, truths))


@pytest.fixture
def _mma_only(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("JITATTN_FAMILY", "sm80")
    forward.forget_kernels()
    yield
    monkeypatch.undo()
    forward.forget_kernels()


@pytest.mark.usefixtures("_mma_only")
def test_the_family_can_be_switched_off() -> None:
    q, k, v = (drawn(1, 300, 4, 128) for _ in range(3))
    record = jitattn.explain(q, k, v)
    assert record.kernel["family"] == "fwd"
    assert any("mma.sync" in reason for reason in record.why)
    jitattn.attention(q, k, v)


@pytest.mark.real_gpu
@pytest.mark.usefixtures("full_grid")
def test_ten_thousand_launches_of_random_calls() -> None:
    """The same bits at every launch, whatever ran before: no barrier is passed too early."""
    draw = random.Random(5)
    calls = []
    for _ in range(60):
        dim, group, heads = draw.choice((64, 128, 256)), draw.choice((1, 2)), draw.choice((1, 3, 8))
        batch, len_q, len_kv = draw.randint(1, 3), draw.randint(300, 900), draw.randint(1, 900)
        q, k, v = (
            drawn(batch, len_q, heads * group, dim),
            *(drawn(batch, len_kv, heads, dim) for _ in range(2)),
        )
        given: dict[str, Any] = {
            "mask": draw.choice((Full(), Causal(), Window(100, 0, keep_first=3)))
        }
        given["num_splits"] = draw.choice((1, 1, 2))
        assert jitattn.explain(q, k, v, **given).kernel["family"] == "fwd_sm90"
        calls.append(((q, k, v), given, jitattn.attention(q, k, v, **given)))
    differ = torch.zeros((), device="cuda", dtype=torch.int64)
    for _ in range(10_000):
        qkv, given, truth = draw.choice(calls)
        differ += (jitattn.attention(*qkv, **given) != truth).any()
    assert differ.item() == 0


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("mask", [Full(), Causal(), Window(200, 0, keep_first=3)], ids=str)
def test_terms_by_distance(mask: Any, dim: int) -> None:
    """With packed heads, splits and softcap, which comes before them."""
    q, k, v = drawn(2, 300, 6, dim), drawn(2, 900, 2, dim), drawn(2, 900, 2, dim)
    slopes = {"alibi_slopes": torch.rand(2, 6, device="cuda")}
    table = {"relative_bias": torch.randn(6, 257, device="cuda")}
    for terms in (slopes, table, {**slopes, **table}):
        check(q, k, v, mask=mask, **terms)
    check(q, k, v, mask=mask, num_splits=3, **table)
    check(q, k, v, mask=mask, softcap=2.0, **slopes)


@pytest.mark.parametrize("name", ["alibi_slopes", "relative_bias"])
def test_terms_by_distance_in_sequences(name: str) -> None:
    """One without queries, one without keys, and far more tiles than there are rows for."""
    terms = {"alibi_slopes": torch.rand(4, device="cuda")}
    if name == "relative_bias":
        terms = {name: torch.randn(4, 33, device="cuda")}
    q_stops, kv_stops = ([0, 300, 300, 431, 501], [0, 77, 277, 277, 800])
    q_seqs, kv_seqs = (
        Ragged.from_cu_seqlens(
            torch.tensor(stops, dtype=torch.int32, device="cuda"), max_length=600
        )
        for stops in (q_stops, kv_stops)
    )
    q, k, v = drawn(501, 4, 128), drawn(800, 2, 128), drawn(800, 2, 128)
    for mask in (Full(), Causal()):
        check(q, k, v, mask=mask, q_seqs=q_seqs, kv_seqs=kv_seqs, **terms)


@pytest.mark.parametrize("name", ["alibi_slopes", "relative_bias"])
def test_terms_by_distance_and_hidden_keys(name: str) -> None:
    """Rows of the first tiles see no key: of these, no padding is read either."""
    q, k, v = drawn(2, 700, 2, 64), drawn(2, 70, 2, 64), drawn(2, 70, 2, 64)
    terms = {"alibi_slopes": torch.rand(2, device="cuda")}
    if name == "relative_bias":
        terms = {name: torch.randn(2, 33, device="cuda")}
    keep = torch.rand(2, 70, device="cuda") > 0.5
    out = check(q, k, v, mask=Causal() & KeyPadding(keep), **terms)
    assert torch.equal(out[:, :630], torch.zeros_like(out[:, :630]))


def test_gear_4_is_computed_as_gear_3() -> None:
    """On mma.sync, in 8 bits, it is slower."""
    qkv = [drawn(1, 300, 2, 128) for _ in range(3)]
    explained = jitattn.explain(*qkv, gear=4)
    assert explained.kernel["family"] == "fwd_sm90"
    assert any("gear 4" in reason for reason in explained.why)
    third, fourth = (jitattn.attention(*qkv, gear=gear) for gear in (3, 4))
    assert torch.equal(third, fourth)
