"""A door with stand-ins behind it, and cells to bring through."""

from typing import Any

import torch
from torch import Tensor

from asteria.store.buffers import Buffers, host_memory
from asteria.store.cell import Cell, Home
from asteria.store.courier import Courier, DeviceCourier, HostCourier
from asteria.store.door import Door
from asteria.store.layout import FieldSpec, Layout
from asteria.store.unified import UnifiedCourier
from asteria.telemetry.counters import Traffic
from tests.support.tiers import CheckedLane, CheckedTier

CELL_BYTES = 64
HOMES = [Home.DEVICE, Home.PINNED, Home.NVME]


class Place:
    """A door, and everything behind it.

    Without a ``lane`` the device computes in host memory; ``unified``: in its own order.
    """

    def __init__(
        self,
        budget_bytes: int | None = None,
        *,
        lane: CheckedLane | None = None,
        host_bytes: int | None = None,
        tier: Any = None,
        unified: bool = False,
    ) -> None:
        self.tier = CheckedTier() if tier is None else tier
        self.traffic = Traffic()
        self.near = Buffers(host_memory, budget_bytes)
        self.host = Buffers(host_memory, host_bytes)
        self.lane = lane
        courier: Courier
        if unified:
            marks = CheckedLane()
            courier = UnifiedCourier(
                lambda: marks, lambda: self.tier, self.traffic, face=lambda near: near
            )
        elif lane is None:
            courier = HostCourier(lambda: self.tier, self.traffic)
        else:
            courier = DeviceCourier(lane, self.host, lambda: self.tier, self.traffic)
        self.door = Door(self.near, courier, self.traffic)

    def cell(self, home: Home = Home.NVME, value: float | None = None) -> Cell:
        """A new one, at home; with a ``value`` it was written with that."""
        cell = Cell(Layout([FieldSpec("x", (4, 4))], 1, torch.float32), home)
        if value is not None:
            self.fill(cell, value)
            self.door.flush()
        return cell

    def fill(self, cell: Cell, value: float) -> None:
        """Use the cell once and write to it."""
        self.door.acquire(cell)
        near_of(cell).fill_(value)
        self.door.release(cell, dirty=True)

    def look(self, cell: Cell) -> float:
        """Use the cell once and change nothing; nan if its values are not all the same."""
        self.door.acquire(cell)
        found = value_of(near_of(cell))
        self.door.release(cell, dirty=False)
        return found

    def read(self, cell: Cell) -> float:
        """What `Door.read` gives."""
        return value_of(self.door.read(cell)["x"])


def near_of(cell: Cell) -> Tensor:
    return cell.window(0, 1)["x"]


def value_of(tensor: Tensor) -> float:
    first = float(tensor.flatten()[0])
    return first if bool((tensor == first).all()) else float("nan")
