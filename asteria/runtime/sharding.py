"""What the runtime knows of a sharded parameter beside what it knows of every parameter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from asteria.distributed.sharded_layout import ShardLayout, is_sharded, local_part
from asteria.distributed.sharded_traffic import ShardTraffic

__all__ = ["Sharding", "sharding_of", "stepped_shape"]


@dataclass(slots=True, eq=False)
class Sharding:
    """How one parameter is shared by ranks, and how it is stepped. Training thread only."""

    layout: ShardLayout
    exact: bool
    """Whether the whole is stepped, by its owner; else each shard is, by the rank that has it."""
    owner: int = -1
    """Position of the rank that has the state of the whole, if exact; -1 as long as none has."""
    cuts: tuple[tuple[int, int], ...] = ()
    """Of each tile, if exact: its extent, as in `ExtentKey.part`."""
    alike: frozenset[str] = frozenset()
    """Names of the state tensors that mean the same for the shards of all ranks, if not exact."""
    traffic: ShardTraffic | None = None
    """Where is counted what travels of it; None as long as it has no state."""
    copies: int = field(init=False)
    """Replicas of the whole among the ranks."""
    largest_part: int = field(init=False)
    """Elements of the largest shard."""

    local_gradient: Tensor | None = None
    """During a step: of this rank's shard."""
    gradient: Tensor | None = None
    """During a step, at the owner: of the whole."""
    change: Tensor | None = None
    """During a step, at the owner: the update of the whole."""

    def __post_init__(self) -> None:
        self.copies = len(set(self.layout.replicas))
        self.largest_part = max(
            math.prod(s.stop - s.start for s in box) for box in self.layout.boxes
        )

    @property
    def shard_shapes(self) -> set[torch.Size]:
        """Of the shards of all ranks."""
        return {torch.Size(s.stop - s.start for s in box) for box in self.layout.boxes}

    @property
    def is_here(self) -> bool:
        """Whether this rank has the state."""
        return not self.exact or self.owner == self.layout.here

    @property
    def owning_rank(self) -> int | None:
        """The owner, in the default group; None if there is none."""
        return self.layout.ranks[self.owner] if self.exact and self.owner >= 0 else None

    def take_gradient(self, gradient: Any) -> Tensor:
        """This rank's part of a gradient; together with the others if it is not shared alike."""
        if tuple(gradient.placements) != self.layout.placements:
            gradient = gradient.redistribute(placements=self.layout.placements)
        self.local_gradient = local_part(gradient)
        return self.local_gradient


def sharding_of(
    name: str, parameter: Tensor, group: Mapping[str, Any], default: str
) -> Sharding | None:
    """Of a parameter that messages call ``name``; None if it is a plain tensor.

    The group's option ``shards`` decides how it is stepped, or else the ``default``. Raises
    ConfigError for placements that cannot be used.
    """
    if not is_sharded(parameter):
        return None
    layout = ShardLayout.of(name, parameter)
    return Sharding(layout, exact=group.get("shards", default) == "exact")


def stepped_shape(parameter: Tensor, sharding: Sharding | None) -> torch.Size:
    """Of what is stepped: the whole parameter or, if its shards are on their own, this rank's."""
    if sharding is None or sharding.exact:
        return parameter.shape
    return local_part(parameter).shape
