"""What the state of blocks asks of the tiers. Pure functions of shapes and settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from asteria.config.runtime import RuntimeConfig
from asteria.runtime.extents import ExtentKey, layouts
from asteria.runtime.rows import rows_at_a_time
from asteria.store.layout import Life
from asteria.store.residency import Item

__all__ = ["items", "ledger_steps", "working_bytes"]

_MOST_STEPS = 5
_GAIN = 0.5
"""Of what a fold in every step would move; less is not worth the room that the notes take."""
_OVERHEAD_BYTES = 64 * 1024**2
"""What a process that streams grows by beside: code, stacks, and what its heap keeps."""
_REFRESH_COPIES = 8
"""Matrices of a factor's size that a refresh has at a time; a first one works in float64."""


def items(key: ExtentKey, blocks: int, period: int, config: RuntimeConfig) -> list[Item]:
    """One item for each cell of an extent of so many blocks, in the order of `layouts`.

    ``period`` in steps between refreshes.
    """
    flying = config.refresh == "async" and config.staleness > 0
    share = (config.staleness + 1) / period if flying else 0.0
    found = []
    for life, layout in layouts(key.rule, key.shape, blocks, key.dtype).items():
        read = written = float(layout.nbytes)
        if life is Life.BASIS:
            written /= period
        beside = 0.0 if life is Life.STEP else share * layout.nbytes
        noted = 0
        if life is Life.SUM and (steps := ledger_steps(key, period)):
            step = _contributed_bytes(key) * blocks
            read = written = step + layout.nbytes / steps
            noted = (steps - 1) * step
        found.append(Item(layout.nbytes, read, written, beside_bytes=beside, noted_bytes=noted))
    return found


def ledger_steps(key: ExtentKey, period: int) -> int:
    """For how many steps factors that live elsewhere are left there; 0 where it does not pay.

    A step moves its contributions then, and a fold these and the factors.
    """
    steps = min(period, _MOST_STEPS)
    factors = sum(size**2 for size in key.shape.factor_sizes()) * key.dtype.itemsize
    pays = 2 * _contributed_bytes(key) + 2 * factors / steps <= _GAIN * 2 * factors
    return steps if steps > 1 and pays else 0


def _chunk_bytes(key: ExtentKey) -> int:
    """Of one temporary tensor for a block."""
    return key.dtype.itemsize * rows_at_a_time(key) * math.prod(key.shape.dims[1:])


def _widened_bytes(key: ExtentKey) -> int:
    """Of a block's eigenbases in the dtype that is computed with, if they are stored in less."""
    bases = [f for f in key.rule.fields(key.shape) if f.stored(key.dtype) != key.dtype]
    return sum(math.prod(field.shape) for field in bases) * key.dtype.itemsize


def _contributed_bytes(key: ExtentKey) -> int:
    """Of one block in one step."""
    tensors = key.rule.contributed_tensors(key.shape)
    return tensors * math.prod(key.shape.dims) * key.dtype.itemsize


def working_bytes(extents: Iterable[tuple[ExtentKey, int]], *, refreshes: int) -> int:
    """Temporary memory of a step, and of so many refreshes at a time beside it.

    ``extents`` are (key, blocks).
    """
    known: Sequence[tuple[ExtentKey, int]] = list(extents)
    step = max((n * (3 * _chunk_bytes(k) + _widened_bytes(k)) for k, n in known), default=0)
    factor = max(
        (k.dtype.itemsize * size**2 for k, _ in known for size in k.shape.factor_sizes()),
        default=0,
    )
    return step + _REFRESH_COPIES * factor * max(1, refreshes) + _OVERHEAD_BYTES
