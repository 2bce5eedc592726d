"""Tests dropout on the CPU path: generator, mask, rate, reproducibility."""

from __future__ import annotations

import pytest
import torch

import jitattn
from jitattn.values import dropout as dropout_module
from jitattn.values.dropout import Dropout, keeps, philox
from tests.support.inputs import random_qkv
from tests.support.memory import PeakMemory


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [  # of Random123, file kat_vectors
        (10, 0, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (10, 0xFFFFFFFF, 0xFFFFFFFF, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (7, 0, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, 0xFFFFFFFF, 0xFFFFFFFF, "5207ddc2 45165e59 4d8ee751 8c52f662"),
    ],
)
def test_generator_is_philox(rounds: int, counter: int, key: int, words: str) -> None:
    counters = tuple(torch.tensor(counter) for _ in range(4))
    found = philox(counters, (key, key), rounds)
    assert " ".join(f"{int(word):08x}" for word in found) == words


def test_mask_is_that_of_the_call() -> None:
    q, k, _ = random_qkv(2, 40, 70, 4, 2, 16)
    v = torch.eye(70).reshape(1, 70, 1, 70).expand(2, 70, 2, 70)
    state = jitattn.dropout_state("cpu")
    dropped = jitattn.attention(q, k, v, dropout_p=0.4, dropout_state=state).transpose(1, 2)
    plain = jitattn.attention(q, k, v).transpose(1, 2)
    kept = jitattn.dropout_mask(state, 0.4, 2, 4, 40, 70)
    threshold = round(0.4 * 65536)
    torch.testing.assert_close(dropped, plain * kept / (1 - threshold / 65536))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_rate(p: float) -> None:
    state = torch.tensor([12345, 678])
    kept = jitattn.dropout_mask(state, p, 2, 4, 256, 512).double()
    deviation = (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(kept.mean().item() - (1 - p)) < 5 * deviation + 2**-17
    for axis in range(4):  # and of each batch, head, query and key by itself
        part = kept.mean(dim=[other for other in range(4) if other != axis])
        assert (part - (1 - p)).abs().max() < 6 * deviation * kept.shape[axis] ** 0.5 + 2**-17


def test_parts_of_the_mask_agree() -> None:
    dropout = Dropout(20000, torch.tensor([-5, 7]))
    whole = keeps(dropout, 3, 2, range(50), range(200))
    part = keeps(dropout._replace(first_batch=1), 2, 2, range(10, 30), range(37, 155))
    assert torch.equal(part, whole[1:, :, 10:30, 37:155])


def test_parts_of_a_large_mask_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    dropout = Dropout(20000, torch.tensor([-5, 7]), first_batch=2)
    whole = keeps(dropout, 3, 2, range(3, 50), range(37, 200))
    monkeypatch.setattr(dropout_module, "_FEWEST_DRAWN", 300)
    assert torch.equal(keeps(dropout, 3, 2, range(3, 50), range(37, 200)), whole)
    monkeypatch.setattr(dropout_module, "_MOST_DRAWN", 1)  # less than a row
    assert torch.equal(keeps(dropout, 3, 2, range(3, 50), range(37, 200)), whole)


def test_a_large_mask_takes_a_byte_a_weight_beside_itself() -> None:
    state = torch.tensor([1, 2])
    with PeakMemory() as memory:
        mask = jitattn.dropout_mask(state, 0.5, 2, 4, 512, 1024)
    assert memory.peak <= 2 * mask.numel()


def test_every_bit_of_a_state_counts() -> None:
    """Also the high half of an offset: 2^32 weights a call are common (16 x 16 x 4096 x 4096)."""
    words = [0x0123456789ABCDEF, 0x1122334455667788]
    states = [words]
    for bit in range(128):
        flipped = list(words)
        flipped[bit // 64] ^= 1 << bit % 64
        states.append([word - 2**64 if word >= 2**63 else word for word in flipped])
    states += [[7, call << 32] for call in range(40)]
    masks = torch.stack(
        [jitattn.dropout_mask(torch.tensor(state), 0.5, 2, 2, 24, 40) for state in states]
    )
    signs = masks.flatten(1).double() * 2 - 1
    agreement = signs @ signs.T / signs.shape[1]
    agreement.fill_diagonal_(0.0)
    assert agreement.abs().max() < 6 * signs.shape[1] ** -0.5  # as of masks that are independent


def test_torchs_seed_decides() -> None:
    q, k, v = random_qkv(1, 20, 30, 2, 1, 8)
    results = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        results.append(jitattn.attention(q, k, v, dropout_p=0.5))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_gradients_are_of_the_same_mask() -> None:
    q, k, v = (x.double().requires_grad_() for x in random_qkv(1, 150, 20, 2, 1, 8))
    state = torch.tensor([3, 4])
    weight = torch.randn(1, 150, 2, 8, dtype=torch.float64)
    for function in (jitattn.attention, jitattn.reference.reference):
        out = function(q.float(), k.float(), v.float(), dropout_p=0.3, dropout_state=state)
        (out.double() * weight).sum().backward()
    for x in (q, k, v):
        assert x.grad is not None
    grads = [x.grad.clone() for x in (q, k, v)]
    for x in (q, k, v):
        x.grad = None
    out = jitattn.attention(q.float(), k.float(), v.float(), dropout_p=0.3, dropout_state=state)
    (out.double() * weight).sum().backward()
    for x, both in zip((q, k, v), grads, strict=True):
        torch.testing.assert_close(2 * x.grad, both, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("p", [-0.1, 1.0, 2, True, "0.5", float("nan")])
def test_probabilities_are_checked(p: object) -> None:
    q, k, v = random_qkv(1, 3, 3, 1, 1, 8)
    with pytest.raises(jitattn.InvalidInputError, match="dropout_p="):
        jitattn.attention(q, k, v, dropout_p=p)


def test_states_are_checked() -> None:
    q, k, v = random_qkv(1, 3, 3, 1, 1, 8)
    for state in (torch.zeros(2), torch.zeros(3, dtype=torch.int64), 5):
        with pytest.raises(jitattn.InvalidInputError, match="dropout_state is"):
            jitattn.attention(q, k, v, dropout_p=0.5, dropout_state=state)
