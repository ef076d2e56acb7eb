"""Cutting a step into chunks: neighbouring blocks that go through the products together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

from asteria.algorithms.algorithm import BlockShape, BlockState
from asteria.config.hyperparameters import Hyperparameters
from asteria.runtime.extents import Extent
from asteria.runtime.records import ParameterRecord, Tile
from asteria.store.layout import Life

__all__ = ["Chunk", "Update", "chunks"]


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
    def shape(self) -> BlockShape:
        """Of each of its blocks."""
        return self.tiles[0].plan.shape

    @property
    def begun(self) -> bool:
        """Whether the blocks have seen a gradient before."""
        return self.tiles[0].record.begun

    @property
    def has_moments(self) -> bool:
        """Whether the blocks have moments to go on with."""
        return self.tiles[0].record.has_moments

    @property
    def age(self) -> int:
        """Updates since the gradient that the factors began with."""
        record = self.tiles[0].record
        return record.steps - record.born if record.begun else 0

    @property
    def steps(self) -> int:
        """Updates of the blocks' moments so far."""
        return self.tiles[0].record.steps

    @property
    def kept(self) -> list[slice]:
        """Which of its blocks have their factors here; the others' are with other ranks."""
        return self.extent.kept(self.start, self.stop)

    def state(self, lives: Iterable[Life] = Life) -> BlockState:
        """The blocks' fields of these lives, which are acquired: (blocks, *shape) each.

        Of factors those of the blocks that are `kept`.
        """
        return self.extent.window(self.start, self.stop, lives)


def chunks(
    extent: Extent,
    updates: Mapping[ParameterRecord, Update],
    done: Callable[[Tile], bool] | None = None,
) -> Iterator[Chunk]:
    """The extent's tiles whose parameters are in ``updates``, in order, cut into chunks.

    Without those that are ``done``, by an interrupted step. A pure function of shapes, steps and
    groups: the same blocks share a product whatever the memory at hand, so results do not depend
    on it.
    """
    current: list[Tile] = []
    for tile in extent.tiles:
        update = None if done is not None and done(tile) else updates.get(tile.record)
        if current and (update is None or not _joins(tile, update, current, updates)):
            yield Chunk(extent, current, updates[current[0].record].hyper)
            current = []
        if update is not None:
            current.append(tile)
    if current:
        yield Chunk(extent, current, updates[current[0].record].hyper)


def _joins(
    tile: Tile, update: Update, current: list[Tile], updates: Mapping[ParameterRecord, Update]
) -> bool:
    first = current[0]
    return (
        tile.start == current[-1].stop
        and tile.record.begun == first.record.begun
        and tile.record.steps == first.record.steps
        and tile.record.born == first.record.born
        and (update is (other := updates[first.record]) or update.hyper == other.hyper)
    )
