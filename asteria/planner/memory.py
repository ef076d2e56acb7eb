"""Where the state will live, what a step takes beside it, and what it moves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

from asteria.config.runtime import RuntimeConfig
from asteria.errors import StoreFullError
from asteria.planner.extents import Census
from asteria.planner.machine import Machine
from asteria.runtime import claims
from asteria.runtime.claims import items, working_bytes
from asteria.runtime.extents import ExtentKey, layouts
from asteria.store.cell import Home
from asteria.store.layout import Life
from asteria.store.residency import WINDOWS, Budgets, Item, Placement, place, rewritten_bytes

__all__ = [
    "CLASSES",
    "TIERS",
    "Memory",
    "Traffic",
    "budgets",
    "housed",
    "largest_bytes",
    "least_needed",
    "placed",
    "traffic",
]

CLASSES: dict[Life, str] = {Life.STEP: "moments", Life.BASIS: "bases", Life.SUM: "factors"}
"""What people call the fields of each life; eigenvalues count as moments."""
TIERS: dict[Home, str] = {Home.DEVICE: "device", Home.PINNED: "pinned", Home.NVME: "nvme"}
"""``device`` is the memory that the processor computes in, the host's where it shares that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes of state, and of what a step and refreshes need beside it."""

    state_bytes: int
    """Of all tiers, the gaps between tensors included."""
    by_class: Mapping[str, int]
    """``moments``, ``bases`` and ``factors``."""
    bytes_at: Mapping[str, int] | None
    """At home on ``device``, ``pinned`` and ``nvme``; None if there is no room for the state."""
    bytes_at_by_class: Mapping[str, Mapping[str, int]] | None
    limits: Mapping[str, int | None]
    """What may be used of each tier; None is no limit."""
    working_within: bool
    """Whether ``working_bytes`` are taken from the first limit; else they come on top."""
    working_bytes: int
    """Temporary memory of a step and of the refreshes beside it."""
    window_bytes: int
    """What flows through a step takes so much of the first tier; 0 if all is at home there."""
    in_flight_bytes: int
    """Snapshots and results of refreshes in the first tier, on average."""
    waiting_bytes: int
    """Results of refreshes that wait on NVMe until they are installed, on average."""
    least_bytes: int
    """Of the first tier: what a step needs even if all state is elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traffic:
    """What a step moves, on average over a period, and how long that takes if nothing else goes on.

    All of it runs beside the computation as far as the window allows.
    """

    moved_bytes: int
    """State that comes and goes because it is not at home on the device."""
    link_bytes: int
    """Between host and accelerator: the same, and refreshes; 0 where memory is shared."""
    disk_read_bytes: int
    """For steps and refreshes."""
    disk_write_bytes: int
    copied_bytes: int
    """Within host memory that is shared: snapshots of factors, and bases that are installed."""
    link_s: float
    disk_s: float
    copy_s: float


class _Items:
    """Items of extents, made once for each size of an extent."""

    def __init__(self, period: int, config: RuntimeConfig) -> None:
        self._period = period
        self._config = config
        self._known: dict[tuple[ExtentKey, int], list[Item]] = {}

    def of(self, key: ExtentKey, blocks: int) -> list[Item]:
        found = self._known.get((key, blocks))
        if found is None:
            found = items(key, blocks, self._period, self._config)
            self._known[key, blocks] = found
        return found


def placed(census: Census, period: int, config: RuntimeConfig) -> list[list[Item]]:
    """The items of every extent, in order; ``period`` in steps between refreshes."""
    known = _Items(period, config)
    return [known.of(key, blocks) for key, blocks in census]


def budgets(config: RuntimeConfig, machine: Machine, working: int) -> Budgets:
    """What there is for the state on each tier, by the same rules as at run time."""
    return claims.budgets(
        config,
        device_bytes=machine.device_bytes,
        host_bytes=machine.host_bytes,
        nvme_bytes=machine.nvme_bytes,
        shares_memory=machine.shares_memory,
        working=working,
    )


def housed(
    census: Census, groups: list[list[Item]], limits: Budgets, *, refreshes: int
) -> tuple[Memory, Placement | None]:
    """Place the state; the placement is None if there is no room for it."""
    try:
        placement = place(groups, limits)
    except StoreFullError:
        placement = None
    by_class: Counter[str] = Counter(dict.fromkeys(CLASSES.values(), 0))
    at: dict[str, Counter[str]] = {tier: Counter(by_class) for tier in TIERS.values()}
    in_flight = waiting = 0.0
    names: dict[ExtentKey, list[str]] = {}
    for number, ((key, _), group) in enumerate(zip(census, groups, strict=True)):
        if key not in names:
            names[key] = [CLASSES[life] for life in layouts(key.rule, key.shape, 1, key.dtype)]
        for index, (name, item) in enumerate(zip(names[key], group, strict=True)):
            by_class[name] += item.nbytes
            home = Home.DEVICE if placement is None else placement.homes[number][index]
            at[TIERS[home]][name] += item.nbytes
            in_flight += item.beside_bytes if home is Home.DEVICE else 0.0
            in_flight += item.flying_bytes
            if name == CLASSES[Life.BASIS] and home is Home.NVME and not limits.pinned_bytes:
                waiting += item.beside_bytes
    working = working_bytes(census, refreshes=refreshes)
    memory = Memory(
        state_bytes=sum(by_class.values()),
        by_class=dict(by_class),
        bytes_at=None
        if placement is None
        else dict(zip(TIERS.values(), placement.bytes_at, strict=True)),
        bytes_at_by_class=None
        if placement is None
        else {tier: dict(classes) for tier, classes in at.items()},
        limits=dict(
            zip(
                TIERS.values(),
                (limits.device_bytes, limits.pinned_bytes, limits.nvme_bytes),
                strict=True,
            )
        ),
        working_within=limits.working_bytes > 0,
        working_bytes=working,
        window_bytes=0 if placement is None else placement.window_bytes,
        in_flight_bytes=round(in_flight),
        waiting_bytes=round(waiting),
        least_bytes=largest_bytes(groups) + limits.working_bytes,
    )
    return memory, placement


def largest_bytes(groups: list[list[Item]]) -> int:
    """Of the state of one extent, which goes through a step as a whole."""
    return max((sum(item.nbytes for item in group) for group in groups), default=0)


def traffic(
    groups: list[list[Item]],
    placement: Placement | None,
    memory: Memory,
    machine: Machine,
    *,
    sent_every: int | None,
) -> Traffic:
    """Of one step; as if all state were at home on the device if there is no ``placement``.

    ``sent_every`` so many steps factors and bases go to a worker to be refreshed; None is never.
    """
    read: dict[Home, float] = dict.fromkeys(Home, 0.0)
    written: dict[Home, float] = dict.fromkeys(Home, 0.0)
    if placement is not None:
        for group, homes in zip(groups, placement.homes, strict=True):
            for item, home in zip(group, homes, strict=True):
                read[home] += item.read_bytes
                written[home] += item.written_bytes
    down = written[Home.PINNED] + written[Home.NVME]
    up = read[Home.PINNED] + read[Home.NVME]
    copied = 0.0
    # A refresh starts from a factor and a basis, and ends with a basis.
    if machine.shares_memory:
        down = up = 0.0
        if sent_every is not None:
            at = memory.bytes_at_by_class or {TIERS[Home.DEVICE]: memory.by_class}
            near, there = at[TIERS[Home.DEVICE]], at.get(TIERS[Home.NVME], {})
            read[Home.NVME] += (there.get("factors", 0) + there.get("bases", 0)) / sent_every
            copied = (near["factors"] + near["bases"]) / sent_every
    elif sent_every is not None:
        down += (memory.by_class["factors"] + memory.by_class["bases"]) / sent_every
        up += memory.by_class["bases"] / sent_every
    disk_s = (
        read[Home.NVME] / machine.disk_read_bytes_per_s
        + written[Home.NVME] / machine.disk_write_bytes_per_s
    )
    return Traffic(
        moved_bytes=0 if placement is None else round(placement.moved_bytes),
        link_bytes=round(down + up),
        disk_read_bytes=round(read[Home.NVME]),
        disk_write_bytes=round(written[Home.NVME]),
        copied_bytes=round(copied),
        link_s=max(down, up) / machine.link_bytes_per_s,
        disk_s=disk_s,
        copy_s=copied / machine.host_copy_bytes_per_s,
    )


def least_needed(groups: list[list[Item]], limits: Budgets, tier: Home) -> int | None:
    """Bytes of one tier with which the state has room, the others as they are; None if never.

    For the first tier that is with everything at home on it.
    """
    if tier is Home.DEVICE:
        total = sum(
            item.nbytes + item.beside_bytes + item.flying_bytes
            for group in groups
            for item in group
        )
        return round(total + 0.5) + limits.working_bytes
    if tier is Home.PINNED:
        without = replace(limits, pinned_bytes=None)
    else:
        without = replace(limits, nvme_bytes=None)
    try:
        found = place(groups, without)
    except StoreFullError:
        return None
    passing = 0
    if tier is Home.NVME:
        passing = rewritten_bytes(groups)
    elif limits.nvme_bytes != 0:
        passing = WINDOWS * largest_bytes(groups)
    return found.taken_bytes_at[tier] + passing
