"""Sends and receives rows between the ranks of a group: one batch of messages at a time.

Every transfer is point to point (`torch.distributed.batch_isend_irecv`), so that a rank gets what
it needs and nothing else, and sums are made in an order of ours. NCCL runs a batch on its own
stream beside the kernels that follow; gloo, which has no such transfers of a GPU's memory, gets
copies on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import torch
import torch.distributed as dist

from jitattn.errors import CommunicationError, InternalError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from torch import Tensor
    from torch.distributed import ProcessGroup, Work


class Pending:
    """Messages under way."""

    def __init__(self, works: list[Work], received: list[tuple[Tensor, Tensor]], kept: Any) -> None:  # noqa: ANN401
        self._works = works
        self._staged = received
        self._kept = kept  # what is being sent: nobody may reuse its memory meanwhile

    def wait(self) -> None:
        """Wait until all has arrived: the current stream does, where a GPU sends by itself.

        Raises
        ------
        CommunicationError
            A rank has gone, or did not answer within the group's timeout.
        """
        try:
            for work in self._works:
                work.wait()
        except RuntimeError as error:
            raise gone("a transfer of keys and values", error) from error
        for target, arrived in self._staged:
            target.copy_(arrived)
        self._works, self._staged, self._kept = [], [], None


#: Nothing is under way.
NOTHING: Final = Pending([], [], None)


def gone(what: str, error: Exception) -> CommunicationError:
    """Return the error of a group that a rank has left."""
    return CommunicationError(
        f"{what} between ranks failed ({str(error).splitlines()[0]}): a rank has ended, or did not "
        "make the same call within the group's timeout; look at the other ranks' errors, and set "
        "JITATTN_DEBUG=1 to have every call compared between ranks first"
    )


def post(
    group: ProcessGroup | None,
    sends: Iterable[tuple[int, Tensor]],
    receives: Iterable[tuple[int, Tensor]],
) -> Pending:
    """Begin to send and receive tensors.

    Parameters
    ----------
    group : ProcessGroup
    sends, receives : (rank in the group, contiguous tensor)
        Between two ranks, the first sent is the first received. Empty tensors do not travel.
    """
    operations, staged, kept = [], [], []
    stages = None
    for is_send, items in ((True, sends), (False, receives)):
        for rank, tensor in items:
            if not tensor.numel():
                continue
            if group is None:
                raise InternalError("a message to nobody")
            if stages is None:
                stages = tensor.is_cuda and not has_device_transfers(group, tensor.device)
            own = tensor
            if stages:
                own = tensor.cpu() if is_send else torch.empty_like(tensor, device="cpu")
                if not is_send:
                    staged.append((tensor, own))
            kept.append(own)
            peer = dist.get_global_rank(group, rank)
            operation = dist.isend if is_send else dist.irecv
            operations.append(dist.P2POp(operation, own, peer, group))
    if not operations:
        return NOTHING
    try:
        works = dist.batch_isend_irecv(operations)
    except RuntimeError as error:
        raise gone("a transfer of keys and values", error) from error
    return Pending(works, staged, kept)


def backend_of(group: ProcessGroup, kind: str) -> str:
    """Return the name of the backend of a group for a kind of device; "" if it has none."""
    config = str(dist.get_backend_config(group))
    by_device = dict(one.split(":", 1) for one in config.split(",") if ":" in one)
    return by_device.get(kind, "" if by_device else config)


def has_device_transfers(group: ProcessGroup, device: torch.device) -> bool:
    """Return whether the ranks of a group can send each other a GPU's memory."""
    return backend_of(group, device.type) not in ("gloo", "")
