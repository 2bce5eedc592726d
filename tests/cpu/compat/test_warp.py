"""Tests the WarpAttention door against a dense fp64 reference of its documentation."""

from __future__ import annotations

import importlib
import inspect
import logging
from pathlib import Path

import pytest
import torch

import jitattn
from jitattn.compat import warp_attention
from jitattn.compat.warp_attention import baseline_tester, util, warpat_tester
from tests.support.compare import assert_same_gradients, rel_l2
from tests.support.compat_warp import call

forward = warp_attention.warp_attention_forward


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warp_attention, "_settings", dict(warp_attention._settings))


@pytest.mark.parametrize("seed", range(30))
def test_values_and_gradients(seed: int) -> None:
    given, truth, leaves = call(seed, torch.float32, "cpu")
    out = forward(**given)
    assert out.shape == given["query"].shape
    if not truth.any():
        assert not out.any()
        return
    assert rel_l2(out, truth) < 1e-5
    d_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(1))
    assert_same_gradients([out], [truth], leaves, [d_out], 1e-4, least=1e-6)


def test_arguments_stand_where_the_original_has_them() -> None:
    assert list(inspect.signature(forward).parameters) == [
        "query", "key", "value", "scale", "out", "gear", "version", "is_causal", "q_seq_start",
        "q_seq_len", "kv_seq_start", "kv_seq_len", "q_max_seq_len", "kv_max_seq_len",
    ]  # fmt: skip
    assert warp_attention._warp_attention_forward is forward
    assert warp_attention.__version__ == jitattn.__version__
    with jitattn.compat.alias("warp_attention"):
        assert importlib.import_module("warp_attention") is warp_attention


def test_out_is_written_in_place() -> None:
    q, k = torch.randn(7, 2, 16), torch.randn(1, 9, 2, 16)
    out = torch.full_like(q, 5.0)
    seqs = {"q_seq_start": torch.tensor([1]), "q_seq_len": torch.tensor([4])}
    with torch.no_grad():
        assert forward(q, k, k, out=out, **seqs) is out
    assert (out[[0, 5, 6]] == 5.0).all()
    assert rel_l2(out[1:5], forward(q, k, k, **seqs)[1:5]) < 1e-6


def test_gears() -> None:
    assert warp_attention.num_gears == 5
    assert warp_attention.get_default_gear() == 4
    with jitattn.set_default_gear(1):
        assert warp_attention.get_default_gear() == 4
    warp_attention.set_default_gear(2)
    assert warp_attention.get_default_gear() == 2
    assert jitattn.get_default_gear() is None
    q = torch.randn(1, 4, 2, 16)
    for gear in (-1, 5, 2.0):
        with pytest.raises(AssertionError, match="gear"):
            forward(q, q, q, gear=gear)
        with pytest.raises(AssertionError, match="gear"):
            warp_attention.set_default_gear(gear)  # type: ignore[arg-type]
    for version in (-2, warp_attention.num_kernel_versions):
        with pytest.raises(AssertionError, match="version"):
            forward(q, q, q, version=version)


def test_the_gear_is_given_back() -> None:
    with warp_attention.set_default_gear(2):
        assert warp_attention.get_default_gear() == 2
        with warp_attention.set_default_gear(0):
            assert warp_attention.get_default_gear() == 0
        assert warp_attention.get_default_gear() == 2
    assert warp_attention.get_default_gear() == 4
    with pytest.raises(KeyError), warp_attention.set_default_gear(1):
        raise KeyError
    assert warp_attention.get_default_gear() == 4
    assert jitattn.get_default_gear() is None


def sides(rows: int = 6) -> dict[str, torch.Tensor]:
    return {name: torch.randn(1, rows, 2, 16) for name in ("query", "key", "value")}


