"""What refreshes cost, and how often the host can afford them."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Hashable, Iterable

__all__ = ["HOST_SHARE", "STEP_SHARE", "Pace", "affordable_period", "young_stride"]

HOST_SHARE = 0.5
"""Of the workers' time that refreshes beside the training may take."""
STEP_SHARE = 0.2
"""Of the training time that refreshes inside the step may take."""
YOUNG_SHARE = 0.5
"""Of the first steps' time that refreshes may take while the factors are young."""
_DEAR_ROUND_S = 10.0
"""Cheaper rounds of young refreshes are never left out: a run would depend on the clock."""
_RECENT = 32
"""Steps whose durations are remembered."""


def affordable_period(round_s: float, step_s: float, *, jobs: int, share: float) -> int:
    """Smallest period at which refreshes take at most ``share`` of ``jobs`` workers' time.

    ``round_s``: seconds of work to refresh every unit once; ``step_s``: seconds of a step.
    """
    return max(1, math.ceil(round_s / (max(step_s, 1e-9) * jobs * share)))


def young_stride(round_s: float, step_s: float, *, rounds: int, steps: int) -> int:
    """Every how many of the ``rounds`` of the first ``steps`` steps are affordable; 1 is all."""
    if round_s <= _DEAR_ROUND_S:
        return 1
    return max(1, math.ceil(rounds * round_s / (YOUNG_SHARE * steps * max(step_s, 1e-9))))


class Pace:
    """Durations of steps, refreshes and waits, as they were seen. For the training thread.

    Seconds are the caller's, so that a test may make them up.
    """

    def __init__(self) -> None:
        self._began_s: float | None = None
        self._aside_s = 0.0
        """Of the step that goes on: what it spent on refreshes and waits."""
        self._steps_s: deque[float] = deque(maxlen=_RECENT)
        self._waits_s: deque[float] = deque(maxlen=_RECENT)
        self._units_s: dict[Hashable, float] = {}
        self._aside_units_s: dict[Hashable, dict[str, float]] = {}
        """By method."""
        self.count_of_rounds = 0
        """All that were ever made inside the step."""
        self.rounds_s: deque[float] = deque(maxlen=_RECENT)
        """Of the latest steps that refreshed inside the step: the seconds that took, bases made for
        the first time aside."""

    def begin_step(self, now_s: float) -> None:
        """A step begins; the one before it took until now, its refreshes and waits aside."""
        if self._began_s is not None:
            self._steps_s.append(max(now_s - self._began_s - self._aside_s, 0.0))
        self._began_s, self._aside_s = now_s, 0.0

    def refreshed_inside(self, seconds: float) -> None:
        """The step took so long to refresh by itself."""
        self._aside_s += seconds
        self.rounds_s.append(seconds)
        self.count_of_rounds += 1

    def made_bases(self, seconds: float) -> None:
        """The step took so long to make bases for the first time."""
        self._aside_s += seconds

    def waited(self, seconds: float, *, overdue_s: float) -> None:
        """The step waited so long, ``overdue_s`` of it for what had all its time."""
        self._aside_s += seconds
        self._waits_s.append(overdue_s)

    def worked(self, unit: Hashable, seconds: float) -> None:
        """A worker took so long to refresh a unit."""
        self._units_s[unit] = seconds

    def worked_aside(self, unit: Hashable, method: str, seconds: float) -> None:
        """A device took so long to refresh a unit beside the training."""
        self._aside_units_s.setdefault(unit, {})[method] = seconds

    def forget(self, unit: Hashable) -> None:
        """There is no such unit any more."""
        self._units_s.pop(unit, None)
        self._aside_units_s.pop(unit, None)

    def seconds(self, units: Iterable[Hashable]) -> float | None:
        """Of a worker for one of ``units``, on average; None if none was seen."""
        return _mean(self._units_s[unit] for unit in units if unit in self._units_s)

    def seconds_aside(self, units: Iterable[Hashable], method: str) -> float | None:
        """Likewise of a device, by this method."""
        known = (self._aside_units_s.get(unit, {}) for unit in units)
        return _mean(seconds[method] for seconds in known if method in seconds)

    @property
    def steps(self) -> int:
        """Steps that are remembered."""
        return len(self._steps_s)

    @property
    def step_s(self) -> float:
        """Median duration of the latest steps; 0 before the second one."""
        return statistics.median(self._steps_s) if self._steps_s else 0.0

    def round_s(self, units: int) -> float:
        """Worker seconds for a round of all ``units``, those never seen taken as the average."""
        if not self._units_s:
            return 0.0
        return sum(self._units_s.values()) * units / len(self._units_s)

    def round_aside_s(self, units: int) -> float:
        """The same of a device beside the training; 0 as long as it has done less than half."""
        if len(self._aside_units_s) < min(units, 1 + units // 2):
            return 0.0
        mean = _mean(min(seconds.values()) for seconds in self._aside_units_s.values())
        return (mean or 0.0) * units

    @property
    def seen_units(self) -> int:
        """Units that a worker has refreshed."""
        return len(self._units_s)

    @property
    def waiting_share(self) -> float:
        """Share of the latest steps' time that was spent waiting for overdue refreshes.

        0 until enough steps are remembered.
        """
        if len(self._steps_s) < _RECENT:
            return 0.0
        return sum(self._waits_s) / max(sum(self._steps_s) + sum(self._waits_s), 1e-9)


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return statistics.fmean(known) if known else None
