"""Cells on their way home, and those that could not be brought there."""

from __future__ import annotations

from asteria.errors import StoreError
from asteria.store.buffers import Buffers, trim_heap
from asteria.store.cell import Cell, Home
from asteria.store.courier import Courier
from asteria.telemetry.counters import Traffic

__all__ = ["Homeward"]

_TRIM_BYTES = 64 * 1024**2


class Homeward:
    """Takes windows back: at once where nothing has changed, else when it is written.

    A cell that cannot be written stays in memory until another try. For the training thread.
    """

    def __init__(self, near: Buffers, courier: Courier, traffic: Traffic) -> None:
        self._near = near
        self._courier = courier
        self._traffic = traffic
        self._outgoing: dict[Cell, None] = {}
        """Oldest first."""
        self._stuck: dict[Cell, None] = {}
        self._passed_bytes = 0
        """Since the heap was trimmed."""
        self.failure: StoreError | None = None
        """Of the latest write that failed; what it should have written is still in memory."""

    @property
    def is_stuck(self) -> bool:
        """Whether anything could not be written."""
        return bool(self._stuck)

    def go(self, cell: Cell) -> None:
        """Begin the way home; nobody uses the cell."""
        self._stuck.pop(cell, None)
        self._passed_bytes += cell.nbytes
        if self._passed_bytes > _TRIM_BYTES:
            self._passed_bytes = 0
            trim_heap()
        if not cell.dirty:
            self.vacate(cell)
            return
        try:
            self._courier.send(cell)
        except StoreError as error:
            self._keep(cell, error)
        else:
            self._outgoing[cell] = None

    def vacate(self, cell: Cell) -> None:
        """Take the cell's memory."""
        self._courier.leave(cell)
        near = cell.vacate()
        if cell.shown:
            self._near.drop(near.numel())
            cell.shown = False
        else:
            self._near.give(near)

    def turn_back(self, cell: Cell) -> None:
        """Somebody needs the cell: it is no longer on its way, if need be after a wait."""
        if cell in self._outgoing and not self._gives_way(cell):
            self._left(cell, wait=True)
        self._stuck.pop(cell, None)

    def wait_for(self, cell: Cell) -> None:
        """Wait for the cell's own write, if there is one."""
        if cell in self._outgoing:
            self._left(cell, wait=True)
        self._courier.settle(cell)

    def stay(self, cell: Cell) -> None:
        """The memory that the cell could not leave is its home again."""
        self._stuck.pop(cell, None)
        cell.home, cell.dirty = Home.DEVICE, False

    def tidy(self) -> None:
        """Take note of writes that have ended; never waits."""
        while self._outgoing and self._left(next(iter(self._outgoing)), wait=False):
            pass

    def give_way(self) -> bool:
        """Take the memory of a cell on its way for which nobody has to wait; False if none is."""
        cell = next(filter(self._gives_way, self._outgoing), None)
        if cell is None:
            return False
        if cell.users == 0:
            self.vacate(cell)
        return True

    def _gives_way(self, cell: Cell) -> bool:
        if not self._courier.give_way(cell):
            return False
        del self._outgoing[cell]
        cell.dirty = False
        return True

    def finish_one(self) -> bool:
        """Wait for the oldest write; False if there is none."""
        if not self._outgoing:
            return False
        self._left(next(iter(self._outgoing)), wait=True)
        return True

    def try_again(self) -> bool:
        """Begin to write what could not be written before; False if there is nothing."""
        stuck = list(self._stuck)
        for cell in stuck:
            self.go(cell)
        return bool(stuck)

    def _left(self, cell: Cell, *, wait: bool) -> bool:
        """Whether the cell has ended its way, well or not."""
        try:
            if not self._courier.sent(cell, wait=wait):
                return False
        except StoreError as error:
            self._keep(cell, error)
        else:
            cell.dirty = False
            if cell.users == 0:
                self.vacate(cell)
        self._outgoing.pop(cell, None)
        return True

    def _keep(self, cell: Cell, error: StoreError) -> None:
        self._stuck[cell] = None
        self._traffic.failed_writes += 1
        self.failure = error
