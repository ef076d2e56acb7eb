"""Eigenbases computed beside the training from snapshots, and installed between two updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair
from asteria.config.runtime import RuntimeConfig
from asteria.errors import StoreError
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.refresh.pool import Executor
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.governor import Governor
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.launcher import Launcher
from asteria.runtime.narrow import as_stored, widened
from asteria.runtime.pending import chosen
from asteria.runtime.records import ParameterRecord
from asteria.runtime.results import Exchange
from asteria.runtime.shadows import show_flights, take_up
from asteria.runtime.staging import Stager
from asteria.runtime.turning import rotate_, with_own_factors
from asteria.runtime.units import Unit, Units, unit_of
from asteria.runtime.verdicts import Verdicts
from asteria.telemetry.counters import Counters
from asteria.telemetry.phases import phase
from asteria.telemetry.trace import Watch

__all__ = ["BackgroundRefresher"]


class _Landing(NamedTuple):
    flight: Flight[Refreshed]
    outcome: Refreshed


class BackgroundRefresher:
    """Takes in refreshes that were launched and installs them. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        units: Units,
        verdicts: Verdicts,
        governor: Governor,
        executor: Executor,
        watch: Watch,
        exchange: Exchange,
    ) -> None:
        """``config.staleness`` is at least 1."""
        clock, trace = watch
        self._config = config
        self._exchange = exchange
        self._counters = counters
        self._units = units
        self._verdicts = verdicts
        self._governor = governor
        self._clock = clock
        self._trace = trace
        self.pipeline: Pipeline[Unit, Refreshed] = Pipeline(
            executor, ready=config.install == "ready", clock=clock
        )
        self._landings: dict[Unit, list[_Landing]] = {}
        self._overdue_s = 0.0
        self._stager = Stager(self.pipeline)
        self.launcher = Launcher(
            config, counters, units, self.pipeline, self._stager, clock, exchange
        )
        landings = self._landings  # by itself: no ring of references keeps the optimizer
        self.launcher.landing = lambda unit: len(landings.get(unit, ()))

    def admit(self, records: Iterable[ParameterRecord]) -> None:
        """Prepare for the refreshes of new records."""
        for record in records:
            if record.route.rule.has_bases:
                self._stager.watch(record)
                show_flights(record, self.pipeline, staleness_steps=self._config.staleness)

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """Drop what is in flight for ``records``."""
        gone = set(records)
        for unit in self.pipeline.units():
            if unit.record in gone:
                self._forget(unit)
        for record in gone:
            self._stager.unwatch(record)

    @phase("wait")
    def collect(self, updates: Mapping[ParameterRecord, Update]) -> None:
        """Take in what lands before this update; waits at the bound.

        Raises what a worker raised. Nothing has changed then: the failed refresh is gone, and the
        basis in use stays in use.
        """
        self._landings.clear()
        waits, begin_s = self.pipeline.waits, self._clock()
        before_s, self._overdue_s = waits.seconds, 0.0
        try:
            if self._config.install == "ready":
                self._agree()
            for unit in self.pipeline.units():
                if unit.record in updates:
                    self._collect(unit)
        finally:
            waited_s = waits.seconds - before_s
            self._governor.waited(waited_s, overdue_s=self._overdue_s)
            if self._trace is not None and waited_s:
                self._trace.span("waits", "wait", _ns(begin_s), _ns(self._clock()))

    def _agree(self) -> None:
        """Let only those land before their time whose results all ranks have."""
        if not self._exchange.is_shared:
            return
        units, flights = self.pipeline.units(), self.pipeline.flights
        ready = self._exchange.arrived_everywhere(f for unit in units for f in flights(unit))
        self.pipeline.may_land = lambda f: f.number in ready or (f.is_ready and not f.number)

    def _collect(self, unit: Unit) -> None:
        before_s, flights = self.pipeline.waits.seconds, self.pipeline.flights(unit)
        try:
            due = self.pipeline.due(unit, unit.record.steps)
        finally:
            # A refresh of young factors lands at once: to wait for it is no sign of a slow host.
            if any(flight.lands > flight.version for flight in flights):
                self._overdue_s += self.pipeline.waits.seconds - before_s
        for flight in due:
            self._exchange.landing(flight)
            try:
                landing = _Landing(flight, flight.job.outcome())
            except StoreError:
                self._lose(unit, flight)
                continue
            except Exception:
                self._counters.failures["worker raised"] += 1
                self.pipeline.land(unit, flight)
                raise
            if flight.job.worker:  # else it was loaded, and nobody knows what it has cost
                self._governor.pace.worked(unit, flight.job.wall_s)
            self._landings.setdefault(unit, []).append(landing)

    def lands_on(self, chunk: Chunk) -> bool:
        """Whether the latest `collect` has found anything to install for the chunk."""
        return bool(self._landings) and any(unit_of(t) in self._landings for t in chunk.tiles)

    def install_(
        self, chunk: Chunk, state: BlockState, scratch: Pair, *, bound: float | None
    ) -> None:
        """Make live what has landed for the chunk's tiles, and carry their moments along."""
        device = chunk.extent.device
        for tile in chunk.tiles:
            unit = unit_of(tile)
            landings = self._landings.pop(unit, ())
            blocks = slice(tile.start - chunk.start, tile.stop - chunk.start)
            stored = {name: tensor[blocks] for name, tensor in state.items()} if landings else {}
            for landing in landings:
                if len(landing.outcome.kept) < landing.outcome.count:
                    try:
                        fresh = self._stager.on_device(landing.flight, device)
                    except StoreError:
                        self._lose(unit, landing.flight)
                        continue
                    own = with_own_factors(chunk.extent, tile, stored)
                    part, gate = widened(own, chunk.extent.dtype), None
                    fresh = [None if b is None else b.to(chunk.extent.dtype) for b in fresh]
                    if landing.outcome.pending is not None:
                        fresh, gate = chosen(part, fresh, landing.outcome.pending)
                        fresh = as_stored(fresh, stored)
                    pair = (scratch[0][blocks], scratch[1][blocks])
                    rule = chunk.extent.rule
                    rotate_(rule, part, fresh, scratch=pair, gate=gate, bound=bound)
                    for mode, basis in enumerate(fresh):
                        if basis is not None:
                            stored[f"basis_{mode}"].copy_(basis)
                self._landed(unit, landing)

    def _lose(self, unit: Unit, flight: Flight[Refreshed]) -> None:
        """A disk did not give back what the refresh started from, or ended with."""
        self.pipeline.land(unit, flight)
        self._stager.drop(flight)
        self._units[unit].attempted = flight.version
        self._units.judge(unit, ["lost on disk"])

    def _landed(self, unit: Unit, landing: _Landing) -> None:
        flight, outcome = landing
        self.pipeline.land(unit, flight)
        self._stager.drop(flight)
        if self._trace is not None and flight.job.worker:
            job = flight.job
            self._trace.span(job.worker, job.name, job.started_ns, job.ended_ns)
        self._counters.worker_s += flight.job.wall_s
        reasons = outcome.kept
        if self._exchange.owns(unit):
            self._counters.refreshes += outcome.count
            self._counters.refresh_cost += unit.record.route.tiles[unit.ordinal].refresh_cost
        self._counters.installs += outcome.count - len(reasons)
        self._counters.retried_refreshes += sum(found.retried for found in outcome.failures)
        memory, before = self._units[unit], unit.record.versions[unit.ordinal]
        memory.turned = outcome.turned
        if len(reasons) < outcome.count:
            self._units.installed(unit, flight.version)
        else:
            memory.attempted = flight.version
        if outcome.pending is None:
            self._units.judge(unit, reasons)
            return
        pending, counters, pace = outcome.pending, self._counters, self._governor.pace

        def told() -> None:
            counters.device_s += pending.seconds()
            pace.worked_aside(unit, pending.method, pending.seconds())

        self._verdicts.expect(
            unit, pending.report(), before=before, version=flight.version, told=told
        )

    def forget_older(self, chunk: Chunk) -> None:
        """Drop what is in flight for the chunk's tiles, which have just been refreshed."""
        for tile in chunk.tiles:
            self._forget(unit_of(tile))

    def _forget(self, unit: Unit) -> None:
        for flight in self.pipeline.flights(unit):
            self._drop(flight)
        self.pipeline.forget(unit)

    def _drop(self, flight: Flight[Refreshed]) -> None:
        self._stager.drop(flight)
        self._exchange.dropped(flight)

    def restore(self, record: ParameterRecord, saved: Mapping[str, Tensor]) -> None:
        """Take up what was in flight when ``saved`` was made."""
        link, staleness = self._stager.link(record.device), self._config.staleness
        take_up(record, saved, self.pipeline, link, staleness_steps=staleness)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
