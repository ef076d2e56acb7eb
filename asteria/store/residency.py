"""Which cell has its home on which tier. Pure functions of sizes and budgets."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from asteria.errors import StoreFullError
from asteria.store.cell import Home

__all__ = ["REWRITTEN", "WINDOWS", "Budgets", "Item", "Placement", "place", "rewritten_bytes"]

REWRITTEN = 4
"""Cells that are on the disk twice, while the new one takes the place of the old one."""
WINDOWS = 3
"""Groups that flow through at a time: one arrives, one is computed with, one leaves."""


@dataclass(frozen=True, slots=True)
class Item:
    """One cell, as far as its place is concerned."""

    nbytes: int
    read_bytes: float
    """What a step brings near, if the cell is not at home on the device."""
    written_bytes: float
    """What it brings home."""
    beside_bytes: float = 0.0
    """What refreshes in flight take where the cell is: old values in use, new ones that wait."""
    flying_bytes: float = 0.0
    """What refreshes on the device take there, wherever the cell is."""
    noted_bytes: int = 0
    """What is kept beside the cell, at the most, while it is elsewhere."""

    @property
    def moved_bytes(self) -> float:
        """In both directions."""
        return self.read_bytes + self.written_bytes


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes for state on each tier; None is no limit, and 0 no such tier.

    ``device_bytes`` of a device that shares the host's memory is for both; then ``pinned_bytes``
    is 0.
    """

    device_bytes: int | None = None
    pinned_bytes: int | None = 0
    nvme_bytes: int | None = 0
    working_bytes: int = 0
    """Of ``device_bytes``: temporary memory of steps and refreshes."""


@dataclass(frozen=True, slots=True)
class Placement:
    """Where everything lives."""

    homes: tuple[tuple[Home, ...], ...]
    """For each item of each group."""
    bytes_at: tuple[int, int, int]
    """Bytes at home on each tier."""
    taken_bytes_at: tuple[int, int, int]
    """The same and what is kept beside."""
    window_bytes: int
    """What a step takes of the device's memory for what lives elsewhere."""
    moved_bytes: float
    """What a step moves between the device and the other tiers."""
    flying_bytes: int = 0
    """What refreshes on the device take of its memory."""


def place(groups: Sequence[Sequence[Item]], budgets: Budgets) -> Placement:
    """Keep near what a step would move most of per byte; a group goes through a step together.

    Equal claims are granted in order. Raises StoreFullError if the last tier has no room.
    """
    order = sorted(
        ((g, i) for g, group in enumerate(groups) for i in range(len(group))),
        key=lambda at: -_claim(groups[at[0]][at[1]]),
    )
    device = budgets.device_bytes
    flying = math.ceil(sum(item.flying_bytes for group in groups for item in group))
    if device is not None:
        device = max(0, device - flying)
    total = sum(item.nbytes + item.beside_bytes for group in groups for item in group)
    largest = max((sum(item.nbytes for item in group) for group in groups), default=0)
    window = 0
    if device is not None and total + budgets.working_bytes > device:
        window = max(min(WINDOWS * largest, device - budgets.working_bytes), largest)
        device = max(0, device - budgets.working_bytes - window)
    pinned, nvme = budgets.pinned_bytes, budgets.nvme_bytes
    if nvme is not None:
        nvme = max(0, nvme - rewritten_bytes(groups))
    if pinned and budgets.nvme_bytes != 0 and total > (device or 0) + pinned:
        pinned = max(0, pinned - WINDOWS * largest)  # what goes on to the disk passes through
    limits = (device, pinned, nvme)
    taken = [0.0, 0.0, 0.0]
    homes = [[Home.DEVICE] * len(group) for group in groups]
    moved = 0.0
    for g, i in order:
        item = groups[g][i]
        home = next((h for h in Home if _fits(item, h, limits[h], taken[h])), None)
        if home is None:
            raise StoreFullError(_no_room(groups, limits, window))
        homes[g][i] = home
        taken[home] += item.nbytes + _extra(item, home)
        moved += item.moved_bytes if home is not Home.DEVICE else 0
    at = [0, 0, 0]
    for group, places in zip(groups, homes, strict=True):
        for item, home in zip(group, places, strict=True):
            at[home] += item.nbytes
    away = at[Home.PINNED] + at[Home.NVME] > 0
    bytes_at = (at[0], at[1], at[2])
    taken_at = (math.ceil(taken[0]), math.ceil(taken[1]), math.ceil(taken[2]))
    window = window if away else 0
    return Placement(tuple(map(tuple, homes)), bytes_at, taken_at, window, moved, flying)


def rewritten_bytes(groups: Sequence[Sequence[Item]]) -> int:
    """What a disk needs besides, for cells that are there twice while they are written."""
    return REWRITTEN * max((item.nbytes for group in groups for item in group), default=0)


def _claim(item: Item) -> float:
    """What a byte near the processor saves."""
    return item.moved_bytes / max(1.0, item.nbytes + item.beside_bytes)


def _fits(item: Item, home: Home, limit: int | None, taken: float) -> bool:
    return limit is None or taken + item.nbytes + _extra(item, home) <= limit


def _extra(item: Item, home: Home) -> float:
    return item.beside_bytes + (item.noted_bytes if home is not Home.DEVICE else 0)


def _no_room(
    groups: Sequence[Sequence[Item]], limits: tuple[int | None, int | None, int | None], window: int
) -> str:
    total = sum(item.nbytes for group in groups for item in group)
    rooms = ", ".join(
        f"{name} {'no limit' if limit is None else limit}"
        for name, limit in zip(("device", "pinned", "nvme"), limits, strict=True)
        if limit != 0
    )
    return (
        f"the optimizer's state takes {total} bytes, for which there is room of {rooms or 'none'} "
        f"(in bytes, after {window} for what flows through a step): raise "
        "RuntimeConfig.device_budget or host_budget, give an nvme_path with a larger nvme_budget, "
        "or lower max_precond_dim"
    )
