"""Which part of a sharded parameter each rank of its mesh has."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias, TypeVar

import torch
import torch.distributed
import torch.utils.dlpack
from torch import Tensor

from asteria.errors import ConfigError

if TYPE_CHECKING:
    # Whoever has a sharded parameter has imported it; for all others it would take 0.7 s.
    import torch.distributed.tensor

__all__ = ["Box", "Cut", "ShardLayout", "boxes", "is_sharded", "local_part", "mesh_ranks"]

T = TypeVar("T")

Box: TypeAlias = tuple[slice, ...]
"""A region of a tensor: a slice with start and stop for each dim."""


class Cut(NamedTuple):
    """What one dim of a mesh does to a tensor."""

    dim: int | None
    """Of the tensor, which is cut into as many pieces as there are ranks; None replicates it."""
    late: bool = False
    """Whether the cut is made after those of the mesh dims to its right, within their pieces."""


@functools.lru_cache(maxsize=256)  # of many parameters, on many ranks, few shapes
def boxes(
    shape: tuple[int, ...], mesh_shape: tuple[int, ...], cuts: tuple[Cut, ...]
) -> tuple[Box, ...]:
    """The region of each rank of a mesh, in the mesh's row-major order.

    A cut is made as `torch.chunk` makes it: all pieces are as large as the first but the last ones,
    which may be empty. Pure.
    """
    axes = list(range(len(mesh_shape)))
    order = [a for a in axes if not cuts[a].late] + [a for a in axes if cuts[a].late]
    found = []
    for position in range(math.prod(mesh_shape)):
        bounds = [(0, size) for size in shape]
        for axis in order:
            dim = cuts[axis].dim
            if dim is not None:
                start, stop = bounds[dim]
                coordinate = position // math.prod(mesh_shape[axis + 1 :]) % mesh_shape[axis]
                step = -(-(stop - start) // mesh_shape[axis])
                first = min(start + coordinate * step, stop)
                bounds[dim] = first, min(first + step, stop)
        found.append(tuple(slice(*bound) for bound in bounds))
    return tuple(found)


def is_sharded(tensor: object) -> bool:
    """Whether ``tensor`` is a DTensor; without importing what that is."""
    return hasattr(tensor, "device_mesh") and hasattr(tensor, "placements")


def mesh_ranks(tensor: Any) -> tuple[int, ...]:
    """The ranks of the default group that share a DTensor, ascending."""
    return tuple(sorted(int(rank) for rank in tensor.device_mesh.mesh.flatten().tolist()))


def local_part(tensor: Any) -> Tensor:
    """This rank's part of a DTensor: its own memory, not seen by autograd."""
    with torch.no_grad():
        part: Tensor = tensor.to_local()
    return part


