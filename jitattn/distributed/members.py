"""Who takes part in a call: groups of ranks, and what they tell each other on the host."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
import torch.distributed as dist

from jitattn.distributed.transfers import backend_of, gone
from jitattn.errors import InvalidInputError

if TYPE_CHECKING:
    from datetime import timedelta

    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

#: Names of the dimensions of a mesh for hybrid calls, in this order.
RING, ULYSSES = "ring", "ulysses"


class Members(NamedTuple):
    """The ranks of a call: `ring` and `ulysses` are the groups along the dimensions of a mesh.

    A rank's number among all is ring rank * ulysses size + ulysses rank. A group of one is None.
    """

    whole: ProcessGroup | None
    ring: ProcessGroup | None
    ulysses: ProcessGroup | None

    @property
    def size(self) -> int:
        """Number of ranks."""
        return size_of(self.ring) * size_of(self.ulysses)

    @property
    def rank(self) -> int:
        """Number of this rank."""
        return rank_of(self.ring) * size_of(self.ulysses) + rank_of(self.ulysses)

    @property
    def is_mesh(self) -> bool:
        """Whether both dimensions have several ranks."""
        return self.ring is not None and self.ulysses is not None


def size_of(group: ProcessGroup | None) -> int:
    """Return the number of ranks of a group; None is this rank alone."""
    return 1 if group is None else dist.get_world_size(group)


def rank_of(group: ProcessGroup | None) -> int:
    """Return this rank's number in a group."""
    return 0 if group is None else dist.get_rank(group)


def members_of(mesh: DeviceMesh | None, group: ProcessGroup | None) -> Members:
    """Return the ranks of a call.

    Raises
    ------
    InvalidInputError
        Both are given, this rank is in neither, or a mesh has other dimensions.
    """
    if mesh is not None and group is not None:
        raise InvalidInputError("mesh and group are given: pass the one or the other")
    if mesh is None:
        if group is None:
            if not (dist.is_available() and dist.is_initialized()):
                return Members(None, None, None)
            group = dist.group.WORLD
        if not isinstance(group, dist.ProcessGroup):
            raise InvalidInputError(
                f"group is a {type(group).__name__}: it must be a ProcessGroup that this rank is "
                "in; pass a DeviceMesh as mesh="
            )
        own = group if dist.get_world_size(group) > 1 else None
        return Members(own, own, None)
    names = mesh.mesh_dim_names
    if mesh.get_coordinate() is None:
        raise InvalidInputError("mesh does not hold this rank: call it on the ranks of the mesh")
    if mesh.ndim == 1:
        return members_of(None, mesh.get_group())
    if names != (RING, ULYSSES):
        raise InvalidInputError(
            f"mesh has the dimensions {names}: it must have one, or two named "
            f"({RING!r}, {ULYSSES!r}) in this order; slice it, as mesh['cp']"
        )
    groups = [mesh.get_group(name) for name in (RING, ULYSSES)]
    ring, ulysses = (one if dist.get_world_size(one) > 1 else None for one in groups)
    if ring is None or ulysses is None:
        only = ring or ulysses
        return Members(only, ring, ulysses)
    return Members(_whole_of(mesh), ring, ulysses)


_wholes: Final[dict[tuple[int, ...], ProcessGroup]] = {}


def _whole_of(mesh: DeviceMesh) -> ProcessGroup:
    """Return a group of all ranks of a mesh; all make it at their first call."""
    ranks = tuple(mesh.mesh.flatten().tolist())
    found = _wholes.get(ranks)
    if found is None or not _is_alive(found):
        found = dist.group.WORLD
        if found is None or dist.get_process_group_ranks(found) != list(ranks):
            found = _host_group(ranks, None)
        _wholes[ranks] = found
    return found


def _is_alive(group: ProcessGroup) -> bool:
    try:
        dist.get_process_group_ranks(group)
    except (KeyError, ValueError, RuntimeError):  # of a process group that was destroyed
        return False
    return True


_hosts: Final[weakref.WeakKeyDictionary[ProcessGroup, ProcessGroup]] = weakref.WeakKeyDictionary()


def _host_group(ranks: tuple[int, ...], timeout: timedelta | None) -> ProcessGroup:
    # Older versions of torch sort ranks, and have no such argument.
    more: dict[str, Any] = {} if list(ranks) == sorted(ranks) else {"sort_ranks": False}
    group = dist.new_group(
        list(ranks), timeout=timeout, backend="gloo", use_local_synchronization=True, **more
    )
    if not isinstance(group, dist.ProcessGroup):
        raise InvalidInputError("mesh does not hold this rank: call it on the ranks of the mesh")
    return group


def host_group(group: ProcessGroup) -> ProcessGroup:
    """Return a group of the same ranks that speaks on the host, with gloo.

    Of a group of NCCL alone one is made at its first use, and NCCL is made to connect all ranks
    then: transfers between some must not be its first.
    """
    if backend_of(group, "cpu") == "gloo":
        return group
    found = _hosts.get(group)
    if found is None:
        ranks = tuple(dist.get_process_group_ranks(group))
        found = _hosts[group] = _host_group(ranks, _timeout_of(group))
        if backend_of(group, "cuda") == "nccl":
            dist.all_reduce(torch.zeros(1, device="cuda", dtype=torch.int32), group=group)
    return found


def _timeout_of(group: ProcessGroup) -> timedelta | None:
    """Return the timeout of a group, where torch tells it."""
    for kind in ("cuda", "cpu"):
        try:
            options: Any = group._get_backend(torch.device(kind)).options
        except (RuntimeError, AttributeError):
            continue
        timeout: timedelta | None = getattr(options, "_timeout", None)
        if timeout is not None:
            return timeout
    return None


def told(group: ProcessGroup, own: Any) -> list[Any]:  # noqa: ANN401 - what pickles
    """Tell all ranks of a group something, and return what each tells.

    Raises
    ------
    CommunicationError
        A rank has gone, or did not take part within the group's timeout.
    """
    found: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(found, own, group=host_group(group))
    except RuntimeError as error:
        raise gone("the comparison of a call", error) from error
    return found
