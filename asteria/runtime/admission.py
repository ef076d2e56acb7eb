"""Making state for parameters: extents of new blocks, filled with what was saved of them."""

from __future__ import annotations

import itertools
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from asteria.errors import CheckpointError
from asteria.linalg.packed import pack, unpacked
from asteria.runtime.entries import Entries
from asteria.runtime.extents import Extent, ExtentKey, cut_blocks, layouts
from asteria.runtime.records import (
    Fetch,
    ParameterRecord,
    Route,
    Tile,
    TilePlan,
    is_rebuilt,
    state_dtype,
)
from asteria.runtime.residence import Residence
from asteria.runtime.shadows import shadow_shapes
from asteria.runtime.show import show
from asteria.runtime.turning import recoordinated_
from asteria.store.cell import Cell
from asteria.store.distant import Opened
from asteria.store.door import Door
from asteria.store.layout import FieldSpec, Life

__all__ = ["Elsewhere", "Extents", "admit", "check_room", "check_saved", "discard", "nowhere"]

Extents: TypeAlias = dict[ExtentKey, list[Extent]]
"""All extents of one kind, in order of their parameters."""
Elsewhere: TypeAlias = Callable[[ParameterRecord, TilePlan], Fetch | None]
"""How to get at the factors of a tile that another rank keeps; None if they are kept here."""

_COUNTERS = ("step", "version", "lands", "born")
"""How the keys of counters end."""
_MOST_STEPS = 2**24
"""Above it float32, the dtype of torch's step counters, does not count."""


def nowhere(record: ParameterRecord, plan: TilePlan) -> Fetch | None:
    """`Elsewhere` of a process that is alone."""
    return None


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
    route = record.route
    if any(map(is_rebuilt, saved)) or not route.rule.has_bases:
        wanted = route.entry_shapes(record.shape) | _flight_shapes(route, saved)
    else:
        wanted = route.slim_shapes(record.shape)
    for key in sorted(wanted.keys() | saved.keys()):
        if key not in saved:
            yield f"{record.name}: {key} is missing"
        elif key not in wanted:
            yield f"{record.name}: {key} is not part of {record.route.rule.name}'s state"
        else:
            value = saved[key]
            shape = tuple(value.shape) if isinstance(value, Tensor) else ()
            counts = key.endswith(_COUNTERS)
            if not isinstance(value, Tensor | int | float):
                yield f"{record.name}: {key} is {value!r:.60}, needs {_wanted(counts)}"
            elif shape != wanted[key]:
                yield f"{record.name}: {key} has shape {shape}, needs {wanted[key]}"
            elif torch.as_tensor(value).is_complex():
                yield f"{record.name}: {key} is complex, needs {_wanted(counts)}"
            elif counts:
                steps = torch.as_tensor(value)
                if not bool(((steps >= 0) & (steps < _MOST_STEPS)).all()):
                    yield f"{record.name}: {key} is {steps.tolist()}, needs counts of steps"


def _wanted(counts: bool) -> str:
    return "counts of steps" if counts else "a tensor of real numbers"


