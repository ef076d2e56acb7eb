"""State comes near while the backward pass still goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from asteria.hooks.gradients import GradientHooks
from asteria.runtime.chunks import Chunk
from asteria.runtime.extents import Extent
from asteria.runtime.records import ParameterRecord
from asteria.store.cell import Cell
from asteria.store.door import Door
from asteria.store.lane import current_stream, stream_of

__all__ = ["Foresight"]


class Foresight:
    """Prefetches what the next step is going to need, in the order in which it needs it.

    A step goes through the state in a fixed order, so the first gradient of a backward pass is the
    sign to bring the first part of it near. For the training thread, and for `GradientHooks` while
    that one is in the backward pass.
    """

    def __init__(self) -> None:
        self._expected: dict[Door, list[Cell]] = {}
        self._streams: dict[Door, torch.Stream | None] = {}
        """Of the thread that steps. A backward pass may run on another one, which knows nothing of
        the work that still needs the memory."""
        self._begun = False
        self._lock = threading.Lock()
        self._hooks = GradientHooks(self, Foresight._announced)

    def watch(self, extents: Iterable[Extent]) -> None:
        """These are all extents; wait for gradients of those whose state is not all near."""
        for extent in extents:
            for tile in extent.tiles:
                if extent.resident:
                    continue
                self._hooks.watch(tile.record.parameter)
        self._expected = {}

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        for record in records:
            self._hooks.unwatch(record.parameter)
        self._expected = {}

    def begin_step(self, work: Sequence[Chunk], needs: Callable[[Chunk], list[Cell]]) -> None:
        """A step is going to take these chunks in this order, and ``needs(chunk)`` for each."""
        self._expect(work, needs)
        self._prefetch()

    def end_step(self, work: Sequence[Chunk], needs: Callable[[Chunk], list[Cell]]) -> None:
        """The next gradient is one of the next backward pass; expect the same chunks again."""
        self._begun = False
        self._expect(work, needs)

    def _expect(self, work: Sequence[Chunk], needs: Callable[[Chunk], list[Cell]]) -> None:
        self._expected = {}
        for chunk in work:
            if not chunk.extent.resident:
                door = chunk.extent.door
                self._expected.setdefault(door, []).extend(needs(chunk))
                self._streams[door] = stream_of(chunk.extent.device)

    def _announced(self, _: Tensor) -> None:
        """A gradient is final, and many will be; never waits."""
        # Backward passes of several devices have a thread each.
        if not self._begun and self._lock.acquire(blocking=False):
            try:
                if not self._begun:
                    self._begun = True
                    self._prefetch()
            finally:
                self._lock.release()

    def _prefetch(self) -> None:
        for door, cells in self._expected.items():
            if door.lock.acquire(blocking=False):  # else another rank reads here, for a moment
                try:
                    with current_stream(self._streams[door]):
                        door.prefetch(cells)
                finally:
                    door.lock.release()
