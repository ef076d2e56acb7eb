"""Who steps which sharded parameters. Pure functions of shapes and settings.

A parameter is stepped as a whole, by one rank of its mesh. The bits of a batched product depend on
what is in the batch, so parameters whose blocks share an extent where one process has everything
have the same owner: then the products are the same, whatever the number of ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from asteria.distributed.ownership import Load, assign
from asteria.runtime.extents import ExtentKey, cut_blocks
from asteria.runtime.records import ParameterRecord, state_dtype

__all__ = ["Place", "places"]


class Place(NamedTuple):
    """Where a parameter is stepped."""

    owner: int
    """Position in its mesh."""
    cuts: tuple[tuple[int, int], ...]
    """Of each tile: the extent it is in, by that one's first parameter and tile."""


def places(records: Iterable[ParameterRecord]) -> dict[ParameterRecord, Place]:
    """The place of each of ``records``, which are all sharded ones that are stepped as a whole.

    Work and bytes are balanced over the ranks of each mesh, its replicas included, so that
    everything is computed and kept once.
    """
    meshes: dict[tuple[int, ...], list[ParameterRecord]] = {}
    for record in sorted(records, key=lambda record: record.index):
        meshes.setdefault(record.as_sharded.layout.ranks, []).append(record)
    found: dict[ParameterRecord, Place] = {}
    for ranks, members in meshes.items():
        cuts = _extents(members)
        bundles = _bundles(members, cuts)
        owners = assign([_load(bundle) for bundle in bundles], len(ranks))
        for bundle, owner in zip(bundles, owners, strict=True):
            for record in bundle:
                found[record] = Place(owner, tuple(cuts[record]))
    return found


def _extents(records: Sequence[ParameterRecord]) -> dict[ParameterRecord, list[tuple[int, int]]]:
    """For each tile of each record the extent that it would be in."""
    kinds: dict[ExtentKey, list[tuple[tuple[ParameterRecord, int], int]]] = {}
    for record in records:
        for plan in record.route.tiles:
            dtype = state_dtype(record.parameter)
            key = ExtentKey(record.route.rule, plan.shape, dtype, record.device)
            kinds.setdefault(key, []).append(((record, plan.ordinal), plan.blocks))
    found = {record: [(0, 0)] * len(record.route.tiles) for record in records}
    for key, parts in kinds.items():
        for extent in cut_blocks(parts, key.most_blocks):
            first, ordinal = extent[0]
            for record, tile in extent:
                found[record][tile] = first.index, ordinal
    return found


def _bundles(
    records: Sequence[ParameterRecord], cuts: dict[ParameterRecord, list[tuple[int, int]]]
) -> list[list[ParameterRecord]]:
    """Records that share extents, directly or through others; in order of their first."""
    leader: dict[ParameterRecord, ParameterRecord] = {record: record for record in records}

    def lead(record: ParameterRecord) -> ParameterRecord:
        while leader[record] is not record:
            record = leader[record]
        return record

    first: dict[tuple[int, int], ParameterRecord] = {}
    for record in records:
        for cut in cuts[record]:
            other = lead(first.setdefault(cut, record))
            mine = lead(record)
            early, late = sorted((other, mine), key=lambda record: record.index)
            leader[late] = early
    found: dict[ParameterRecord, list[ParameterRecord]] = {}
    for record in records:
        found.setdefault(lead(record), []).append(record)
    return list(found.values())


def _load(bundle: Sequence[ParameterRecord]) -> Load:
    """What a rank takes over with these parameters: a round of refreshes, and their state."""
    cost = sum(plan.refresh_cost for record in bundle for plan in record.route.tiles)
    state = sum(record.route.state_bytes(state_dtype(record.parameter)) for record in bundle)
    return Load(cost, float(state))
