"""Makes block lists of traced masks: a kernel's work, for which nothing waits.

They are kept as long as the function's numbers and tensors are the same, for the stream that they
were made in. While a CUDA graph is captured they are made in it, so that a replay makes them anew
of what the tensors hold then.
"""

from __future__ import annotations

import threading
import weakref
from collections import OrderedDict
from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.jit import backend
from jitattn.jit.device import device as device_of
from jitattn.jit.load_kernel import load_kernel
from jitattn.kernels.mask_lists import mask_lists_spec
from jitattn.request.block_lists import BlockLists
from jitattn.request.scores import function_arguments
from jitattn.spec.program import parse

if TYPE_CHECKING:
    from collections.abc import Hashable

    from jitattn.values.masks import FunctionBlocks

#: Rows of the smallest tile of a list: those of a block.
_FEWEST_POSITIONS: Final = 64
_GROUP: Final = 16
#: Of all lists that are kept.
_MOST_BYTES: Final = 2**28
_kept: OrderedDict[Hashable, _Kept] = OrderedDict()
_lock = threading.Lock()


def function_lists(
    rule: FunctionBlocks, heads_q: int, tile_positions: int, device: torch.device
) -> BlockLists:
    """Return the block lists of a mask function, making them if need be.

    Parameters
    ----------
    rule : FunctionBlocks
    heads_q : int
    tile_positions : int
        Of a query tile, a power of two.
    device : torch.device
        With the current stream's device current.

    Raises
    ------
    LaunchError
        The kernel is not loaded, and the current stream is capturing a graph.
    """
    positions = max(_FEWEST_POSITIONS, tile_positions)
    stream = backend.active.stream(device.index or 0)
    tensors = rule.function.tensors
    is_counted = not any(one.is_inference() for one in tensors)
    is_capturing = device.type == "cuda" and backend.active.is_capturing()
    if is_capturing or not is_counted:
        return _made(rule, heads_q, positions, device, stream)
    key = (
        rule.function.program, repr(rule.function.numbers), *_sizes(rule), heads_q, positions,
        device, stream, *map(id, tensors),
    )  # fmt: skip
    states = tuple((x._version, x.data_ptr(), x.shape, x.stride()) for x in tensors)
    with _lock:
        kept = _kept.get(key)
        if kept is not None and kept.states == states and kept.is_of(tensors):
            _kept.move_to_end(key)
            return kept.lists
    lists = _made(rule, heads_q, positions, device, stream)
    with _lock:
        _keep(key, _Kept(lists, tuple(map(weakref.ref, tensors)), states))
    return lists


class _Kept(NamedTuple):
    """Lists, and what their function read."""

    lists: BlockLists
    references: tuple[weakref.ref[torch.Tensor], ...]
    states: Hashable

    def is_of(self, tensors: tuple[torch.Tensor, ...]) -> bool:
        """Return whether the tensors are these."""
        pairs = zip(self.references, tensors, strict=True)
        return all(reference() is one for reference, one in pairs)


def _keep(key: Hashable, entry: _Kept) -> None:
    """Keep lists in place of those of older contents, and no more than some bytes of them."""
    _kept[key] = entry
    _kept.move_to_end(key)
    for other, one in list(_kept.items()):
        if any(reference() is None for reference in one.references):
            del _kept[other]
    size = sum(one.lists.nbytes for one in _kept.values())
    while size > _MOST_BYTES and len(_kept) > 1:
        _, oldest = _kept.popitem(last=False)
        size -= oldest.lists.nbytes


def _sizes(rule: FunctionBlocks) -> tuple[int, ...]:
    return rule.batch, rule.by_head, rule.len_q, rule.len_kv


def _made(
    rule: FunctionBlocks,
    heads_q: int,
    positions: int,
    device: torch.device,
    stream: int,
) -> BlockLists:
    """Launch the kernel in a stream."""
    index = device.index or 0
    spec = mask_lists_spec(rule.function.program, device_of(index).arch)
    num_lists = heads_q if rule.by_head else 1
    tiles, groups = -(-rule.len_q // positions), -(-rule.len_kv // _GROUP)
    made = BlockLists(
        torch.empty(num_lists * tiles * groups, 2, dtype=torch.int32, device=device),
        torch.empty(num_lists, tiles, 2, dtype=torch.int32, device=device),
        torch.empty(2, heads_q, 4, dtype=torch.int32, device=device),
        positions.bit_length() - 1,
    )
    numbers: dict[str, float] = {
        "num_lists": num_lists,
        "list_tiles": tiles,
        "list_log2": made.positions_log2,
        "tile_groups": groups,
        "heads_q": heads_q,
        "batch": rule.batch,
        "len_q": rule.len_q,
        "len_kv": rule.len_kv,
        "shift": rule.len_kv - rule.len_q,
        "list_groups": made.groups.data_ptr(),
        "list_spans": made.spans.data_ptr(),
        "list_heads": made.heads.data_ptr(),
        **function_arguments(rule.function),
    }
    for idx in range(len(parse(rule.function.program).tensors)):
        numbers[f"tensor{idx}"] = rule.function.tensors[idx].data_ptr()
    # What is left is there to fill gaps.
    numbers |= {name: 0 for name in spec.arguments.names if name not in numbers}
    bound = load_kernel(spec, index).bind(num_lists * tiles, numbers, ())
    bound.launch(stream, bound.parts)
    return made
