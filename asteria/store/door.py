"""The one door to the state: acquire, release, prefetch. Knows bytes, no algorithm."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable

from torch import Tensor

from asteria.errors import StoreError, StoreFullError
from asteria.store.buffers import Buffers, host_memory
from asteria.store.cell import Cell, Home
from asteria.store.courier import Courier
from asteria.store.homeward import Homeward
from asteria.store.tier import Lease
from asteria.telemetry.counters import Traffic

__all__ = ["Door", "acquire_all"]


class Door:
    """Brings cells to the memory of one device and home again. For the training thread.

    Between two uses a cell is at home. One whose home is not the device takes a window: memory from
    `acquire` or `prefetch` on until it is home again. Copies run beside the computation; `acquire`
    waits for the read of its own cell, and for writes where it needs their room. The budget of
    ``near`` holds, except that what is acquired at one time is there at that time.
    """

    def __init__(
        self,
        near: Buffers,
        courier: Courier,
        traffic: Traffic,
        clock: Callable[[], float] = time.perf_counter,
        lock: threading.RLock | None = None,
    ) -> None:
        """``clock`` in seconds; ``lock`` as below, by default one of its own."""
        self.lock = lock or threading.RLock()
        """Whoever holds it may do what is for the training thread."""
        self._near = near
        self._courier = courier
        self._traffic = traffic
        self._clock = clock
        self._queue: dict[Cell, None] = {}
        """To be prefetched, in this order."""
        self._ahead: dict[Cell, None] = {}
        """Prefetched and not acquired yet, oldest first."""
        self._homeward = Homeward(near, courier, traffic)

    @property
    def failure(self) -> StoreError | None:
        """Of the latest write that failed; what it should have written is still in memory."""
        return self._homeward.failure

    def acquire(self, cell: Cell) -> None:
        """Bring the cell's fields to where they can be computed with; waits for them.

        Raises StoreCorruptError if what comes back is not what was written, and StoreFullError if
        writes have failed and there is no room left; the cell is then as it was.
        """
        if cell.home is Home.DEVICE and cell.near is not None:
            cell.users += 1
            return
        self._queue.pop(cell, None)
        self._ahead.pop(cell, None)
        begin_s = self._clock()
        self._homeward.turn_back(cell)
        if cell.near is None:
            self._make_room(cell.nbytes)
            self._fetch(cell)
        self._arrive(cell)
        self._traffic.waits += 1
        self._traffic.wait_s += self._clock() - begin_s
        cell.users += 1
        self._advance()

    def release(self, cell: Cell, *, dirty: bool) -> None:
        """One user less; after the last one what has changed begins its way home."""
        cell.users -= 1
        if cell.home is Home.DEVICE:
            return
        cell.dirty |= dirty
        if cell.users == 0:
            self._homeward.go(cell)
        self._advance()

    def prefetch(self, cells: Iterable[Cell]) -> None:
        """These are going to be acquired, in this order: bring them as far as there is room."""
        away = (cell for cell in cells if cell.home is not Home.DEVICE)
        self._queue = dict.fromkeys(cell for cell in away if cell.users == 0)
        self._advance()

    def tidy(self) -> None:
        """Take note of writes that have ended; never waits."""
        self._homeward.tidy()

    def flush(self) -> None:
        """Wait until everything is at home; what cannot be written stays in memory."""
        while self._ahead:
            self._drop_ahead()
        self._queue.clear()
        self._homeward.try_again()
        while self._homeward.finish_one():
            pass
        self._courier.rest()

    def stay(self, cell: Cell) -> None:
        """A move to a farther home has failed: the cell is at home on the device again."""
        self._homeward.stay(cell)

    def read(self, cell: Cell) -> dict[str, Tensor]:
        """A copy of the fields, in host memory unless they are on the device anyway.

        Raises StoreCorruptError if what comes back is not what was written.
        """
        return {name: field.clone() for name, field in self.look(cell).items()}

    def look(self, cell: Cell) -> dict[str, Tensor]:
        """The fields where they are, to be read before anything else happens; raises as `read`."""
        if cell.is_blank:
            return cell.zeros()
        self._homeward.wait_for(cell)
        if cell.near is not None:
            self._arrive(cell)
            return cell.layout.views(cell.near)
        if cell.far is not None:
            return cell.layout.views(cell.far)
        lease = cell.lease
        if lease is None:
            raise RuntimeError("a cell has no valid copy")
        target = host_memory(cell.nbytes)
        lease.tier.get(lease.slot, target).wait()
        return cell.layout.views(target)

    def lease(self, cell: Cell) -> Lease | None:
        """What holds the cell's present values on NVMe, now or when it is written."""
        return cell.writing if cell.dirty else cell.lease

    def stored(self, cell: Cell) -> Lease | None:
        """What holds the cell's present values on NVMe for good, if they are there.

        Waits for the cell's own write.
        """
        self._homeward.wait_for(cell)
        return None if cell.dirty else cell.lease

    def move(self, cell: Cell, home: Home) -> None:
        """Give a cell that nobody uses another home; it may be on its way for a while.

        Raises as `acquire`.
        """
        if home == cell.home:
            return
        if cell.is_blank:
            cell.home = home
            return
        if cell.home is not Home.DEVICE:
            self.acquire(cell)  # what goes through the device need not know the way
            cell.users -= 1
            self._courier.forget(cell)
        cell.home = home
        if home is not Home.DEVICE:
            cell.dirty = True
            self._homeward.go(cell)

    def discard(self, cell: Cell) -> None:
        """The cell's values are not needed any more; nobody uses it."""
        self._queue.pop(cell, None)
        self._ahead.pop(cell, None)
        self._homeward.turn_back(cell)
        if cell.near is not None:
            with contextlib.suppress(StoreError):  # nobody wants to know
                self._courier.arrive(cell)
            self._homeward.vacate(cell)
        self._courier.forget(cell)

    def _fetch(self, cell: Cell) -> None:
        """Give the cell memory and begin to fill it."""
        blank = cell.is_blank
        near = self._near.take(cell.nbytes)
        cell.occupy(near)
        if blank:
            near.zero_()
            return
        try:
            self._courier.fetch(cell)
        except StoreError:
            self._homeward.vacate(cell)
            raise

    def _arrive(self, cell: Cell) -> None:
        try:
            self._courier.arrive(cell)
        except StoreError:
            self._homeward.vacate(cell)
            raise

    def _advance(self) -> None:
        """Begin what can begin now: free the memory of what is home, prefetch."""
        self.tidy()
        for cell in list(self._ahead):
            try:
                self._courier.proceed(cell)
            except StoreError:  # `acquire` tries again, and tells
                del self._ahead[cell]
                self._homeward.vacate(cell)
        while self._queue:
            cell = next(iter(self._queue))
            if cell.near is None:
                if not self._near.has_room(cell.nbytes):
                    return
                with contextlib.suppress(StoreError):  # `acquire` tries again, and tells
                    self._fetch(cell)
                    self._ahead[cell] = None
            del self._queue[cell]

    def _make_room(self, nbytes: int) -> None:
        """Wait for writes, give up what was prefetched; raise if failed writes hold the room."""
        tried = False
        while not self._near.has_room(nbytes):
            if self._homeward.give_way() or self._homeward.finish_one():
                continue
            if self._ahead:
                self._drop_ahead()
            elif tried or not self._homeward.try_again():
                break
            else:
                tried = True
        if self._homeward.is_stuck and not self._near.has_room(nbytes):
            raise StoreFullError(
                f"{nbytes} bytes of memory are needed for the next part of the state, and "
                f"{self._near.used_bytes} of {self._near.budget_bytes} are taken by state that "
                f"could not be written: {self.failure}"
            ) from self.failure

    def _drop_ahead(self) -> None:
        """Give up what was prefetched last, which is needed last."""
        cell = next(reversed(self._ahead))
        with contextlib.suppress(StoreError):  # `acquire` tries again, and tells
            self._courier.arrive(cell)
        del self._ahead[cell]
        self._homeward.vacate(cell)
        self._queue = {cell: None, **self._queue}


def acquire_all(door: Door, cells: Iterable[Cell]) -> None:
    """Acquire all of them or, if one cannot be had, none; raises as `Door.acquire`."""
    held: list[Cell] = []
    try:
        for cell in cells:
            door.acquire(cell)
            held.append(cell)
    except BaseException:
        for cell in held:
            door.release(cell, dirty=False)
        raise
