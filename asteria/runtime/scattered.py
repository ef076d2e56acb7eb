"""Factors of one parameter of which other ranks keep some or all."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from asteria.errors import CheckpointError
from asteria.linalg.packed import unpacked
from asteria.runtime.extents import Extent
from asteria.runtime.records import Tile
from asteria.store.distant import Distant, Source, Values
from asteria.store.layout import Life

__all__ = ["Scattered"]

Place = tuple[Extent, Tile]


class Scattered:
    """One factor of all tiles of one shape, wherever they are. For the training thread.

    No rank has to do anything to be asked but be there, at the same step.
    """

    def __init__(self, name: str, places: Sequence[Place], shape: tuple[int, ...]) -> None:
        self._name = name
        self._places = places
        self._shape = shape

    def read(self) -> Tensor:
        """The values of now, in host memory of their own.

        Raises CoherenceError where a rank is not there, and CheckpointError where it is at another
        step.
        """
        record = self._places[0][1].record
        return _OfStep(self._name, self._places, self._shape, record.steps).read()

    def promise(self) -> Tensor:
        """A tensor that reads the values when they are needed, which must be before the next step.

        To bring them here at that step would be to ask ranks that may have taken it.
        """
        extent, tile = self._places[0]
        source = _OfStep(self._name, self._places, self._shape, tile.record.steps)
        return Distant(Values(source, self._shape, extent.dtype))


class _OfStep:
    """The values after so many steps of the parameter."""

    lasts = False

    def __init__(
        self, name: str, places: Sequence[Place], shape: tuple[int, ...], steps: int
    ) -> None:
        self._name = name
        self._places = places
        self._shape = shape
        self._steps = steps

    def read(self) -> Tensor:
        """See `Source`; raises CheckpointError once a step was taken."""
        extent, tile = self._places[0]
        if tile.record.steps != self._steps:
            raise CheckpointError(
                f"{self._name} of {tile.record.name} was to be read from a state dict of step "
                f"{self._steps}, and step {tile.record.steps} was taken since: other ranks keep "
                "it. Save or copy the state dict before the next step"
            )
        columns = math.prod(self._shape[-2:])
        values = torch.empty(math.prod(self._shape), dtype=extent.dtype, device="cpu")
        at = 0
        for extent, tile in self._places:
            size = tile.plan.blocks * columns
            part = values[at : at + size].view(tile.plan.blocks, *self._shape[-2:])
            part.copy_(unpacked(self._part(extent, tile)))
            at += size
        return values.view(self._shape)

    def _part(self, extent: Extent, tile: Tile) -> Tensor:
        """As it is stored."""
        if tile.elsewhere is not None:
            return tile.elsewhere(self._name)
        with extent.door.lock:
            extent.settle()
            start, stop = extent.place(tile.start, tile.stop, Life.SUM)
            return extent.door.read(extent.cells[Life.SUM])[self._name][start:stop]

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return None
