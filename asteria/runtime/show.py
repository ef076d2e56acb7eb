"""Pointing what the optimizer shows as state at where the state is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from asteria.linalg.packed import unpack
from asteria.runtime.extents import Extent
from asteria.runtime.halves import UnpackedSource
from asteria.runtime.promises import Promises
from asteria.runtime.records import ParameterRecord, Tile
from asteria.runtime.scattered import Scattered
from asteria.store.cell import Home
from asteria.store.distant import Source
from asteria.store.layout import FieldSpec, Life
from asteria.store.sources import JoinedSource, ZeroSource

__all__ = ["show"]


class _Part(NamedTuple):
    """Neighbouring blocks of one parameter in one extent."""

    extent: Extent
    tiles: list[Tile]

    @property
    def start(self) -> int:
        return self.tiles[0].start

    @property
    def stop(self) -> int:
        return self.tiles[-1].stop


def show(extents: Iterable[Extent], promises: Promises | None = None) -> None:
    """Let the entries of all records show their blocks; ``extents`` are all that there are.

    What is at home on the device in one piece is a view; the rest is read when asked for, and
    shown in state dicts by ``promises``.
    """
    promises = promises or Promises()
    parts: dict[ParameterRecord, dict[str, list[_Part]]] = {}
    for extent in extents:
        for tile in extent.tiles:
            suffix, _, _ = tile.record.route.place_of(tile.plan)
            mine = parts.setdefault(tile.record, {}).setdefault(suffix, [])
            if mine and mine[-1].extent is extent and mine[-1].stop == tile.start:
                mine[-1].tiles.append(tile)
            else:
                mine.append(_Part(extent, [tile]))
    for record, by_suffix in parts.items():
        shapes = record.route.entry_shapes(record.shape)
        for suffix, mine in by_suffix.items():
            tiles = [(part.extent, tile) for part in mine for tile in part.tiles]
            scattered = not all(tile.kept for _, tile in tiles)
            for spec in mine[0].extent.rule.fields(mine[0].extent.shape):
                key, shape = spec.name + suffix, shapes[spec.name + suffix]
                if scattered and spec.life is Life.SUM:
                    factor = Scattered(spec.name, tiles, shape)
                    record.entries.put_away(key, factor.read, factor.promise)
                else:
                    _show(record, (spec, suffix), mine, shape, promises)
        record.shown = tuple(
            (key, None if record.entries.is_away(key) else record.entries[key]) for key in shapes
        )


def _show(
    record: ParameterRecord,
    key: tuple[FieldSpec, str],
    parts: list[_Part],
    shape: tuple[int, ...],
    promises: Promises,
) -> None:
    spec, suffix = key
    life = spec.life
    cell = parts[0].extent.cells[life]
    if len(parts) > 1 or cell.home is not Home.DEVICE or spec.half_of is not None:
        elsewhere = _Elsewhere(spec, parts, shape, promises)
        record.entries.put_away(spec.name + suffix, elsewhere.read, elsewhere.promise)
        return
    if cell.near is None:
        parts[0].extent.acquire([life])
        parts[0].extent.release([life], dirty=[])
    cell.shown = True
    place = parts[0].extent.place(parts[0].start, parts[0].stop, life)
    record.entries[spec.name + suffix] = cell.window(*place)[spec.name].view(shape)


class _Elsewhere:
    """One tensor whose blocks are not a view: where they are, and how to get them."""

    def __init__(
        self, spec: FieldSpec, parts: list[_Part], shape: tuple[int, ...], promises: Promises
    ) -> None:
        self._name, self._life = spec.name, spec.life
        self._is_half = spec.half_of is not None
        self._parts = parts
        self._shape = shape
        self._promises = promises
        self._lock = parts[0].extent.door.lock

    def read(self) -> Tensor:
        """The values of now, in memory of their own."""
        stored = self._read()
        return (unpack(stored) if self._is_half else stored).reshape(self._shape)

    def _read(self) -> Tensor:
        """The values of now as they are stored, (blocks, *shape), in memory of their own."""
        values = []
        with self._lock:
            for part in self._settled():
                fields = part.extent.door.look(part.extent.cells[self._life])
                start, stop = part.extent.place(part.start, part.stop, self._life)
                values.append(fields[self._name][start:stop].to(self._device))
        # In memory of its own: who saves a view saves all that it is a view of.
        return values[0].clone() if len(values) == 1 else torch.cat(values)

    def promise(self) -> Tensor:
        """A tensor that reads the values of now when they are needed."""
        with self._lock:
            return self._promised()

    def _promised(self) -> Tensor:
        promises = self._promises
        dtype = self._parts[0].extent.cells[self._life].layout.dtype_of(self._name)
        sources: list[Source] = []
        for part in self._settled():
            cell = part.extent.cells[self._life]
            lease = part.extent.door.stored(cell)
            shape = (part.stop - part.start, *cell.layout.field(self._name).shown_shape)
            if lease is not None:
                place = part.extent.place(part.start, part.stop, self._life)
                stored = promises.field(lease, cell.layout, self._name, *place)
                sources.append(UnpackedSource(stored, shape) if self._is_half else stored)
            elif cell.is_blank:
                sources.append(ZeroSource(shape, dtype))
            elif self._is_half:
                given = self._shape, dtype, self._device
                return promises.borrowed(self._read, *given, halves=True)
            else:
                return promises.borrowed(self.read, self._shape, dtype, self._device)
        return promises.stored(JoinedSource(sources, self._shape), self._shape, dtype)

    @property
    def _device(self) -> torch.device:
        """Where whoever asks gets them."""
        cells = [part.extent.cells[self._life] for part in self._parts]
        near = all(cell.home is Home.DEVICE for cell in cells)
        return self._parts[0].extent.device if near else torch.device("cpu")

    def _settled(self) -> list[_Part]:
        if self._life is Life.SUM:
            for part in self._parts:
                part.extent.settle()
        return self._parts
