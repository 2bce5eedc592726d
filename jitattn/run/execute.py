"""Executes plans on a device: allocates buffers, launches kernels in the current stream."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch

from jitattn.cache import settings
from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.load_kernel import load_kernel
from jitattn.plan import arguments
from jitattn.request import block_lists
from jitattn.run import workspace
from jitattn.run.function_lists import function_lists
from jitattn.run.workspace import arrivals
from jitattn.values.masks import FunctionBlocks

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable

    from jitattn.plan.step import Buffer, Place, Plan
    from jitattn.request.facts import Addresses
    from jitattn.spec.kernel_spec import KernelSpec
    from jitattn.values.masks import Rule

_MOST_KEPT: Final = 1024
_DTYPES: Final = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int32": torch.int32,
    "int64": torch.int64,
}


class LoadedDevice:
    """The `Device` of plans: GPU properties, and occupancy of kernels loaded on it."""

    __slots__ = ("_num_sms", "arch", "has_wgmma", "index")

    def __init__(self, index: int) -> None:
        here = device(index)
        self.index, self.arch, self._num_sms = index, here.arch, here.num_sms
        self.has_wgmma = has_wgmma(here.arch)

    def slots(self, spec: KernelSpec) -> int:
        """Return the CTAs of a kernel that fit the GPU at once; loads the kernel if necessary.

        Raises
        ------
        LaunchError
            It is not loaded, and the current stream is capturing a graph.
        """
        return self._num_sms * load_kernel(spec, self.index).blocks_per_sm


def has_wgmma(arch: str) -> bool:
    """Return whether calls may take the wgmma kernels of sm_90, by architecture and settings."""
    return arch == "sm_90" and settings.family() == "sm90" and backend.active.encodes_maps()


class _Made(NamedTuple):
    """A workspace buffer of a plan, allocated at every run."""

    name: str
    pattern: torch.Tensor
    num_zeroed: int  #: bytes


class BoundPlan:
    """A plan with its kernels loaded on a device, and their constant arguments packed.

    A run looks up each launch's values in one dictionary: operands and buffers by name, places with
    an offset by the place, and constant bytes by the bytes.
    """

    __slots__ = ("_buffers", "_constants", "_derived", "_index", "_num_counters", "_steps")

    def __init__(self, plan: Plan, device_index: int, like: torch.device) -> None:
        self._index, self._num_counters = device_index, plan.num_counters
        self._buffers = [_made(name, buffer, like) for name, buffer in plan.buffers.items()]
        if not backend.active.is_capturing():
            workspace.prepare(device_index)
        self._steps: list[tuple[Callable[..., None], Callable[[Addresses], Iterable[Any]]]] = []
        self._constants: Addresses = {}
        derived: dict[Place, None] = {}
        for step in plan.steps:
            places = tuple(step.places.values())
            bound = load_kernel(step.spec, device_index).bind(
                step.grid, step.numbers, tuple(step.places), step.maps
            )
            keys: list[str | Place | bytes] = []
            for part in bound.parts:
                if isinstance(part, bytes):
                    keys.append(part)
                    self._constants[part] = part
                elif places[part].offset:
                    keys.append(places[part])
                    derived[places[part]] = None
                else:
                    keys.append(places[part].name)
            self._steps.append((bound.launch, operator.itemgetter(*keys)))
        self._derived = tuple(derived)

    def with_values(self, values: dict[str, int]) -> BoundPlan:
        """Return the plan with some of its operands bound to values."""
        other = BoundPlan.__new__(BoundPlan)
        other._index, other._num_counters = self._index, self._num_counters
        other._buffers, other._steps, other._derived = self._buffers, self._steps, self._derived
        other._constants = {**self._constants, **values}
        return other

    def run(self, addresses: Addresses, stream: int) -> dict[str, torch.Tensor]:
        """Launch all steps in a raw CUDA stream, the device's current one.

        Parameters
        ----------
        addresses : dict
            Of the operands, by name. It is used up.
        stream : int

        Returns
        -------
        dict
            The buffers, by name.
        """
        buffers: dict[str, torch.Tensor] = {}
        for name, pattern, num_zeroed in self._buffers:
            buffers[name] = made = torch.empty_like(pattern)
            addresses[name] = address = made.data_ptr()
            if num_zeroed:
                backend.active.zero(address, num_zeroed, stream)
        if self._num_counters:
            addresses["counters"] = arrivals(self._num_counters, self._index, stream)
        for place in self._derived:
            addresses[place] = addresses[place.name] + place.offset
        addresses.update(self._constants)
        for launch, values_of in self._steps:
            launch(stream, values_of(addresses))
        return buffers


class KeptPlans:
    """A cache of bound plans by device and by the facts that determine them."""

    def __init__(self) -> None:
        self._bound: dict[tuple[Hashable, ...], BoundPlan] = {}
        backend.on_change(self._bound.clear)

    def run(
        self,
        facts: tuple[Hashable, ...],
        make: Callable[[], Plan],
        addresses: Addresses,
        device_index: int,
    ) -> None:
        """Run the plan of these facts in the device's current stream, making it on first use.

        Parameters
        ----------
        facts : tuple
        make : callable
        addresses : dict
            Of the operands, by name. It is used up.
        device_index : int
        """
        if device_index != backend.active.current_device():
            with backend.active.on_device(device_index):
                self.run(facts, make, addresses, device_index)
            return
        key = (device_index, *facts)
        bound = self._bound.get(key)
        if bound is None:
            if len(self._bound) >= _MOST_KEPT:
                self._bound.clear()
            bound = BoundPlan(make(), device_index, torch.device("cuda", device_index))
            self._bound[key] = bound
        bound.run(addresses, backend.active.stream(device_index))


def _made(name: str, buffer: Buffer, device: torch.device) -> _Made:
    made = workspace.pattern(buffer.shape, _DTYPES[buffer.dtype], device)
    return _Made(name, made, made.numel() * made.element_size() if buffer.is_zeroed else 0)


def add_block_lists(
    addresses: Addresses,
    rule: Rule,
    heads: tuple[int, int],
    longest: int,
    tile_positions: int,
    like: torch.device,
) -> block_lists.BlockLists:
    """Add the block-list arguments to the operands of a plan, and return the lists.

    Raises
    ------
    LaunchError
        They are not there, and the current stream is capturing a graph.
    """
    if isinstance(rule, FunctionBlocks):
        made = function_lists(rule, heads[0], tile_positions, like)
    else:
        made = block_lists.block_lists_of(rule, heads, longest, tile_positions, like)
    for name, value in made.arguments._asdict().items():
        addresses[arguments.block_list_operand(name, tile_positions)] = value
    return made
