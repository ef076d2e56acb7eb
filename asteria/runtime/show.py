"""Pointing what the optimizer shows as state at where the state is."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from asteria.runtime.extents import Extent
from asteria.runtime.records import ParameterRecord
from asteria.store.cell import Home
from asteria.store.layout import Life

__all__ = ["show"]


class _Part(NamedTuple):
    """Neighbouring blocks of one parameter in one extent."""

    extent: Extent
    start: int
    stop: int


def show(extents: Iterable[Extent]) -> None:
    """Let the entries of all records show their blocks; ``extents`` are all that there are.

    What is at home on the device in one piece is a view; the rest is read when asked for.
    """
    parts: dict[ParameterRecord, dict[str, list[_Part]]] = {}
    for extent in extents:
        for tile in extent.tiles:
            suffix, _, _ = tile.record.route.place_of(tile.plan)
            mine = parts.setdefault(tile.record, {}).setdefault(suffix, [])
            if mine and mine[-1].extent is extent and mine[-1].stop == tile.start:
                mine[-1] = mine[-1]._replace(stop=tile.stop)
            else:
                mine.append(_Part(extent, tile.start, tile.stop))
    for record, by_suffix in parts.items():
        shapes = record.route.entry_shapes(record.shape)
        for suffix, mine in by_suffix.items():
            for life, cell in mine[0].extent.cells.items():
                for spec in cell.layout.fields:
                    _show(record, spec.name, suffix, mine, life, shapes[spec.name + suffix])
        record.shown = tuple(
            (key, None if record.entries.is_away(key) else record.entries[key]) for key in shapes
        )


def _show(
    record: ParameterRecord,
    name: str,
    suffix: str,
    parts: list[_Part],
    life: Life,
    shape: tuple[int, ...],
) -> None:
    cell = parts[0].extent.cells[life]
    if len(parts) > 1 or cell.home is not Home.DEVICE:
        record.entries.put_away(name + suffix, _reader(name, parts, life, shape))
        return
    if cell.near is None:
        parts[0].extent.acquire([life])
        parts[0].extent.release([life], dirty=[])
    cell.shown = True
    record.entries[name + suffix] = cell.window(parts[0].start, parts[0].stop)[name].view(shape)


def _reader(
    name: str, parts: list[_Part], life: Life, shape: tuple[int, ...]
) -> Callable[[], Tensor]:
    def read() -> Tensor:
        values = []
        for extent, start, stop in parts:
            if life is Life.SUM:
                extent.settle()
            values.append(extent.door.read(extent.cells[life])[name][start:stop])
        # In memory of its own: who saves a view saves all that it is a view of.
        return (values[0].clone() if len(values) == 1 else torch.cat(values)).reshape(shape)

    return read
