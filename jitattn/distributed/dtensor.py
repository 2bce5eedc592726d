"""DTensors in and out: sharded on the sequence dimension, gradients too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from jitattn.errors import InvalidInputError, UnsupportedError
from jitattn.request.problem import axes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from torch.distributed.device_mesh import DeviceMesh


def are_dtensors(*tensors: Any) -> bool:  # noqa: ANN401 - checked later
    """Return whether any is a DTensor."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.tensor import DTensor

    return any(isinstance(one, DTensor) for one in tensors)


def to_local(
    q: Any,  # noqa: ANN401 - DTensor
    k: Any,  # noqa: ANN401
    v: Any,  # noqa: ANN401
    mesh: DeviceMesh | None,
    layout: str,
    q_seqs: object,
) -> tuple[tuple[Tensor, Tensor, Tensor], DeviceMesh]:
    """Return this rank's shards, differentiable, and their mesh.

    Raises
    ------
    InvalidInputError
        Some are DTensors and others not, or their meshes differ.
    UnsupportedError
        They are not sharded on the sequence dimension.
    """
    from torch.distributed.tensor import DTensor, Shard

    dim = _sequence_dim(layout, q_seqs)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if not isinstance(x, DTensor):
            raise InvalidInputError(
                f"{name} is a {type(x).__name__} and another is a DTensor: pass DTensors of one "
                "mesh, or the local shards of all (x.to_local())"
            )
        if x.device_mesh != q.device_mesh:
            raise InvalidInputError(f"{name} is on {x.device_mesh} and q on {q.device_mesh}")
        if any(one != Shard(dim) for one in x.placements):
            raise UnsupportedError(
                f"{name} has the placements {x.placements}: it must be Shard({dim}), the sequence "
                f"dimension; call {name}.redistribute(placements=[Shard({dim})]) first"
            )
    if mesh is not None and mesh != q.device_mesh:
        raise InvalidInputError(f"mesh is {mesh} and q is on {q.device_mesh}: leave mesh out")
    return (q.to_local(), k.to_local(), v.to_local()), q.device_mesh


def wrapper(q: Any, v: Any, layout: str, q_seqs: object) -> Callable[[Any], Any]:  # noqa: ANN401
    """Return a function that makes DTensors of local results."""
    from torch.distributed.tensor import DTensor, Shard

    mesh, placements = q.device_mesh, q.placements
    dim = _sequence_dim(layout, q_seqs)

    def whole(local: Tensor, shape: torch.Size, own: list[Any]) -> Any:  # noqa: ANN401
        stride = torch.empty(shape, device="meta", dtype=local.dtype).stride()
        return DTensor.from_local(local, mesh, own, run_check=False, shape=shape, stride=stride)

    def wrap(found: Any) -> Any:  # noqa: ANN401
        out = found[0] if isinstance(found, tuple) else found
        shape = torch.Size((*q.shape[:-1], v.shape[-1]))
        wrapped = whole(out, shape, list(placements))
        if not isinstance(found, tuple):
            return wrapped
        lse = found[1]
        rows = q.shape[dim]
        lse_shape = torch.Size((*lse.shape[:-1], rows))
        own = [Shard(lse.dim() - 1) for _ in placements]
        return wrapped, whole(lse, lse_shape, own)

    return wrap


def _sequence_dim(layout: str, q_seqs: object) -> int:
    return 0 if q_seqs is not None else axes(layout)[0]
