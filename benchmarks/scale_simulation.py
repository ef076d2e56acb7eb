"""Steps of all ranks, one after the other, with refreshes on their way beside them.

The ranks step together, because a step ends with an exchange of gradients: who waits, waits for
all. A refresh is launched at the end of a step, waits for a worker of its owner, is computed,
travels, and lands before the step that its staleness allows. That step waits if it is late.
"""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from asteria.refresh.schedule import is_due

__all__ = ["Outcome", "Refresh", "StepParts", "simulate"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """Seconds of a step on the slowest rank."""

    compute_s: float
    """Forward, backward and what is communicated and not hidden behind them."""
    update_s: float = 0.0
    inside_s: float = 0.0
    """A round of refreshes inside the step, every period-th."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Refresh:
    """What refreshing one tile takes, beside the training."""

    owner: int
    phase: float
    job_s: float
    takes_device: bool = False
    """Whether the job takes the time of the owner's device from the next step."""
    copy_s: float = 0.0
    """From the device, before it can begin."""
    sending_s: float = 0.0
    """That the owner's link to others is taken."""
    passing_s: float = 0.0
    """That the narrowest piece of the way to every rank is taken."""
    travel_s: float = 0.0
    """From the end of the job to the last rank's device, on links that carry nothing else."""
    place: int = 0
    """Of its owner on its node: results of equal places share their way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of whole periods, after the first ones."""

    step_s: float
    """Mean."""
    longest_step_s: float
    wait_s: float
    """Mean of a step, for refreshes at the bound."""
    busy: float
    """Share of the time that the busiest owner's workers work."""


@dataclass(slots=True)
class _Flight:
    refresh: Refresh
    done_s: float
    arrival_s: float | None = None


class _Ways:
    """Workers and links, each free from some time on."""

    def __init__(self, jobs: int) -> None:
        self._workers: dict[int, list[float]] = defaultdict(lambda: [0.0] * jobs)
        self._senders: dict[int, float] = defaultdict(float)
        self._shared: dict[int, float] = defaultdict(float)
        self._travelling: list[tuple[float, int, _Flight]] = []
        self.worked_s: dict[int, float] = defaultdict(float)

    def launch(self, refresh: Refresh, now_s: float, order: int) -> _Flight:
        """Equal staleness: what was launched first is the most urgent."""
        workers = self._workers[refresh.owner]
        begin_s = max(now_s + refresh.copy_s, workers[0])
        heapq.heapreplace(workers, begin_s + refresh.job_s)
        self.worked_s[refresh.owner] += refresh.job_s
        flight = _Flight(refresh, begin_s + refresh.job_s)
        heapq.heappush(self._travelling, (flight.done_s, order, flight))
        return flight

    def arrival_s(self, flight: _Flight) -> float:
        """When all ranks have it; what was done earlier travels earlier.

        Whatever is launched later is done later than the step that asks, and so than ``flight``, or
        is not waited for now.
        """
        while flight.arrival_s is None:
            done_s, _, first = heapq.heappop(self._travelling)
            way = first.refresh
            begin_s = max(done_s, self._senders[way.owner])
            self._senders[way.owner] = begin_s + way.sending_s
            end_s = max(begin_s + way.travel_s, self._shared[way.place] + way.passing_s)
            first.arrival_s = end_s
            if way.passing_s:
                self._shared[way.place] = end_s
        return flight.arrival_s


def simulate(
    parts: StepParts,
    refreshes: Sequence[Refresh] = (),
    *,
    period: int,
    staleness: int = 0,
    jobs: int = 1,
    warm_periods: int = 3,
    periods: int = 5,
) -> Outcome:
    """Take whole periods of steps, and count those after the ``warm_periods``.

    ``jobs``: refreshes that an owner computes at a time. ``refreshes`` are launched beside the
    training, and land ``staleness`` steps later, at least 1.
    """
    # Queues must have had the time to become as long as they will.
    warm = period * max(warm_periods, 1 + -(-staleness // period))
    total = warm + period * periods
    ways = _Ways(max(1, jobs))
    landing: dict[int, list[_Flight]] = defaultdict(list)
    due = {
        step % period: [r for r in refreshes if is_due(step, period=period, phase=r.phase)]
        for step in range(1, period + 1)
    }
    now_s, order, taken_s = 0.0, 0, 0.0
    lengths, waits = [], []
    warm_worked_s: dict[int, float] = {}
    for step in range(1, total + 1):
        begin_s = now_s
        now_s += parts.compute_s + taken_s
        due_s = max((ways.arrival_s(flight) for flight in landing.pop(step, ())), default=0.0)
        waits.append(max(0.0, due_s - now_s))
        now_s += waits[-1] + parts.update_s
        if step % period == 0:
            now_s += parts.inside_s
        taken: dict[int, float] = defaultdict(float)
        for refresh in due[step % period]:
            landing[step + staleness + 1].append(ways.launch(refresh, now_s, order))
            order += 1
            taken[refresh.owner] += refresh.job_s * refresh.takes_device
        taken_s = max(taken.values(), default=0.0)
        lengths.append(now_s - begin_s)
        if step == warm:
            warm_worked_s = dict(ways.worked_s)
    counted_s = sum(lengths[warm:])
    worked_s = [s - warm_worked_s.get(owner, 0.0) for owner, s in ways.worked_s.items()]
    return Outcome(
        step_s=counted_s / (total - warm),
        longest_step_s=max(lengths[warm:]),
        wait_s=sum(waits[warm:]) / (total - warm),
        busy=max(worked_s, default=0.0) / (counted_s * max(1, jobs)) if counted_s else 0.0,
    )