def _flight_shapes(route: Route, saved: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    """Key and shape of all that tells of refreshes in flight, if any of it is there.

    However many there are: who saved may have had another staleness or period.
    """
    if not any(key.startswith("shadow_") for key in saved):
        return {}
    versions = saved.get("shadow_version")
    places = len(versions) if isinstance(versions, Tensor) and versions.dim() == 2 else 1
    return shadow_shapes(route, places)


def check_room(
    records: Iterable[ParameterRecord], residence: Residence, elsewhere: Elsewhere = nowhere
) -> None:
    """Raise StoreFullError unless there is room for the state of ``records``, if it were alone."""
    kinds = _by_kind(records).items()
    cuts = [_cut(key, places, [], residence.door(key.device), elsewhere) for key, places in kinds]
    residence.check([extent for cut in cuts for extent in cut])


def _by_kind(
    records: Iterable[ParameterRecord],
) -> dict[ExtentKey, list[tuple[ParameterRecord, TilePlan]]]:
    """The tiles of ``records``, in order."""
    kinds: dict[ExtentKey, list[tuple[ParameterRecord, TilePlan]]] = {}
    for record in records:
        for plan in record.route.tiles:
            dtype = state_dtype(record.parameter)
            sharding = record.sharding
            part = sharding.cuts[plan.ordinal] if sharding is not None and sharding.cuts else None
            key = ExtentKey(record.route.rule, plan.shape, dtype, record.device, part)
            kinds.setdefault(key, []).append((record, plan))
    return kinds


def admit(
    records: Iterable[ParameterRecord],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
    extents: Extents,
    residence: Residence,
    elsewhere: Elsewhere = nowhere,
) -> None:
    """Make the state of new ``records`` in ``extents``, by block shape, within the budgets.

    The tiles of a kind are cut into extents in order of the parameters: what is multiplied
    together, and so every bit of the result, depends on which parameters have state and not on when
    they got it. Blocks that were there before move where the cut has changed.

    ``elsewhere`` tells which factors other ranks keep; of records whose whole state another rank
    has only the counters begin. A record in ``saved`` takes its values from there (copied, from any
    dtype and device), the others begin at zero. Raises CheckpointError if something saved does not
    fit and StoreFullError if there is no room, before anything is changed.
    """
    records = list(records)
    here = [record for record in records if record.is_here]
    check_saved({record: saved[record] for record in here if record in saved})
    for record in records:
        _count(record, saved.get(record, {}))
    _change(extents, _by_kind(here), [], saved, residence, elsewhere)
    for record in records:
        record.has_foreign_factors = False


def _count(record: ParameterRecord, saved: Mapping[str, Tensor]) -> None:
    """Begin the counters of a record, or go on with those that were saved of it."""
    record.versions = [0] * len(record.route.tiles)
    if saved:
        record.steps = int(saved["step"])
    if not record.route.rule.has_bases:
        record.begun = bool(saved)
    elif saved and not any(map(is_rebuilt, saved)):
        record.born = record.steps + 1
        record.versions = [record.steps] * len(record.versions)
    elif saved:
        record.born = int(saved["born"])
        record.versions = [int(version) for version in torch.as_tensor(saved["version"]).tolist()]
        record.begun = record.born <= record.steps
    record.counter = array("f", [record.steps if saved else 0])
    step = torch.frombuffer(record.counter, dtype=torch.float32).view(())
    record.entries = Entries({"step": step})  # on the host, as in torch
    if record.route.rule.has_bases:
        # Where the other tensors are, as torch's tools expect.
        for key, count in (("born", record.born), ("version", record.versions)):
            record.entries[key] = torch.tensor(count, dtype=torch.float32, device=record.device)


def discard(
    records: Collection[ParameterRecord],
    extents: Extents,
    residence: Residence,
    elsewhere: Elsewhere = nowhere,
) -> None:
    """Drop the blocks of ``records``; the other blocks move together. ``elsewhere`` as before."""
    _change(extents, {}, records, {}, residence, elsewhere)


def _change(
    extents: Extents,
    arrivals: Mapping[ExtentKey, list[tuple[ParameterRecord, TilePlan]]],
    gone: Collection[ParameterRecord],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
    residence: Residence,
    elsewhere: Elsewhere,
) -> None:
    """Cut the tiles anew and move what has to; nothing has changed if it raises."""
    changed: Extents = {}
    for key in dict.fromkeys([*extents, *arrivals]):
        old = extents.get(key, [])
        kept = [t for extent in old for t in extent.tiles if t.record not in gone]
        if key in arrivals or len(kept) < sum(len(extent.tiles) for extent in old):
            places = [(tile.record, tile.plan) for tile in kept] + arrivals.get(key, [])
            changed[key] = _cut(key, places, old, residence.door(key.device), elsewhere)
    pairs = [(extents.get(key, []), cut) for key, cut in changed.items()]
    try:
        residence.house(_everything({**extents, **changed}))
        for old, new in pairs:
            _fill(old, new, saved)
    except BaseException:
        for old, new in pairs:
            _discard(new, but=old)
        show(_everything(extents), residence.promises)  # some may have moved
        raise
    for old, new in pairs:
        _discard(old, but=new)
    extents.update(changed)
    for key in [key for key, cut in changed.items() if not cut]:
        del extents[key]
    show(_everything(extents), residence.promises)


def _everything(extents: Extents) -> list[Extent]:
    return [extent for cut in extents.values() for extent in cut]


def _cut(
    key: ExtentKey,
    places: list[tuple[ParameterRecord, TilePlan]],
    old: Sequence[Extent],
    door: Door,
    elsewhere: Elsewhere,
) -> list[Extent]:
    """Extents for these tiles; an old one where it has the same tiles."""
    places.sort(key=lambda place: place[0].index)  # stable: tiles of a parameter keep their order
    same = {tuple((t.record, t.plan.ordinal) for t in extent.tiles): extent for extent in old}
    result = []
    for group in cut_blocks([(place, place[1].blocks) for place in places], key.most_blocks):
        extent = same.get(tuple((record, plan.ordinal) for record, plan in group))
        if extent is None:
            stops = list(itertools.accumulate(plan.blocks for _, plan in group))
            tiles = [
                Tile(record, plan, stop - plan.blocks, stop, elsewhere(record, plan))
                for (record, plan), stop in zip(group, stops, strict=True)
            ]
            kept = sum(tile.plan.blocks for tile in tiles if tile.kept)
            lives = layouts(key.rule, key.shape, stops[-1], key.dtype, kept)
            cells = {life: Cell(layout) for life, layout in lives.items()}
            extent = Extent(key, tiles, door, cells)
        result.append(extent)
    return result


def _discard(extents: Iterable[Extent], but: Sequence[Extent]) -> None:
    for extent in extents:
        if extent not in but:
            extent.discard()


def _fill(
    old: Sequence[Extent],
    new: Sequence[Extent],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
) -> None:
    """Fill new extents from the old ones and from what was saved."""
    sources = {
        (tile.record, tile.plan.ordinal): (extent, tile) for extent in old for tile in extent.tiles
    }
    for extent in old:
        if extent not in new:
            extent.settle()
    for extent in new:
        if extent in old:
            continue
        for life, cell in extent.cells.items():
            kept = {t: sources.get((t.record, t.plan.ordinal)) for t in extent.tiles}
            if any(kept.values()) or any(t.record in saved for t in extent.tiles):
                _fill_cell(life, cell, extent, kept, saved)


def _fill_cell(
    life: Life,
    cell: Cell,
    extent: Extent,
    kept: Mapping[Tile, tuple[Extent, Tile] | None],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
) -> None:
    """Fill one cell from those that its tiles were in, and from what was saved."""
    door = extent.door
    source: Cell | None = None
    record, opened = None, Opened({})
    door.acquire(cell)
    try:
        for tile, place in kept.items():
            if life is Life.SUM and not tile.kept:
                continue
            values = cell.window(*extent.place(tile.start, tile.stop, life))
            if place is not None:
                old, old_tile = place
                # Neighbours have mostly been neighbours before.
                if old.cells[life] is not source:
                    if source is not None:
                        door.release(source, dirty=False)
                        source = None
                    door.acquire(old.cells[life])
                    source = old.cells[life]
                given = source.window(*old.place(old_tile.start, old_tile.stop, life))
                for name, value in values.items():
                    value.copy_(given[name])
            elif tile.record in saved:
                if tile.record is not record:
                    record, opened = tile.record, Opened(saved[tile.record])
                _load(opened, values, tile)
                if life is Life.SUM and record.has_foreign_factors:
                    _convert(opened, values, tile)
    finally:
        if source is not None:
            door.release(source, dirty=False)
        door.release(cell, dirty=True)


def _load(saved: Opened, values: Mapping[str, Tensor], tile: Tile) -> None:
    """The blocks of one tile from what was saved of its parameter; what was not stays zero."""
    suffix, _, _ = tile.record.route.place_of(tile.plan)
    for spec in tile.record.route.rule.fields(tile.plan.shape):
        if spec.name in values and spec.name + suffix in saved:
            part = _given(saved, spec, tile)
            values[spec.name].copy_(part if spec.half_of is None else pack(part))


def _given(saved: Opened, spec: FieldSpec, tile: Tile) -> Tensor:
    """The blocks of one tile of one field, as state dicts show them."""
    suffix, first, blocks = tile.record.route.place_of(tile.plan)
    given = saved[spec.name + suffix].reshape(blocks, *spec.shown_shape)
    return given[first : first + tile.plan.blocks]


def _convert(saved: Opened, factors: Mapping[str, Tensor], tile: Tile) -> None:
    """Give factors that were loaded in the coordinates of this run, by the bases saved with them.

    A slim state has neither.
    """
    suffix, rule = tile.record.route.place_of(tile.plan)[0], tile.record.route.rule
    given = {
        spec.name: _given(saved, spec, tile)
        for spec in rule.fields(tile.plan.shape)
        if spec.life is Life.BASIS and spec.name + suffix in saved
    }
    if given:
        whole = {name: unpacked(factor) for name, factor in factors.items()}
        recoordinated_(whole, given, in_bases=rule.in_bases)
        for name, factor in factors.items():
            if factor is not whole[name]:
                factor.copy_(pack(whole[name]))
