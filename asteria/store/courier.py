"""The way of one cell between its home and the memory of the device that computes."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from asteria.errors import StoreError
from asteria.store.buffers import Buffers
from asteria.store.cell import Cell, Home
from asteria.store.lane import Lane, Marker
from asteria.store.tier import Lease, Tier
from asteria.telemetry.counters import Traffic

__all__ = ["Courier", "DeviceCourier", "HostCourier", "OpenTier"]

OpenTier = Callable[[], Tier]
"""Gives the NVMe tier, which is opened when it is first needed."""


class Courier(Protocol):
    """Moves cells; never waits but where it says so. For the training thread."""

    def fetch(self, cell: Cell) -> None:
        """Begin to fill ``cell.near`` from the cell's home."""

    def proceed(self, cell: Cell) -> None:
        """Go on with what `fetch` has begun, as far as nothing has to be waited for.

        Raises StoreError if the read has failed.
        """

    def arrive(self, cell: Cell) -> None:
        """What the device computes next may use ``cell.near``; waits for the disk.

        Raises StoreError if the read has failed.
        """

    def send(self, cell: Cell) -> None:
        """Begin to write ``cell.near`` home. Raises StoreError if that cannot even begin."""

    def sent(self, cell: Cell, *, wait: bool) -> bool:
        """Whether it is home, so that ``near`` may be reused; with ``wait`` it is.

        Raises StoreError if the write has failed: what was at home before is still there.
        """

    def give_way(self, cell: Cell) -> bool:
        """Whether the device itself sees to it that ``near`` is home before it is reused.

        Then it may be reused at once; nobody waits.
        """

    def settle(self, cell: Cell) -> None:
        """Wait until the host may look at what is at home."""

    def leave(self, cell: Cell) -> None:
        """``near`` is going to be reused: free what was taken beside it."""

    def forget(self, cell: Cell) -> None:
        """Free all that lies at the cell's home; nothing is on its way."""

    def rest(self) -> None:
        """Free what copies that the device has yet to come to were made from; waits for it."""


