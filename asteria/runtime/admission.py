"""Making state for parameters: stacks for new blocks, filled with what was saved of them."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from asteria.errors import CheckpointError
from asteria.runtime.records import (
    Extent,
    ExtentKey,
    ParameterRecord,
    Tile,
    TilePlan,
    state_dtype,
)
from asteria.runtime.shadows import shadow_shapes
from asteria.store.stack import Stack

__all__ = ["admit", "check_saved", "discard"]

_COUNTERS = ("step", "version", "lands")
_MOST_STEPS = 2**24
"""Above it float32, the dtype of torch's step counters, does not count."""


def check_saved(
    saved: Mapping[ParameterRecord, Mapping[str, object]], problems: Iterable[str] = ()
) -> None:
    """Check that every saved state is one of its parameter.

    Raises CheckpointError that lists ``problems`` and all others: keys that are missing, unknown
    or of another shape.
    """
    found = [*problems, *(line for record in saved for line in _complaints(record, saved[record]))]
    if found:
        raise CheckpointError(
            "this state does not belong to these parameters; nothing was loaded:\n  "
            + "\n  ".join(found)
        )


def _complaints(record: ParameterRecord, saved: Mapping[str, object]) -> Iterator[str]:
    wanted = record.route.entry_shapes(record.shape) | shadow_shapes(record.route, saved)
    for key in sorted(wanted.keys() | saved.keys()):
        if key not in saved:
            yield f"{record.name}: {key} is missing"
        elif key not in wanted:
            yield f"{record.name}: {key} is not part of {record.route.rule.name}'s state"
        else:
            value = saved[key]
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            if shape != wanted[key]:
                yield f"{record.name}: {key} has shape {shape}, needs {wanted[key]}"
            elif key.endswith(_COUNTERS):
                counts = torch.as_tensor(value)
                if not bool(((counts >= 0) & (counts < _MOST_STEPS)).all()):
                    yield f"{record.name}: {key} is {counts.tolist()}, needs counts of steps"


def admit(
    records: Iterable[ParameterRecord],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
    extents: dict[ExtentKey, Extent],
) -> None:
    """Allocate the state of new ``records`` in ``extents``, stacked by block shape.

    There is one extent for each kind of block, its tiles in order of the parameters: what is
    multiplied together, and so every bit of the result, depends on which parameters have state
    and not on when they got it. Blocks that were there before move into the larger stack.

    A record in ``saved`` takes its values from there (copied, from any dtype and device), the
    others begin at zero. Raises CheckpointError, before anything is changed, if something saved
    does not fit.
    """
    records = list(records)
    check_saved(saved)
    arrivals: dict[ExtentKey, list[tuple[ParameterRecord, TilePlan]]] = {}
    for record in records:
        shapes = record.route.entry_shapes(record.shape)
        record.entries = {
            key: torch.zeros(shapes[key], dtype=torch.float32, device="cpu")
            for key in ("step", "version")
            if key in shapes
        }
        record.versions = [0] * len(record.route.tiles)
        for plan in record.route.tiles:
            key = ExtentKey(
                record.route.rule, plan.shape, state_dtype(record.parameter), record.device
            )
            arrivals.setdefault(key, []).append((record, plan))
    for key, tiles in arrivals.items():
        extents[key] = _restack(key, tiles, extents.get(key))
    for record in records:
        if record in saved:
            for key_name, entry in record.entries.items():
                entry.copy_(torch.as_tensor(saved[record][key_name]))
            record.steps = int(record.entries["step"])
            if record.route.rule.has_bases:
                record.versions = [int(version) for version in record.entries["version"].tolist()]
            record.begun = True


def discard(records: Collection[ParameterRecord], extents: dict[ExtentKey, Extent]) -> None:
    """Drop the blocks of ``records``; the other blocks of their stacks move together."""
    for key, extent in list(extents.items()):
        kept = [tile for tile in extent.tiles if tile.record not in records]
        if not kept:
            del extents[key]
        elif len(kept) < len(extent.tiles):
            extent.tiles = kept
            extents[key] = _restack(key, [], extent)


def _restack(
    key: ExtentKey, arrivals: list[tuple[ParameterRecord, TilePlan]], old: Extent | None
) -> Extent:
    """A new extent of the old tiles, with their values, and the arrivals; sets the entries."""
    places: list[tuple[ParameterRecord, TilePlan, Mapping[str, Tensor]]] = [
        (record, plan, {}) for record, plan in arrivals
    ]
    if old is not None:
        places += [
            (tile.record, tile.plan, old.stack.window(tile.start, tile.stop)) for tile in old.tiles
        ]
    places.sort(key=lambda place: place[0].index)  # stable: tiles of a parameter keep their order
    blocks = sum(plan.blocks for _, plan, _ in places)
    stack = Stack(key.rule.fields(key.shape), blocks, key.dtype, key.device)
    extent = Extent(key.rule, key.shape, stack)
    start = 0
    for record, plan, values in places:
        tile = Tile(record, plan, start, start + plan.blocks)
        extent.tiles.append(tile)
        for name, value in values.items():
            stack.fields[name][tile.start : tile.stop].copy_(value)
        start = tile.stop
    for record, tiles in itertools.groupby(extent.tiles, key=lambda tile: tile.record):
        _show(record, extent, list(tiles))
    return extent


def _show(record: ParameterRecord, extent: Extent, tiles: list[Tile]) -> None:
    """Point the record's entries at its blocks of this extent."""
    shapes = record.route.entry_shapes(record.shape)
    suffix = next(suffix for suffix, shape, _ in record.route.extents() if shape == extent.shape)
    for name, view in extent.stack.window(tiles[0].start, tiles[-1].stop).items():
        record.entries[name + suffix] = view.view(shapes[name + suffix])
    record.shown = tuple((key, record.entries[key]) for key in shapes if key in record.entries)
