"""What the state of blocks asks of the tiers. Pure functions of shapes and settings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from asteria.config.runtime import RuntimeConfig, parse_bytes
from asteria.linalg.packed import fold_bytes
from asteria.runtime import extents
from asteria.runtime.extents import ExtentKey, layouts
from asteria.runtime.rows import rows_at_a_time
from asteria.store.layout import Life
from asteria.store.residency import Budgets, Item

__all__ = ["budgets", "items", "ledger_steps", "working_bytes"]

_MOST_STEPS = 5
_GAIN = 0.5
"""Of what a fold in every step would move; less is not worth the room that the notes take."""
_OVERHEAD_BYTES = 64 * 1024**2
"""What a process that streams grows by beside: code, stacks, and what its heap keeps."""
_REFRESH_COPIES = 8
"""Matrices of a factor's size that a refresh has at a time; a first one works in float64."""
_TURN_COPIES = 3
"""Likewise while a factor is turned, beside the turns of all modes."""


def budgets(
    config: RuntimeConfig,
    *,
    device_bytes: int | None,
    host_bytes: int | None,
    nvme_bytes: int | None,
    shares_memory: bool,
    working: int,
    gathered: int = 0,
) -> Budgets:
    """What there is for the state on each tier: what was asked for, else what is free.

    ``device_bytes``, ``host_bytes`` and ``nvme_bytes`` are free, less a reserve; None is no limit.
    Where device and host share memory, ``device_bytes`` is not looked at. ``working`` is temporary
    memory of steps; ``gathered`` what whole gradients and updates of sharded parameters take.
    """
    device, host, nvme = map(_bytes, (config.device_budget, config.host_budget, config.nvme_budget))
    disk = config.nvme_path is not None
    last = (nvme_bytes if nvme is None else nvme) if disk else 0
    if shares_memory:
        limit = host_bytes if host is None else host + (device or 0)
        # Temporary memory is taken from what was asked for, not from what is merely free.
        return Budgets(limit, 0, last, working_bytes=working + gathered if disk else 0)
    near = device_bytes if device is None else device
    if near is not None:
        near = max(0, near - gathered)
    return Budgets(near, host_bytes if host is None else host, last)


def _bytes(budget: int | str | None) -> int | None:
    return None if budget is None else parse_bytes(budget)


def items(
    key: ExtentKey, blocks: int, period: int, config: RuntimeConfig, kept: int | None = None
) -> list[Item]:
    """One item for each cell of an extent of so many blocks, in the order of `layouts`.

    ``period`` in steps between refreshes; ``kept`` as in `layouts`.
    """
    flying = config.refresh == "async" and config.staleness > 0
    share = (config.staleness + 1) / period if flying else 0.0
    found = []
    for life, layout in layouts(key.rule, key.shape, blocks, key.dtype, kept).items():
        read = written = float(layout.nbytes)
        if life is Life.BASIS:
            written /= period
        beside = 0.0 if life is Life.STEP else share * layout.nbytes
        flying_bytes = 0.0
        if config.refresh_on == "device" and flying:
            # Snapshots of factors until they are done with, and bases until they land.
            of_life = {Life.SUM: 1 / period, Life.BASIS: share}
            beside, flying_bytes = 0.0, of_life.get(life, 0.0) * layout.nbytes
        noted = 0
        if life is Life.SUM and (steps := ledger_steps(key, period)):
            step = _contributed_bytes(key) * layout.blocks
            read = written = step + layout.nbytes / steps
            if key.rule.in_bases and flying:  # to be turned with their bases
                read = written = read + layout.nbytes / period
            noted = (steps - 1) * step
        found.append(
            Item(
                layout.nbytes,
                read,
                written,
                beside_bytes=beside,
                flying_bytes=flying_bytes,
                noted_bytes=noted,
            )
        )
    return found


def ledger_steps(key: ExtentKey, period: int) -> int:
    """For how many steps factors that live elsewhere are left there; 0 where it does not pay.

    A step moves its contributions then, and a fold these and the factors.
    """
    steps = min(period, _MOST_STEPS)
    fields = key.rule.fields(key.shape)
    factors = sum(field.nbytes(key.dtype) for field in fields if field.life is Life.SUM)
    pays = 2 * _contributed_bytes(key) + 2 * factors / steps <= _GAIN * 2 * factors
    return steps if steps > 1 and pays else 0


def _chunk_bytes(key: ExtentKey) -> int:
    """Of one temporary tensor for a block."""
    return key.dtype.itemsize * rows_at_a_time(key) * math.prod(key.shape.dims[1:])


def _widened_bytes(key: ExtentKey) -> int:
    """Of a block's eigenbases in the dtype that is computed with, if they are stored in less."""
    bases = [f for f in key.rule.fields(key.shape) if f.stored(key.dtype) != key.dtype]
    return sum(math.prod(field.shape) for field in bases) * key.dtype.itemsize


def _turning_bytes(key: ExtentKey, blocks: int) -> int:
    """Of turning factors in the step that installs bases, for as many blocks as it takes at once.

    Nothing where factors do not turn.
    """
    if not key.rule.in_bases:
        return 0
    sizes = [key.dtype.itemsize * size**2 for size in key.shape.factor_sizes()]
    together = min(blocks, max(1, extents.CHUNK_BYTES // max(sizes)))
    return together * (sum(sizes) + _TURN_COPIES * max(sizes))


def _contributed_bytes(key: ExtentKey) -> int:
    """Of one block in one step."""
    tensors = key.rule.contributed_tensors(key.shape)
    return tensors * math.prod(key.shape.dims) * key.dtype.itemsize


def working_bytes(extents: Iterable[tuple[ExtentKey, int]], *, refreshes: int) -> int:
    """Temporary memory of a step, and of so many refreshes at a time beside it.

    ``extents`` are (key, blocks). A refresh whose factors are on NVMe reads the cells they are in.
    """
    known: Sequence[tuple[ExtentKey, int]] = list(extents)
    read = max((_refreshed_bytes(*extent) for extent in set(known)), default=0)
    step = max((_step_bytes(*extent) for extent in set(known)), default=0)
    copies = max((_refresh_bytes(key) for key in {key for key, _ in known}), default=0)
    return step + (copies + read) * max(1, refreshes) + _OVERHEAD_BYTES


def _step_bytes(key: ExtentKey, blocks: int) -> int:
    """What a step computes in for so many blocks."""
    folded = _turning_bytes(key, blocks)
    if key.rule.factors == "packed":
        sizes = key.shape.factor_sizes()
        folded = max((fold_bytes(n, blocks, key.dtype.itemsize) for n in sizes), default=0)
    return blocks * (3 * _chunk_bytes(key) + _widened_bytes(key)) + folded


def _refresh_bytes(key: ExtentKey) -> int:
    """What a refresh of a block computes in."""
    copies = _REFRESH_COPIES + (key.rule.factors == "packed")  # the unpacked one is one more
    return copies * key.dtype.itemsize * max(key.shape.factor_sizes(), default=0) ** 2


def _refreshed_bytes(key: ExtentKey, blocks: int) -> int:
    """Of the factors and bases of an extent."""
    held = layouts(key.rule, key.shape, blocks, key.dtype)
    return sum(layout.nbytes for life, layout in held.items() if life is not Life.STEP)
