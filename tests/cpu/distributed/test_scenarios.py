"""Tests what stands around context-parallel attention: modules, decoding, errors, lost ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.parallel import in_own_process
from tests.support.parallel_scenarios import TIMEOUT

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="needs gloo")
Found = dict[str, Any]


@pytest.fixture(scope="module")
def found() -> Found:
    """What every rank saw in every scenario; one process starts all groups."""
    answers: Found = in_own_process("tests.support.parallel_scenarios")
    return answers


@pytest.fixture(scope="module")
def of_ranks(found: Found) -> list[Found]:
    """The scenarios of the groups of 2 and 3 ranks, rank by rank."""
    return [*found["2"], *found["3"]]


def test_the_same_bits_every_time(of_ranks: list[Found]) -> None:
    assert all(one["bitwise"] == [True, True, True] for one in of_ranks)


def test_shards_and_back(of_ranks: list[Found]) -> None:
    assert all(one["sharded_and_back"] == 0 for one in of_ranks)


def test_dtensors(of_ranks: list[Found]) -> None:
    for one in of_ranks:
        assert one["dtensors"]["gap"] < 1e-12
        assert one["dtensors"]["placements"] == ["(Shard(dim=1),)"] * 2
        assert "redistribute" in one["dtensors"]["refused"]


def test_dtensors_on_a_mesh_of_two_dimensions(found: Found) -> None:
    assert len(found["mesh"]) == 4
    assert max(found["mesh"]) < 1e-12


@pytest.mark.parametrize("wrapper", ["plain", "checkpoint", "reentrant", "compiled", "fsdp2"])
def test_modules(of_ranks: list[Found], wrapper: str) -> None:
    assert all(one["wrapped"][wrapper] < 1e-12 for one in of_ranks)


def test_autocast(of_ranks: list[Found]) -> None:
    for one in of_ranks:
        assert one["cast"]["dtypes"] == ["torch.bfloat16", "torch.float32"]
        assert one["cast"]["gap"] < 2e-2


def test_decoding(of_ranks: list[Found]) -> None:
    for one in of_ranks:
        gaps = one["decoding"]
        assert len(gaps) == 13
        assert gaps.pop("fp32") < 1e-5
        assert max(gaps.values()) < 1e-12


@pytest.mark.parametrize(
    ("case", "kind", "words"),
    [
        ("heads", "InvalidInputError", ("q is", "on rank {last}")),
        ("dtype", "InvalidInputError", ("float16", "on rank {last}")),
        ("head_dim", "InvalidInputError", ("q is", "on rank {last}")),
        ("mask", "InvalidInputError", ("mask is Window(left=4", "on rank 1")),
        ("method", "InvalidInputError", ("method is 'ring' on rank {last}",)),
        ("scale", "InvalidInputError", ("scale is 0.5 on rank {last} and 0.25",)),
        ("own", "InvalidInputError", ("rank {last}: k is",)),
        ("rows", "InvalidInputError", ("rank {last}: q has", "shard(x, plan)")),
        ("given", "InvalidInputError", ("relative_bias is float32 [1, 3] on rank {last}",)),
        ("plan", "InvalidInputError", ("plan is contiguous", "None on rank 0")),
        ("state", "InvalidInputError", ("dropout_state",)),
        ("documents", "InvalidInputError", ("q_seqs is Ragged of 2 sequences", "on rank {last}")),
        ("padding", "InvalidInputError", ("KeyPadding", "[1, 37]")),
        ("two dimensions", "InvalidInputError", ("hybrid", "mesh")),
        ("bias", "UnsupportedError", ("bias", "relative_bias")),
        ("dense", "UnsupportedError", ("Dense", "MaskMod")),
        ("too few heads", "UnsupportedError", ("1 query heads", "ring")),
    ],
)
def test_ranks_that_differ(found: Found, case: str, kind: str, words: tuple[str, ...]) -> None:
    """All ranks get the error, which names rank and argument."""
    for ranks in (2, 3):
        for one in found[str(ranks)]:
            message = one["disagreement"][case]
            assert message.startswith(kind)
            assert all(word.format(last=ranks - 1) in message for word in words)


def test_a_group_goes_on_after_errors(of_ranks: list[Found]) -> None:
    assert all(one["disagreement"]["afterwards"] == "True" for one in of_ranks)


def test_debugging_compares_every_call(of_ranks: list[Found]) -> None:
    for one in of_ranks:
        assert "scale is 0.25 on rank 1 and 0.5 on rank 0" in one["debugging"][0]


def test_a_mistake_that_nobody_expects(found: Found) -> None:
    """The rank that made it says so, the others end within the timeout and 10 s."""
    others, own = found["mistake"]
    assert others["message"].startswith("CommunicationError")
    assert "JITATTN_DEBUG=1" in others["message"]
    assert own["message"].startswith("InvalidInputError: q is float32, k is float16")
    assert max(one["seconds"] for one in (others, own)) < TIMEOUT + 10


@pytest.mark.parametrize("method", ["ring", "allgather", "ulysses"])
def test_a_rank_that_dies(found: Found, method: str) -> None:
    """The others end with an error within the timeout and 10 s."""
    answers = found[f"death, {method}"]
    assert len(answers) == 2
    for one in answers:
        assert one["message"].startswith("CommunicationError")
        assert "a rank has ended" in one["message"]
        assert one["seconds"] < TIMEOUT + 10
