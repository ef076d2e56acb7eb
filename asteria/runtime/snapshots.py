"""What a refresh starts from: factors and bases as they were when it was launched."""

from __future__ import annotations

import threading
from collections.abc import Mapping

from torch import Tensor

from asteria.runtime.extents import Extent
from asteria.runtime.records import Tile
from asteria.runtime.transfer import Link, Snapshot, TierLink
from asteria.store.buffers import host_memory
from asteria.store.cell import Cell, Home
from asteria.store.layout import Layout, Life
from asteria.store.tier import Lease

__all__ = ["Snapshots", "take_snapshots", "way_back"]

Snapshots = list[tuple[Snapshot, Snapshot] | None]
"""(factor as it is stored, basis) of every mode, None where there is none."""


class _Stored:
    """A cell on NVMe, which is read once for all fields of a tile. For one worker at a time."""

    def __init__(self, lease: Lease, layout: Layout, fields: int) -> None:
        self._lease = lease
        self._layout = layout
        self._wanted = fields
        self._fields = fields
        self._views: Mapping[str, Tensor] | None = None
        self._lock = threading.Lock()

    def _read(self) -> Tensor:
        memory = host_memory(self._layout.nbytes)
        self._lease.tier.get(self._lease.slot, memory).wait()
        return memory

    def field(self, name: str, start: int, stop: int) -> Tensor:
        with self._lock:
            if self._views is None:
                self._views = self._layout.views(self._read())
            views = self._views
            self._wanted -= 1
            if self._wanted == 0:
                # Whoever holds a field holds the memory; a repeated job reads again.
                self._views, self._wanted = None, self._fields
        return views[name][start:stop]


class _StoredSnapshot:
    def __init__(self, stored: _Stored, name: str, place: tuple[int, int]) -> None:
        self._stored = stored
        self._name = name
        self._place = place

    def on_host(self) -> Tensor:
        return self._stored.field(self._name, *self._place)


def take_snapshots(extent: Extent, tile: Tile, link: Link, *, copy_bases: bool) -> Snapshots:
    """Snapshots of a tile's factors and bases, of now; never waits.

    ``copy_bases`` where the bases in use may be replaced before the work is done. What has its
    home on NVMe is not copied: what is written there is never changed. Where the host computes, the
    cells are released; an accelerator copies from what is acquired.
    """
    sources: dict[Life, _Stored | None] = {
        life: _source(extent.cells[life], extent, link)
        for life in (Life.SUM, Life.BASIS)
        if life in extent.cells
    }

    def snapshot(life: Life, name: str, *, copy: bool) -> Snapshot:
        stored, place = sources[life], extent.place(tile.start, tile.stop, life)
        if stored is not None:
            return _StoredSnapshot(stored, name, place)
        cell = extent.cells[life]
        field = cell.window(*place)[name]
        # What is on its way home is reused then; what is at home may be sent away.
        cell.shown |= not copy
        return link.snapshot(field, copy=copy or cell.home is not Home.DEVICE)

    return [
        (
            snapshot(Life.SUM, f"factor_{mode}", copy=True),
            snapshot(Life.BASIS, f"basis_{mode}", copy=copy_bases),
        )
        if factored
        else None
        for mode, factored in enumerate(extent.shape.factored)
    ]


def _source(cell: Cell, extent: Extent, link: Link) -> _Stored | None:
    """Where the cell lies on NVMe, if it is to be read from there."""
    if cell.home is Home.DEVICE or link.travels:
        return None
    lease = extent.door.lease(cell)
    if lease is None:
        return None  # it could not be written, and is still in memory
    return _Stored(lease, cell.layout, sum(extent.shape.factored))


def way_back(extent: Extent, link: Link) -> Link:
    """The link that results take: where the bases live on NVMe, results wait there."""
    cell = extent.cells[Life.BASIS]
    if link.travels or cell.home is Home.DEVICE:
        return link
    lease = extent.door.lease(cell)
    return link if lease is None else TierLink(lease.tier)
