"""A plan carried out on a device: buffers allocated, kernels launched in the current stream."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import torch

from jitattn.jit import backend
from jitattn.jit.device import device
from jitattn.jit.get_kernel import loaded_kernel
from jitattn.plan import arguments
from jitattn.request import block_lists
from jitattn.run import workspace
from jitattn.run.workspace import arrivals

if TYPE_CHECKING:
    from jitattn.jit.launch import BoundLaunch
    from jitattn.plan.step import Place, Plan
    from jitattn.request.request import Addresses
    from jitattn.spec.kernel_spec import KernelSpec
    from jitattn.values.masks import Rule

_DTYPES: Final = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "int8": torch.int8,
    "int32": torch.int32,
}


class LoadedDevice:
    """Facts of a GPU that plans depend on, kernels that are loaded on it among them."""

    __slots__ = ("_num_sms", "arch", "index")

    def __init__(self, index: int) -> None:
        here = device(index)
        self.index, self.arch, self._num_sms = index, here.arch, here.num_sms

    def slots(self, spec: KernelSpec) -> int:
        """CTAs of a kernel that the GPU holds at a time; loads the kernel if need be.

        Raises
        ------
        LaunchError
            It is not loaded, and the current stream is capturing a graph.
        """
        return self._num_sms * loaded_kernel(spec, self.index).blocks_per_sm


class _BoundStep(NamedTuple):
    launch: BoundLaunch
    places: tuple[Place, ...]  #: of its dynamic arguments, in the order of the struct


class BoundPlan:
    """A plan with its kernels loaded on a device, and all their constant arguments packed."""

    __slots__ = ("_buffers", "_device", "_index", "_num_counters", "_steps")

    def __init__(self, plan: Plan, device_index: int, like: torch.device) -> None:
        self._index, self._device = device_index, like
        self._num_counters = plan.num_counters
        self._buffers = [
            (name, buffer.shape, _DTYPES[buffer.dtype], buffer.is_zeroed)
            for name, buffer in plan.buffers.items()
        ]
        if not backend.active.is_capturing():
            workspace.prepare(device_index)
        self._steps = []
        for step in plan.steps:
            names = tuple(step.places)
            bound = loaded_kernel(step.spec, device_index).bind(step.grid, step.numbers, names)
            places = tuple(step.places[names[idx]] for idx in bound.layout.order)
            self._steps.append(_BoundStep(bound, places))

    def run(self, addresses: Addresses, stream: int) -> dict[str, torch.Tensor]:
        """Launch every step in a raw CUDA stream, which is the current one of the device.

        Parameters
        ----------
        addresses : dict
            Of the operands, by name. Those of buffers are added to it.
        stream : int

        Returns
        -------
        dict
            The buffers, by name.
        """
        buffers: dict[str, torch.Tensor] = {}
        for name, shape, dtype, is_zeroed in self._buffers:
            make = torch.zeros if is_zeroed else torch.empty
            buffers[name] = made = make(shape, dtype=dtype, device=self._device)
            addresses[name] = made.data_ptr()
        if self._num_counters:
            addresses["counters"] = arrivals(self._num_counters, self._index, stream)
        for launch, places in self._steps:
            launch.launch(stream, [addresses[name] + offset for name, offset in places])
        return buffers


def add_lists(
    addresses: Addresses,
    rule: Rule,
    heads: tuple[int, int],
    longest: int,
    tile_positions: int,
    like: torch.device,
) -> block_lists.Lists:
    """Add the arguments of block lists to the operands of a plan, and return the lists.

    Raises
    ------
    LaunchError
        They are not there, and the current stream is capturing a graph.
    """
    made = block_lists.lists_of(rule, heads, longest, tile_positions, like)
    for name, value in made.arguments._asdict().items():
        addresses[arguments.list_operand(name, tile_positions)] = value
    return made
