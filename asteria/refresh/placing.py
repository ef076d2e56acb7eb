"""Which refreshes the host does and which the device, by what they cost. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from asteria.config.refresh_plan import Choice
from asteria.refresh.pacing import HOST_SHARE, STEP_SHARE

__all__ = ["Kind", "Means", "choose"]

DeviceMethod = Literal["qr", "ldlr"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """Units of one group whose blocks have one shape, which are refreshed in the same way."""

    dims: tuple[int, ...]
    units: int
    host_s: float
    """Of one unit, by a worker."""
    device_s: Mapping[DeviceMethod, float]
    """Of one unit beside the training, by method; none where the device has no room for it."""
    period: int | None
    """Steps between refreshes; None is to be found out."""
    host_method: DeviceMethod = "qr"

    @property
    def method(self) -> DeviceMethod:
        """The device's fastest."""
        return min(self.device_s, key=lambda method: self.device_s[method])


@dataclass(frozen=True, slots=True, kw_only=True)
class Means:
    """What there is for refreshes."""

    step_s: float
    """Seconds of a step without refreshes."""
    jobs: int
    """Workers' refreshes at a time."""


@dataclass(frozen=True, slots=True)
class _Load:
    """Of the host, or of the device, in shares of the time that refreshes may take there."""

    fixed: float
    """By kinds whose period is given."""
    free_s: float
    """Seconds of a round of the others."""
    capacity_s: float
    """For each step."""
    at_a_time: int
    """Refreshes."""

    @property
    def lost_s(self) -> float:
        """What a step loses to fixed kinds that are too much, 0 if they are not."""
        return max(0.0, self.fixed - 1.0) * self.capacity_s / self.at_a_time

    @property
    def period(self) -> float:
        """Steps in which the others can be done."""
        if not self.free_s:
            return 1
        left_s = self.capacity_s * (1.0 - self.fixed)
        return math.inf if left_s <= 0 else max(1, math.ceil(self.free_s / left_s))


def choose(kinds: Sequence[Kind], means: Means) -> list[Choice]:
    """A choice for each kind: as little on the device as keeps the bases fresh.

    The host's time is free, so it does what it can do at the periods that are given. What it cannot
    goes to the device, those kinds first that spare the host most for a second there. Where both
    cannot do it all, the step loses as little as can be; where the period is to be found out, it is
    the shortest that both sustain. Depends on its arguments only.
    """
    ways = [
        fixed | free
        for fixed in _beginnings(kinds, free=False)
        for free in _beginnings(kinds, free=True)
    ]
    best = min(ways, key=lambda way: _price(kinds, way, means))
    host, device = _loads(kinds, best, means)
    return [
        Choice(
            "device" if place in best else "host",
            kind.method if place in best else kind.host_method,
            _whole((device if place in best else host).period) if kind.period is None else None,
        )
        for place, kind in enumerate(kinds)
    ]


def _beginnings(kinds: Sequence[Kind], *, free: bool) -> list[frozenset[int]]:
    """None, one, two, ... of the kinds with or without a period, the host's dearest first."""
    order = sorted(
        (n for n, kind in enumerate(kinds) if kind.device_s and (kind.period is None) == free),
        key=lambda place: -kinds[place].host_s / kinds[place].device_s[kinds[place].method],
    )
    return [frozenset(order[:count]) for count in range(len(order) + 1)]


def _price(kinds: Sequence[Kind], way: frozenset[int], means: Means) -> tuple[float, float, int]:
    """Smaller is better: what a step loses, then staleness, then what the device does."""
    host, device = _loads(kinds, way, means)
    return host.lost_s + device.lost_s, max(host.period, device.period), len(way)


def _loads(kinds: Sequence[Kind], way: frozenset[int], means: Means) -> tuple[_Load, _Load]:
    """Of the host and of the device, if the kinds of these places are refreshed there."""
    loads = []
    for there, at_a_time, share in ((False, means.jobs, HOST_SHARE), (True, 1, STEP_SHARE)):
        capacity_s = means.step_s * at_a_time * share
        fixed = free_s = 0.0
        for place, kind in enumerate(kinds):
            if (place in way) == there:
                seconds = kind.units * (kind.device_s[kind.method] if there else kind.host_s)
                if kind.period is None:
                    free_s += seconds
                else:
                    fixed += seconds / (kind.period * capacity_s)
        loads.append(_Load(fixed, free_s, capacity_s, at_a_time))
    return loads[0], loads[1]


def _whole(period: float) -> int:
    """An endless one, where fixed kinds leave no time, is as long as anybody would train."""
    return int(min(period, 10**6))
