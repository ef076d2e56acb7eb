"""Sharded parameters in pieces: how much of them is under way at a time. Pure functions.

An owner needs the whole gradient of what it owns, and room for the update, until all ranks have
done their part; those are bytes like a moment's. What comes on top, the messages, is bounded by
sending few parameters at a time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence

from asteria.runtime.records import ParameterRecord, state_dtype

__all__ = ["MESSAGE_BYTES", "by_mesh", "gathered_bytes", "pieces"]

MESSAGE_BYTES = 64 * 1024**2
"""Most that a rank sends or receives of gradients, or of updates, at a time; unless a single
parameter is larger."""


def by_mesh(records: Iterable[ParameterRecord]) -> list[list[ParameterRecord]]:
    """Those that are stepped as wholes by the ranks that share them, in order: the same on all."""
    meshes: dict[tuple[int, ...], list[ParameterRecord]] = {}
    for record in sorted((r for r in records if r.is_exact), key=lambda record: record.index):
        meshes.setdefault(record.as_sharded.layout.ranks, []).append(record)
    return list(meshes.values())


def _itemsize(record: ParameterRecord) -> int:
    """Of the wider of gradient and update."""
    return max(record.parameter.dtype.itemsize, state_dtype(record.parameter).itemsize)


def pieces(members: Sequence[ParameterRecord], most_bytes: int) -> list[list[ParameterRecord]]:
    """``members`` of one mesh, which have owners, cut into runs that travel together.

    The same on all ranks, and no rank sends or receives more than ``most_bytes`` for a run of more
    than one. An owner sends an update to every replica, and a rank to every owner its shard.
    """
    found: list[list[ParameterRecord]] = []
    owned: Counter[int] = Counter()
    shards = 0
    for record in members:
        sharding, itemsize = record.as_sharded, _itemsize(record)
        whole = itemsize * sharding.copies * math.prod(record.shape)
        shard = itemsize * sharding.largest_part
        full = max(owned[sharding.owner] + whole, shards + shard) > most_bytes
        if full or not found:
            found.append([])
            owned.clear()
            shards = 0
        found[-1].append(record)
        owned[sharding.owner] += whole
        shards += shard
    return found


def gathered_bytes(records: Iterable[ParameterRecord], most_bytes: int) -> int:
    """The most memory that a step takes on this rank for whole gradients and updates.

    For what it owns of ``records``, and for what it sends and receives at a time.
    """
    whole = messages = 0
    for members in by_mesh(records):
        for record in members:
            if record.is_here:
                gradient, update = record.parameter.dtype, state_dtype(record.parameter)
                whole += math.prod(record.shape) * (gradient.itemsize + update.itemsize)
        for piece in pieces(members, most_bytes):
            own = [
                _itemsize(r) * r.as_sharded.copies * math.prod(r.shape) for r in piece if r.is_here
            ]
            shards = [_itemsize(r) * r.as_sharded.largest_part for r in piece]
            messages = max(messages, sum(own) + sum(shards))
    return whole + messages