FLAT = {"key": torch.randn(6, 2, 16), "value": torch.randn(6, 2, 16)}
ONE = torch.tensor([0])


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"key": torch.randn(1, 6, 2, 8)}, r"key has head_dim 8 but query has 16.*\[B, L, H, D\]"),
        ({"value": torch.randn(1, 6, 2, 16).double()}, "value is float64"),
        ({"query": torch.randn(6, 2)}, "query, key and value must have 4 dimensions.*q_seq_start"),
        ({"out": torch.randn(1, 2, 2, 16)}, "like query"),
        ({**FLAT, "kv_seq_start": ONE, "kv_seq_len": ONE.float()}, "kv_seq_len is torch.float32"),
        (
            {**FLAT, "kv_seq_start": ONE, "kv_seq_len": ONE.int()},
            "key: kv_seq_start is torch.int64",
        ),
        ({**FLAT, "kv_seq_start": ONE, "kv_seq_len": ONE, "kv_max_seq_len": 2**31}, "kv_max_seq_l"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_the_binding_refuses_is_a_runtime_error(given: dict[str, object], match: str) -> None:
    with pytest.raises(RuntimeError, match=match) as found:
        forward(**{**sides(), **given})
    assert isinstance(found.value, jitattn.InvalidInputError)
    assert not isinstance(found.value, AssertionError)


def test_a_batched_value_beside_flat_keys_is_asserted() -> None:
    given = {**sides(), "key": FLAT["key"], "kv_seq_start": ONE, "kv_seq_len": ONE}
    with pytest.raises(AssertionError, match=r"value has shape \[1, 6, 2, 16\], and key"):
        forward(**given)


def test_sequences_must_be_named() -> None:
    flat, batched = torch.randn(6, 2, 16), torch.randn(1, 6, 2, 16)
    with pytest.raises(AssertionError, match="q_seq_start"):
        forward(flat, batched, batched)
    with pytest.raises(jitattn.InvalidInputError, match="kv_seq_len"):
        forward(batched, flat, flat, kv_seq_start=torch.tensor([0]))
    # Those of batched tensors are ignored.
    ignored = forward(batched, batched, batched, q_seq_start=torch.tensor([3]))
    assert torch.equal(ignored, forward(batched, batched, batched))


def test_the_overlapping_starts_of_the_readme_do_no_harm() -> None:
    lengths = torch.tensor([3, 5, 2])
    wrong = lengths.cumsum(0) - lengths[0]  # 0, 5, 7
    q, k = torch.randn(10, 2, 16), torch.randn(3, 9, 2, 16)
    out = forward(q, k, k, q_seq_start=wrong, q_seq_len=lengths)
    assert torch.isfinite(out).all()
    right = lengths.cumsum(0) - lengths
    out = forward(q, k, k, q_seq_start=right, q_seq_len=lengths)
    assert torch.isfinite(out).all()


def test_log_levels() -> None:
    logger = logging.getLogger("jitattn")
    before = logger.level
    assert warp_attention.get_log_level() == 2
    warp_attention.set_log_level(0)
    assert not logger.isEnabledFor(logging.CRITICAL)
    warp_attention.set_log_level(5)
    assert logger.isEnabledFor(logging.DEBUG)
    assert warp_attention.get_log_level() == 5
    for level in (6, -1, "3"):
        with pytest.raises(AssertionError, match="level"):
            warp_attention.set_log_level(level)  # type: ignore[arg-type]
    logger.setLevel(before)


def test_calls_say_which_kernel_they_take(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("jitattn")
    before = logger.level
    tensors = sides()
    try:
        warp_attention.set_log_level(3)
        with monkeypatch.context() as patch:
            patch.setattr(warp_attention, "explain", None)  # is not asked
            forward(**tensors)
        assert not caplog.records
        warp_attention.set_log_level(4)
        forward(**tensors, gear=3)
        (record,) = caplog.records
        assert record.levelno == logging.DEBUG
        assert "query [1, 6, 2, 16]" in record.getMessage()
        assert "gear 3, path cpu" in record.getMessage()
        warp_attention.set_log_level(5)
        forward(**tensors)
        assert "because      q is on the CPU" in caplog.records[-1].getMessage()
    finally:
        logger.setLevel(before)


def test_a_compiled_call_translates_too() -> None:
    tensors = sides()
    torch._dynamo.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**tensors), forward(**tensors))


def test_scripts(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    calls: list[str] = []

    def work(x: int) -> int:
        calls.append("work")
        return 2 * x

    result, seconds = util.cuda_timeit(
        work, {"x": 4}, loops=3, warmup_loops=2, setup=lambda: calls.append("setup")
    )
    assert (result, seconds > 0.0) == (8, True)
    assert calls == ["setup", "work"] * 5
    assert "work" in capsys.readouterr().out
    util.cuda_synchronize()
    assert util.bmm_flop(2, 3, 4, 5) == 120
    assert util.bmm_flop(2, 3, 4, 5, fma=False) == 240
    assert util.attn_flop(1, 2, 8, 4, 3) == 2 * 3 * 2 * 8 * 4
    assert util.attn_flop(1, 2, 8, 4, 3, is_causal=True) == 2 * 3 * 2 * 8 * 4 - 3 * 2 * 2 * 4
    x, y = torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0])
    assert (util.mse(x, y), util.mae(x, y)) == (2.5, 1.5)
    assert Path(util.get_absolute_path("x")).is_absolute()
    q, k = torch.randn(1, 3, 2, 16), torch.randn(1, 5, 2, 16)
    truth = baseline_tester.attn(q, k, k, is_causal=True)
    seconds, out = baseline_tester.test_torch_naive(
        q, k, k, is_causal=True, return_output=True, gear=3
    )
    assert torch.equal(out, truth)
    assert isinstance(baseline_tester.test_torch_sdpa(q, k, k, verbose=0), float)
    assert inspect.signature(baseline_tester.test_flash_attn) == inspect.signature(
        baseline_tester.test_torch_sdpa
    )
    seconds, out, error = warpat_tester.test_warpat(
        q, k, k, is_causal=True, epsilon=1e-4, output_baseline=truth, runtime_baseline=1.0,
        return_output=True, return_error=True,
    )  # fmt: skip
    assert error < 1e-6
    assert rel_l2(out, truth) < 1e-5
    with pytest.raises(AssertionError, match="mean absolute error"):
        warpat_tester.test_warpat(q, k, k, epsilon=1e-9, output_baseline=truth + 1)
    pytest.importorskip("matplotlib")
    picture = tmp_path / "compare.png"
    warpat_tester.compare(str(picture), 1, 2, 16, 2, True, ns=[1, 8], gears=[2], device="cpu")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_tuner_finds_a_version_for_every_gear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warpat_tester, "_HISTORY", 512)
    monkeypatch.setattr(warpat_tester, "_HEADS", 1)
    best = warpat_tester.tune("cpu", log_m_start=1, log_m_stop=2)
    assert {key[0] for key in best} == set(range(5))
    assert {key[1:] for key in best} == {
        (dim, causal, 0, 1) for dim in (32, 64, 128) for causal in (False, True)
    }
