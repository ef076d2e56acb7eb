"""Taking a large one-sided block through a step by rows, so that temporary memory stays small.

An embedding or head with a factor for its columns only: its projection, its moments and its update
treat every row by itself, and its factor is a sum over rows. A block of 50,257 x 768 would take
three temporary tensors of 154 MB at a time.
"""

from __future__ import annotations

import dataclasses
import math

from torch import Tensor

from asteria.algorithms.algorithm import Algorithm, BlockShape, BlockState, Pair
from asteria.runtime import extents
from asteria.runtime.chunks import Chunk
from asteria.runtime.extents import ExtentKey

__all__ = ["Rows", "parts_of", "rotate_", "rows_at_a_time", "state_of"]

Rows = slice
"""Of a block."""


def rows_at_a_time(key: ExtentKey) -> int:
    """Rows of a block of this kind that go through a step together; all of them but for a few."""
    if not key.shape.dims:
        return 1
    rows, *rest = key.shape.dims
    alone = key.rule.rows_alike and key.shape.factored == (False, True)
    if not alone:
        return rows
    return min(rows, max(1, extents.CHUNK_BYTES // (key.dtype.itemsize * math.prod(rest))))


def parts_of(chunk: Chunk) -> list[tuple[Chunk, Rows]]:
    """The chunk, cut by rows where it is a single block that is to be, and the rows of each part.

    A pure function of shapes and groups, as the chunks are.
    """
    tile = chunk.tiles[0]
    plan = tile.plan
    whole = [(chunk, slice(0, plan.shape.dims[0] if plan.shape.dims else 1))]
    if (
        (len(chunk.tiles), plan.blocks) != (1, 1)
        or not chunk.shape.dims
        or (step := rows_at_a_time(chunk.extent.key)) >= chunk.shape.dims[0]
        or tile.record.shape != chunk.shape.dims
        or chunk.hyper.normalize_grads
    ):
        return whole
    rows, columns = chunk.shape.dims
    parts = []
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        shape = BlockShape((stop - start, columns), chunk.shape.factored)
        part = dataclasses.replace(plan, shape=shape, slices=(slice(start, stop),))
        own = dataclasses.replace(tile, plan=part)
        parts.append((dataclasses.replace(chunk, tiles=[own]), slice(start, stop)))
    return parts


def state_of(state: BlockState, rows: Rows, shape: BlockShape) -> BlockState:
    """The fields of these rows of blocks of ``shape``; what has no rows is shared."""
    if not shape.dims or (rows.start, rows.stop) == (0, shape.dims[0]):
        return state
    return {
        name: value[:, rows] if value.shape[1:] == shape.dims else value
        for name, value in state.items()
    }


def rotate_(
    rule: Algorithm,
    state: BlockState,
    fresh: list[Tensor | None],
    *,
    scratch: Pair,
    gate: Tensor | None,
    bound: float | None,
) -> None:
    """`Algorithm.rotate_` with ``scratch`` (b, rows, ...) for a part of the rows at a time."""
    rows, moment = scratch[0].shape[1], state["exp_avg"]
    if rows >= moment.shape[1]:
        rule.rotate_(state, fresh, scratch=scratch, gate=gate, bound=bound)
        return
    shape = BlockShape(tuple(moment.shape[1:]), ())
    for start in range(0, moment.shape[1], rows):
        part = slice(start, min(start + rows, moment.shape[1]))
        size = part.stop - part.start
        pair = scratch[0][:, :size], scratch[1][:, :size]
        own = state_of(state, part, shape)
        rule.rotate_(own, fresh, scratch=pair, gate=gate, bound=bound)