class HostCourier:
    """For a device that computes in host memory: one way, to NVMe and back, without a copy."""

    def __init__(self, tier: OpenTier, traffic: Traffic) -> None:
        self._tier = tier
        self._traffic = traffic

    def fetch(self, cell: Cell) -> None:
        """See `Courier`."""
        lease, near = cell.lease, cell.near
        if lease is None or near is None:
            raise RuntimeError("a cell was fetched that has no home or no memory")
        cell.reading = lease.tier.get(lease.slot, near)
        self._traffic.read_bytes += cell.nbytes

    def proceed(self, cell: Cell) -> None:
        """See `Courier`. There is only one way."""

    def arrive(self, cell: Cell) -> None:
        """See `Courier`."""
        _finish_reading(cell)

    def send(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.near is None:
            raise RuntimeError("a cell was sent that has no memory")
        tier = self._tier()
        cell.writing = Lease(tier, tier.put(cell.near))
        self._traffic.written_bytes += cell.nbytes

    def sent(self, cell: Cell, *, wait: bool) -> bool:
        """See `Courier`."""
        return _written(cell, wait=wait)

    def give_way(self, cell: Cell) -> bool:
        """See `Courier`. The disk is the host's."""
        return False

    def settle(self, cell: Cell) -> None:
        """See `Courier`."""

    def leave(self, cell: Cell) -> None:
        """See `Courier`."""

    def forget(self, cell: Cell) -> None:
        """See `Courier`."""
        cell.lease = None

    def rest(self) -> None:
        """See `Courier`."""


class DeviceCourier:
    """For an accelerator: through pinned host memory, where cells stay or go on to NVMe."""

    def __init__(self, lane: Lane, host: Buffers, tier: OpenTier, traffic: Traffic) -> None:
        self._traffic = traffic
        self._lane = lane
        self._host = host
        self._tier = tier
        self._parked: deque[tuple[Marker, Tensor]] = deque()
        """Host memory whose upload the device may not have come to."""

    def fetch(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.far is not None:
            self._upload(cell, cell.far)
            return
        lease = cell.lease
        if lease is None:
            raise RuntimeError("a cell was fetched that has no home")
        cell.far = self._take(cell.nbytes)
        cell.reading = lease.tier.get(lease.slot, cell.far)
        self._traffic.read_bytes += cell.nbytes

    def _upload(self, cell: Cell, far: Tensor) -> None:
        if cell.near is None:
            raise RuntimeError("a cell was fetched that has no memory")
        cell.moving = self._lane.upload(far, cell.near)
        cell.landing = None  # it comes before, on the device
        self._traffic.uploaded_bytes += cell.nbytes

    def proceed(self, cell: Cell) -> None:
        """See `Courier`. From the disk on to the device."""
        if cell.reading is not None and cell.reading.done:
            self._read_and_upload(cell)

    def _read_and_upload(self, cell: Cell) -> None:
        if _finish_reading(cell) and cell.far is not None:
            self._upload(cell, cell.far)

    def arrive(self, cell: Cell) -> None:
        """See `Courier`."""
        self._read_and_upload(cell)
        if cell.moving is not None:
            self._lane.use(cell.moving)
            cell.uploaded = cell.moving
            if cell.home is Home.NVME and cell.far is not None and cell.writing is None:
                self._parked.append((cell.moving, cell.far))
                cell.far = None
            cell.moving = None

    def send(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.near is None:
            raise RuntimeError("a cell was sent that has no memory")
        if cell.far is None:
            cell.far = self._take(cell.nbytes)
        cell.moving = self._lane.download(cell.near, cell.far)
        cell.uploaded = cell.landing = None  # they come before, on the device
        self._traffic.downloaded_bytes += cell.nbytes

    def sent(self, cell: Cell, *, wait: bool) -> bool:
        """See `Courier`."""
        if cell.moving is not None:
            if wait:
                cell.moving.synchronize()
            elif not cell.moving.query():
                return False
            cell.moving = None
            if cell.home is Home.NVME and cell.far is not None:
                tier = self._tier()
                cell.writing = Lease(tier, tier.put(cell.far))
                self._traffic.written_bytes += cell.nbytes
        if cell.home is not Home.NVME:
            cell.lease = None
            return True
        if not _written(cell, wait=wait):
            return False
        if cell.far is not None:
            self._host.give(cell.far)
            cell.far = None
        return True

    def give_way(self, cell: Cell) -> bool:
        """See `Courier`. What goes on to the disk is the host's business."""
        if cell.home is not Home.PINNED or cell.moving is None:
            return False
        self._lane.give_way(cell.moving)
        cell.landing, cell.moving, cell.lease = cell.moving, None, None
        return True

    def settle(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.landing is not None:
            cell.landing.synchronize()
            cell.landing = None

    def leave(self, cell: Cell) -> None:
        """See `Courier`."""
        if cell.home is Home.NVME and cell.far is not None:
            self._host.give(cell.far)
            cell.far = None

    def forget(self, cell: Cell) -> None:
        """See `Courier`."""
        cell.lease = None
        if cell.far is not None:
            under_way = cell.uploaded or cell.landing
            if under_way is not None:
                self._parked.append((under_way, cell.far))
            else:
                self._host.give(cell.far)
            cell.far = cell.landing = None

    def rest(self) -> None:
        """See `Courier`."""
        while self._parked:
            marker, buffer = self._parked.popleft()
            marker.synchronize()
            self._host.give(buffer)

    def _take(self, nbytes: int) -> Tensor:
        while self._parked and (self._parked[0][0].query() or not self._host.has_room(nbytes)):
            marker, buffer = self._parked.popleft()
            marker.synchronize()
            self._host.give(buffer)
        return self._host.take(nbytes)


def _finish_reading(cell: Cell) -> bool:
    """Wait for the read under way; False if there is none.

    An interrupt leaves it under way: nobody must take the memory for filled, or for free.
    """
    if cell.reading is None:
        return False
    try:
        cell.reading.wait()
    except StoreError:
        cell.reading = None
        raise
    cell.reading = None
    return True


def _written(cell: Cell, *, wait: bool) -> bool:
    """Whether the write under way has ended; what it wrote takes the place of what was there."""
    writing = cell.writing
    if writing is None:
        return True
    if not (wait or writing.slot.done):
        return False
    try:
        writing.slot.wait()
    except StoreError:
        cell.writing = None
        raise
    cell.writing = None
    cell.lease = writing
    return True
