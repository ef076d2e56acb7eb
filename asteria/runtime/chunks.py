"""Cutting a step into chunks: neighbouring blocks that go through the products together."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from asteria.algorithms.algorithm import BlockState
from asteria.config.hyperparameters import Hyperparameters
from asteria.runtime.records import Extent, ParameterRecord, Tile

__all__ = ["CHUNK_BYTES", "Chunk", "Update", "chunks"]

CHUNK_BYTES = 32 * 1024**2
"""Size of one temporary tensor. A step uses three, or three single tiles where one is larger."""


@dataclass(frozen=True, slots=True)
class Update:
    """What a parameter's group asks of this step."""

    hyper: Hyperparameters
    lr: float
    weight_decay: float


@dataclass(frozen=True, slots=True)
class Chunk:
    """Neighbouring tiles of an extent with equal hyperparameters and step counters."""

    extent: Extent
    tiles: list[Tile]
    hyper: Hyperparameters

    @property
    def start(self) -> int:
        """First block in the extent's stack."""
        return self.tiles[0].start

    @property
    def stop(self) -> int:
        """One past the last block."""
        return self.tiles[-1].stop

    @property
    def begun(self) -> bool:
        """Whether the blocks have seen a gradient before."""
        return self.tiles[0].record.begun

    @property
    def steps(self) -> int:
        """Updates of the blocks' moments so far."""
        return self.tiles[0].record.steps

    @property
    def state(self) -> BlockState:
        """The blocks' fields; every tensor is (blocks, *shape of the field)."""
        place = (self.start, self.stop)
        windows = self.extent.windows
        if place not in windows:
            # Steps that cut an extent in ever new ways shall not pile up views.
            if len(windows) > len(self.extent.tiles):
                windows.clear()
            windows[place] = self.extent.stack.window(*place)
        return windows[place]


def chunks(extent: Extent, updates: Mapping[ParameterRecord, Update]) -> Iterator[Chunk]:
    """The extent's tiles whose parameters are in ``updates``, in order, cut into chunks.

    A pure function of shapes, steps and groups: the same blocks share a product whatever the
    memory at hand, so results do not depend on it.
    """
    limit = CHUNK_BYTES // (extent.stack.dtype.itemsize * max(1, math.prod(extent.shape.dims)))
    current: list[Tile] = []
    for tile in extent.tiles:
        update = updates.get(tile.record)
        if current and (update is None or not _joins(tile, update, current, updates, limit)):
            yield Chunk(extent, current, updates[current[0].record].hyper)
            current = []
        if update is not None:
            current.append(tile)
    if current:
        yield Chunk(extent, current, updates[current[0].record].hyper)


def _joins(
    tile: Tile,
    update: Update,
    current: list[Tile],
    updates: Mapping[ParameterRecord, Update],
    limit: int,
) -> bool:
    first = current[0]
    return (
        tile.start == current[-1].stop
        and tile.stop - first.start <= limit
        and tile.record.begun == first.record.begun
        and tile.record.steps == first.record.steps
        and (update is (other := updates[first.record]) or update.hyper == other.hyper)
    )
