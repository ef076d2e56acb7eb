"""What this rank tells others of the factors that it keeps for all."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from asteria.errors import CheckpointError
from asteria.runtime.admission import Extents
from asteria.runtime.extents import Extent
from asteria.runtime.records import Tile
from asteria.store.layout import Life

__all__ = ["Answers"]


class Answers:
    """Reads factors for other ranks, on any thread but only while no step goes on.

    A rank that saves its state asks for the factors that others keep. All ranks are at the same
    step then: to take the next one, each would need a gradient that the saving rank has its part
    in. Where that is not so, it is an error, not a mixture of two steps.
    """

    def __init__(self, extents: Extents, lock: threading.RLock) -> None:
        """``lock`` is held by whoever uses ``extents``."""
        self._extents = extents
        self._lock = lock

    def __call__(self, note: Mapping[str, Any]) -> Sequence[Tensor]:
        """The factor ``note["name"]`` of a tile as it is stored, in host memory of its own.

        Raises CheckpointError if the other rank is at another step.
        """
        with self._lock:
            extent, tile = self._find(note["index"], note["ordinal"])
            if tile.record.steps != note["steps"]:
                raise CheckpointError(
                    f"it has taken {tile.record.steps} steps of this parameter, and the rank that "
                    f"asks {note['steps']}. Ask for the state at the same step on all ranks"
                )
            return [_read(extent, tile, note["name"])]

    def _find(self, index: int, ordinal: int) -> tuple[Extent, Tile]:
        for extents in self._extents.values():
            for extent in extents:
                for tile in extent.tiles:
                    if (tile.record.index, tile.plan.ordinal) == (index, ordinal) and tile.kept:
                        return extent, tile
        raise CheckpointError(
            "it does not keep it. Ask for the state at the same step on all ranks, and add and "
            "remove parameters on all of them"
        )


def _read(extent: Extent, tile: Tile, name: str) -> Tensor:
    start, stop = extent.place(tile.start, tile.stop, Life.SUM)
    cell = extent.cells[Life.SUM]
    if extent.resident:
        if extent.device.type != "cpu":
            # This thread's work does not come after that of the thread which trains.
            torch.get_device_module(extent.device).synchronize(extent.device)
        return cell.window(start, stop)[name].to("cpu", copy=True)
    extent.settle()
    return extent.door.read(cell)[name][start:stop]
