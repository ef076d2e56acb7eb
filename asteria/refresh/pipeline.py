"""Refreshes in flight: launched from a snapshot, not installed yet."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Generic, TypeVar

from asteria.refresh.job import Job
from asteria.refresh.pool import Executor

__all__ = ["Flight", "Pipeline", "Waits", "name_of"]

T = TypeVar("T")
U = TypeVar("U", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Flight(Generic[T]):
    """One refresh of one unit."""

    version: int
    """The unit's step whose statistics it is computed from."""
    lands: int
    """The steps of the unit after which it is installed, at the latest; at least ``version``."""
    job: Job[T]
    number: int = 0
    """Names it among all that were launched, where several ranks launch the same; 0 elsewhere."""
    passed: Callable[[], bool] | None = None
    """Whether a device has come to its end, if one does what ``job`` only has begun."""

    @property
    def is_ready(self) -> bool:
        """Whether nothing would wait for it."""
        return self.job.done and (self.passed is None or self.passed())


@dataclass(slots=True)
class Waits:
    """Times that the training thread had to wait for a result at the bound."""

    count: int = 0
    seconds: float = 0.0


def name_of(unit: object, version: int) -> str:
    """What a refresh is called in messages and traces, on every rank."""
    return f"refresh of {unit} at step {version}"


class Pipeline(Generic[U, T]):
    """What is in flight for each unit, oldest first, and the bound on its staleness.

    A unit is what is refreshed together; its steps count from 1. A flight that lands after step l
    is due before step l + 1: exactly then, or with ``ready`` as soon as it is done. At the bound
    the training thread waits; no flight is overtaken, and none is dropped but by `forget` and
    `cancel`. Knows no algorithm. For the training thread.
    """

    def __init__(
        self,
        executor: Executor,
        *,
        ready: bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``clock`` in seconds."""
        self.executor = executor
        self.waits = Waits()
        self.may_land: Callable[[Flight[T]], bool] = lambda flight: flight.is_ready
        """With ``ready``: whether a flight may land before its time."""
        self._ready = ready
        self._clock = clock
        self._flights: dict[U, deque[Flight[T]]] = {}

    def __len__(self) -> int:
        """Flights of all units."""
        return sum(map(len, self._flights.values()))

    def launch(
        self,
        unit: U,
        version: int,
        work: Callable[[], T],
        *,
        lands: int,
        urgency: tuple[float, ...],
        number: int = 0,
        then: Callable[[T | None, BaseException | None], None] | None = None,
    ) -> Flight[T]:
        """Begin a refresh from a snapshot of step ``version``; never blocks.

        Of all that are waiting the smallest ``urgency`` is worked on first. ``then`` as in `Job`.
        """
        job = Job(work, name=name_of(unit, version), urgency=urgency, then=then)
        flight = Flight(version, lands, job, number)
        self.executor.submit(flight.job)  # first: what is in flight must be with the workers
        self.add(unit, flight)
        return flight

    def add(self, unit: U, flight: Flight[T]) -> None:
        """Take a flight that was launched elsewhere, the unit's newest."""
        self._flights.setdefault(unit, deque()).append(flight)

    def units(self) -> list[U]:
        """Units with something in flight."""
        return list(self._flights)

    def flights(self, unit: U) -> tuple[Flight[T], ...]:
        """What is in flight for ``unit``, oldest first."""
        return tuple(self._flights.get(unit, ()))

    def due(self, unit: U, steps: int) -> list[Flight[T]]:
        """Flights that land now, after ``steps`` steps of the unit, oldest first, all done.

        Waits for those at the bound. They stay in the pipeline until `land`.
        """
        landing: list[Flight[T]] = []
        for flight in self._flights.get(unit, ()):
            if steps >= flight.lands:
                self._wait_for(flight.job)
            elif not (self._ready and self.may_land(flight)):
                break
            landing.append(flight)
        return landing

    def ready(self, unit: U, steps: int) -> list[Flight[T]]:
        """Flights that `due` would return now without a wait."""
        flights = self._flights.get(unit, ())
        landing = itertools.takewhile(
            lambda flight: (
                flight.is_ready
                if self._ready and steps < flight.lands
                else flight.job.done and steps >= flight.lands
            ),
            flights,
        )
        return list(landing)

    def finished(self, unit: U) -> tuple[Flight[T], ...]:
        """What is in flight for ``unit``, oldest first, after waiting until all of it is done."""
        flights = self.flights(unit)
        for flight in flights:
            if not flight.job.done:
                flight.job.await_by(self.executor.wait)
        return flights

    def land(self, unit: U, flight: Flight[T]) -> None:
        """Take one of the unit's flights out."""
        flights = self._flights[unit]
        flights.remove(flight)
        if not flights:
            del self._flights[unit]

    def _wait_for(self, job: Job[T]) -> None:
        if not job.done:
            start = self._clock()
            try:
                job.await_by(self.executor.wait)
            finally:
                self.waits.count += 1
                self.waits.seconds += self._clock() - start

    def cancel(self, unit: U, flight: Flight[T]) -> None:
        """Drop one of the unit's flights, unless it has landed; it should not have begun."""
        if flight in self._flights.get(unit, ()):
            self.land(unit, flight)
            self.executor.discard(flight.job)

    def forget(self, unit: U) -> None:
        """Drop what is in flight for ``unit``; something newer is there."""
        for flight in self._flights.pop(unit, ()):
            self.executor.discard(flight.job)

    def close(self) -> None:
        """Stop the executor's threads; what is in flight stays so."""
        self.executor.close()