@dataclass(frozen=True, slots=True, eq=False)
class ShardLayout:
    """How the ranks of a mesh share a parameter. Immutable, any thread."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size
    """Of the whole."""
    ranks: tuple[int, ...]
    """Of the default group, ascending: the position of a rank is its place here."""
    here: int
    """Position of this rank."""
    cuts: tuple[Cut, ...]
    """For each dim of the mesh."""
    boxes: tuple[Box, ...]
    """By position."""
    replicas: tuple[int, ...]
    """By position: ranks with equal numbers have the whole between them, once."""

    @classmethod
    def of(cls, name: str, parameter: Any) -> ShardLayout:
        """Of the DTensor ``parameter``, which messages call ``name``.

        Raises ConfigError for placements that cannot be gathered and sent back, or if this rank or
        the process group has no part in it.
        """
        mesh, placements = parameter.device_mesh, tuple(parameter.placements)
        if not torch.distributed.is_initialized() or mesh.get_coordinate() is None:
            raise ConfigError(
                f"{name}: its shards are on {mesh}, and this process is no part of that: a "
                "sharded parameter can be stepped by the ranks of its mesh, while their process "
                "group lives (before torch.distributed.destroy_process_group())"
            )
        cuts = _cuts(name, placements, tuple(mesh.shape))
        found = _by_rank(mesh, boxes(tuple(parameter.shape), tuple(mesh.shape), cuts))
        ranks = mesh_ranks(parameter)
        here = ranks.index(torch.distributed.get_rank())
        expected = tuple(s.stop - s.start for s in found[here])
        if tuple(local_part(parameter).shape) != expected:
            raise ConfigError(
                f"{name}: of shape {tuple(parameter.shape)} with placements {placements} this "
                f"rank was to have {expected}, and has {tuple(local_part(parameter).shape)}; "
                "distribute it with torch.distributed.tensor.distribute_tensor or fully_shard"
            )
        copies = _by_rank(mesh, _replicas(tuple(mesh.shape), cuts))
        return cls(mesh, placements, parameter.shape, ranks, here, cuts, found, copies)

    @property
    def parts(self) -> int:
        """Into how many the whole is cut."""
        sizes = zip(self.mesh.shape, self.cuts, strict=True)
        return math.prod(size for size, cut in sizes if cut.dim is not None)

    @property
    def part(self) -> int:
        """Which of them this rank has, by its coordinates on the mesh dims that cut."""
        number = 0
        for size, cut, coordinate in zip(
            self.mesh.shape, self.cuts, self.mesh.get_coordinate(), strict=True
        ):
            if cut.dim is not None:
                number = number * int(size) + int(coordinate)
        return number

    def boxes_of(self, shape: Sequence[int]) -> tuple[Box, ...]:
        """Regions, by position, of a tensor of the parameter's state.

        It is shared as the parameter is, if it is of its shape, and else by rows.
        """
        if tuple(shape) == self.shape:
            return self.boxes
        rows = tuple(Cut(None if cut.dim is None else 0) for cut in self.cuts)
        return _by_rank(self.mesh, boxes(tuple(shape), tuple(self.mesh.shape), rows))

    def placements_of(self, shape: Sequence[int]) -> tuple[Any, ...]:
        """The same as placements on the mesh."""
        if tuple(shape) == self.shape:
            return self.placements
        shard, whole = torch.distributed.tensor.Shard(0), torch.distributed.tensor.Replicate()
        return tuple(whole if cut.dim is None else shard for cut in self.cuts)

    def show(self, part: Tensor, shape: Sequence[int]) -> Tensor:
        """This rank's ``part`` as a DTensor of ``shape``; it keeps its memory."""
        # torch saves no DTensor whose part begins within its storage, so this is given its own.
        local = torch.utils.dlpack.from_dlpack(part) if part.storage_offset() else part
        shown: Tensor = torch.distributed.tensor.DTensor.from_local(
            local,
            self.mesh,
            self.placements_of(shape),
            run_check=False,
            shape=torch.Size(shape),
            stride=torch.empty(tuple(shape), device="meta").stride(),
        )
        return shown

    def part_of(self, tensor: Any) -> Tensor:
        """This rank's part of a DTensor of the state, shared as here; maybe with all ranks."""
        wanted = self.placements_of(tensor.shape)
        if tuple(tensor.placements) != wanted:
            tensor = tensor.redistribute(placements=wanted)
        return local_part(tensor)


def _by_rank(mesh: Any, found: Sequence[T]) -> tuple[T, ...]:
    """What is given in the mesh's row-major order, in order of its ranks."""
    ranks = mesh.mesh.flatten().tolist()
    return tuple(found[position] for position in sorted(range(len(ranks)), key=ranks.__getitem__))


def _cuts(name: str, placements: Sequence[Any], mesh_shape: Sequence[int]) -> tuple[Cut, ...]:
    found: list[Cut] = []
    for axis, placement in enumerate(placements):
        if placement.is_replicate():
            found.append(Cut(None))
            continue
        dim = getattr(placement, "dim", None)
        factor = getattr(placement, "split_factor", None)
        inner = [
            size
            for other, size in zip(placements[axis + 1 :], mesh_shape[axis + 1 :], strict=True)
            if getattr(other, "dim", None) == dim and not hasattr(other, "split_factor")
        ]
        if dim is None or placement.is_partial() or factor not in (None, math.prod(inner)):
            raise ConfigError(
                f"{name}: placements {tuple(placements)} were found, {placement} among them: each "
                "must be Replicate() or Shard(dim), as fully_shard, HSDP and tensor parallelism "
                "make them. Redistribute the parameter before the optimizer is made, or give it "
                "to another optimizer"
            )
        found.append(Cut(int(dim), late=factor is not None))
    return tuple(found)


def _replicas(mesh_shape: Sequence[int], cuts: Sequence[Cut]) -> list[int]:
    """By position, the number of the replica: its coordinates on the mesh dims that copy."""
    found = []
    for position in range(math.prod(mesh_shape)):
        number = 0
        for axis, size in enumerate(mesh_shape):
            if cuts[axis].dim is None:
                coordinate = position // math.prod(mesh_shape[axis + 1 :]) % size
                number = number * size + coordinate
        found.append(number)
    return found
