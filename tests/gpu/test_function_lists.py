"""Tests the block lists that a kernel makes of traced masks: those of all visible pairs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import jitattn
from jitattn import MaskMod, Ragged
from jitattn.request.block_lists import BlockLists
from jitattn.request.mask_blocks import Sizes, simplified
from jitattn.run import function_lists as made
from jitattn.values.functions import traced
from jitattn.values.masks import FunctionBlocks
from jitattn.values.pairs import over_pairs
from tests.support.capture import capture
from tests.support.compare import rel_l2
from tests.support.expressions import Captured, random_mask
from tests.support.functions import FUNCTIONS, attend_exactly

MASKS = ["prefix", "document", "natten", "dilated", "by_head"]
BLOCK = 64
WHOLE_SHIFT = 28


def listed(lists: BlockLists, heads: int, rows: int, columns: int) -> Tensor:
    """The blocks of 64 that lists name, and say are whole, [2, heads, rows, columns].

    All is in order.
    """
    found = torch.zeros(2, heads, rows, columns, dtype=torch.bool)
    positions = 1 << lists.positions_log2
    groups, spans, table = (x.cpu() for x in (lists.groups, lists.spans, lists.heads))
    assert torch.equal(table[0], table[1])
    assert (table[0, :, 1] == -table[0, :, 2]).all()
    for head in range(heads):
        assert int(table[0, head, 0]) % 2 == 1
        for tile, (first, count) in enumerate(spans[int(table[0, head, 0]) // 2].tolist()):
            own = groups[first : first + count]
            assert ((own[:, 0] & (1 << WHOLE_SHIFT) - 1).diff() > 0).all()
            for entry, signed in own.tolist():
                group, whole = entry & (1 << WHOLE_SHIFT) - 1, entry >> WHOLE_SHIFT
                bits = signed & 0xFFFFFFFF
                assert bits >> 16 == bits & 0xFFFF
                for block in range(positions // BLOCK):
                    cells = bits >> 8 * block & 0xFF
                    assert cells in (0, 0xFF)
                    if cells:
                        row, column = tile * positions // BLOCK + block, group * 16 // BLOCK
                        found[0, head, row, column] = True
                        found[1, head, row, column] = bool(whole >> block & 1)
    return found


def blocks_of(visible: Tensor, by_head: bool) -> Tensor:
    """Blocks with any visible pair of [B, H, Lq, Lkv], in any sequence."""
    len_q, len_kv = visible.shape[2:]
    padded = torch.nn.functional.pad(visible, (0, -len_kv % BLOCK, 0, -len_q % BLOCK))
    found = padded.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).any(5).any(3).any(0)
    return (found if by_head else found[:1].expand(visible.shape[1], -1, -1)).cpu()


def check(mask_mod: Any, sizes: Sizes, positions: int) -> None:
    function = traced(None, MaskMod(mask_mod))
    rule, _ = simplified(function, sizes)
    if not isinstance(rule, FunctionBlocks):
        return
    device = torch.device("cuda", 0)
    lists = made.function_lists(rule, sizes.heads, positions, device)
    visible = over_pairs(mask_mod, None, sizes[:4], "cuda").expand(sizes[:4])
    exact, cut = blocks_of(visible, rule.by_head), blocks_of(~visible, rule.by_head)
    rows = lists.spans.shape[1] * (1 << lists.positions_log2) // BLOCK
    found, whole = listed(lists, sizes.heads, rows, exact.shape[2])
    assert torch.equal(found[:, : exact.shape[1]], exact)
    assert torch.equal(whole[:, : exact.shape[1]], exact & ~cut)
    assert not found[:, exact.shape[1] :].any()


@pytest.mark.parametrize("positions", [16, 64, 128])
@pytest.mark.parametrize("name", MASKS)
def test_blocks_of_visible_pairs(name: str, positions: int) -> None:
    sizes = Sizes(2, 4, 300, 350, True)
    _, mask_mod = FUNCTIONS[name]("cuda", *sizes[:4])
    check(mask_mod, sizes, positions)


@pytest.mark.parametrize("seed", range(12))
def test_random_masks(seed: int) -> None:
    sizes = Sizes(2, 2, 250, 300, True)
    check(random_mask(seed, Captured("cuda", *sizes[:2], 300)), sizes, 128)


def same(ids: Tensor) -> Any:
    return lambda b, h, q, k: ids[b, q] == ids[b, k]


def drawn(length: int = 512) -> list[Tensor]:
    generator = torch.Generator().manual_seed(4)
    return [
        torch.randn(1, length, 2, 64, generator=generator).to("cuda", torch.float16)
        for _ in range(3)
    ]


def test_a_change_of_a_captured_tensor_is_seen() -> None:
    q, k, v = drawn()
    ids = torch.arange(512, device="cuda")[None] // 100
    mask = MaskMod(same(ids))
    for bound in (0, 300):
        ids[:, bound:] = 7
        expected = jitattn.reference.reference(q, k, v, mask=mask)
        assert rel_l2(jitattn.attention(q, k, v, mask=mask), expected) < 2e-3


def test_lists_are_kept() -> None:
    function = traced(None, MaskMod(same(torch.zeros(1, 512, dtype=torch.int32, device="cuda"))))
    rule, _ = simplified(function, Sizes(1, 2, 512, 512, True))
    assert isinstance(rule, FunctionBlocks)
    device = torch.device("cuda", 0)
    first, again = (made.function_lists(rule, 2, 128, device) for _ in range(2))
    assert again is first
    function.tensors[0].add_(1)
    assert made.function_lists(rule, 2, 128, device) is not first


def test_ragged_sequences() -> None:
    q, k, v = (x[0] for x in drawn())
    cu = torch.tensor([0, 200, 512], device="cuda", dtype=torch.int32)
    seqs = Ragged.from_cu_seqlens(cu, 312)
    mask = MaskMod(lambda b, h, i, j: (i // 70 == j // 70) | (j < 3 * b))
    given: dict[str, Any] = {"q_seqs": seqs, "kv_seqs": seqs, "mask": mask}
    expected = jitattn.reference.reference(q, k, v, **given)
    assert rel_l2(jitattn.attention(q, k, v, **given), expected) < 2e-3


def test_lists_of_tensors_that_are_gone_are_freed() -> None:
    device = torch.device("cuda", 0)
    made._kept.clear()
    for _ in range(3):
        ids = torch.zeros(1, 512, dtype=torch.int32, device="cuda")
        rule, _ = simplified(traced(None, MaskMod(same(ids))), Sizes(1, 2, 512, 512, True))
        assert isinstance(rule, FunctionBlocks)
        for step in range(3):
            ids.add_(step)
            made.function_lists(rule, 2, 128, device)
        del ids, rule
    assert len(made._kept) == 1


def test_lists_have_room_for_the_rows_of_q_alone() -> None:
    function = traced(None, MaskMod(lambda b, h, q, k: (k // 1000) % 2 == h % 2))
    rule, _ = simplified(function, Sizes(1, 4, 3, 60000, True))
    assert isinstance(rule, FunctionBlocks)
    lists = made.function_lists(rule, 4, 64, torch.device("cuda", 0))
    assert lists.spans.shape[1] == 1
    assert lists.nbytes < 4 * 60000


@pytest.mark.real_gpu
def test_a_replay_sees_what_the_tensors_hold() -> None:
    """Lists are made within the graph: no wait, and no call with the same contents before."""
    q, k, v = drawn()
    ids = torch.zeros(1, 512, dtype=torch.int64, device="cuda")
    mask = MaskMod(same(ids))
    jitattn.attention(q, k, v, mask=mask)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        out = jitattn.attention(q, k, v, mask=mask)
    for step in (100, 37, 512):
        ids.copy_(torch.arange(512, device="cuda")[None] // step)
        graph.replay()
        expected = jitattn.reference.reference(q, k, v, mask=mask)
        assert rel_l2(out, expected) < 2e-3


@pytest.mark.usefixtures("with_grad")
@pytest.mark.parametrize(("head_dim", "has_score"), [(64, False), (64, True), (128, False)])
def test_blocks_without_a_hidden_pair(head_dim: int, has_score: bool) -> None:
    """Whole, cut and hidden blocks in one call: values and gradients."""
    generator = torch.Generator().manual_seed(9)
    qkv = [
        torch.randn(2, length, heads, head_dim, generator=generator)
        .to("cuda", torch.float16)
        .requires_grad_()
        for length, heads in ((300, 2), (460, 1), (460, 1))
    ]
    bounds = torch.tensor([[130, 256], [70, 390]], device="cuda", dtype=torch.int32)

    def mask_mod(b: Any, h: Any, q: Any, k: Any) -> Any:
        return ((q < 150) == (k < bounds[b, h])) | (k % 50 == 7) & (q > 256)

    score_mod: Any = (lambda s, b, h, q, k: s * 0.5 + 0.01 * (q - k)) if has_score else None
    out = jitattn.attention(*qkv, mask=MaskMod(mask_mod), score_mod=score_mod)
    found = torch.autograd.grad(out.float().sin().sum(), qkv)
    leaves = [x.detach().double().requires_grad_() for x in qkv]
    exact, _ = attend_exactly(*leaves, score_mod, mask_mod)
    wanted = torch.autograd.grad(exact.sin().sum(), leaves)
    assert rel_l2(out, exact) < 2e-3
    for one, other in zip(found, wanted, strict=True):
        assert rel_l2(one, other) < 6e-3
