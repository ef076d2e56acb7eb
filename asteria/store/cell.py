"""What moves between tiers as a whole: the fields of one life of neighbouring blocks."""

from __future__ import annotations

import enum
from collections.abc import Mapping

import torch
from torch import Tensor

from asteria.store.lane import Marker
from asteria.store.layout import Layout
from asteria.store.tier import Lease, Transfer

__all__ = ["Cell", "Home"]


class Home(enum.IntEnum):
    """Where a cell is between two uses, from the nearest to the farthest.

    Where processor and host share memory there is no PINNED: DEVICE is that memory.
    """

    DEVICE = 0
    PINNED = 1
    NVME = 2


class Cell:
    """Memory of a layout on up to three tiers. Begins with zeros, which take no memory.

    Only a `Door` and its `Courier` change it, in the training thread.
    """

    def __init__(self, layout: Layout, home: Home = Home.DEVICE) -> None:
        self.layout = layout
        self.home = home
        self.near: Tensor | None = None
        """Memory of the device that computes, (nbytes,) uint8."""
        self.far: Tensor | None = None
        """Pinned host memory; None where the device computes in host memory."""
        self.lease: Lease | None = None
        """What was written to NVMe."""
        self.users = 0
        """Calls of acquire that were not followed by a release."""
        self.dirty = False
        """Whether ``near`` holds what no farther tier has."""
        self.shown = False
        """Whether others may hold views of ``near``, which is then not reused."""
        self.reading: Transfer | None = None
        """From NVMe to host memory."""
        self.moving: Marker | None = None
        """Between host memory and the device."""
        self.uploaded: Marker | None = None
        """The latest upload from ``far``, which the device may not have come to."""
        self.landing: Marker | None = None
        """The latest download to ``far``, which the host must not look at before."""
        self.writing: Lease | None = None
        """From host memory to NVMe."""
        self._windows: dict[tuple[int, int], Mapping[str, Tensor]] = {}

    @property
    def nbytes(self) -> int:
        """Bytes on whatever tier."""
        return self.layout.nbytes

    @property
    def is_blank(self) -> bool:
        """Whether it holds the zeros it began with, on no tier."""
        return self.near is None and self.far is None and self.lease is None

    def window(self, start: int, stop: int) -> Mapping[str, Tensor]:
        """Views of the blocks ``start`` to ``stop`` in ``near``, by name."""
        place = (start, stop)
        if place not in self._windows:
            if self.near is None:
                raise RuntimeError("a cell was used that has not been acquired")
            # Steps that cut the blocks in ever new ways shall not pile up views.
            if len(self._windows) > self.layout.blocks:
                self._windows.clear()
            views = self.layout.views(self.near)
            self._windows[place] = {name: view[start:stop] for name, view in views.items()}
        return self._windows[place]

    def occupy(self, near: Tensor) -> None:
        """``near`` is this cell's memory from now on."""
        self.near = near
        self._windows.clear()

    def vacate(self) -> Tensor:
        """Give up ``near``."""
        near, self.near = self.near, None
        self._windows.clear()
        if near is None:
            raise RuntimeError("a cell was vacated that has no memory")
        return near

    def zeros(self) -> dict[str, Tensor]:
        """The fields it began with, in host memory of their own."""
        return self.layout.views(torch.zeros(self.nbytes, dtype=torch.uint8, device="cpu"))
