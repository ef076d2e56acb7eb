"""Eigenbases computed by worker threads from snapshots, and installed between two updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair
from asteria.config.runtime import RuntimeConfig
from asteria.errors import StoreError
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.refresh.pool import Executor
from asteria.refresh.schedule import is_due
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.governor import Governor
from asteria.runtime.host_refresh import Refreshed, refresh_job
from asteria.runtime.records import ParameterRecord, Tile
from asteria.runtime.rows import rotate_
from asteria.runtime.shadows import show_flights, take_up
from asteria.runtime.snapshots import take_snapshots, way_back
from asteria.runtime.staging import Stager
from asteria.runtime.units import Unit, Units, unit_of
from asteria.telemetry.counters import Counters
from asteria.telemetry.phases import phase
from asteria.telemetry.trace import Trace

__all__ = ["BackgroundRefresher"]


class _Landing(NamedTuple):
    flight: Flight[Refreshed]
    outcome: Refreshed


class BackgroundRefresher:
    """Launches refreshes of single units and installs them. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        units: Units,
        executor: Executor,
        clock: Callable[[], float],
        trace: Trace | None,
    ) -> None:
        """``config.staleness`` is at least 1; ``clock`` tells seconds as `time.perf_counter`."""
        self._config = config
        self._counters = counters
        self._units = units
        self._clock = clock
        self._trace = trace
        self._first_launch_s: float | None = None
        self.pipeline: Pipeline[Unit, Refreshed] = Pipeline(
            executor, ready=config.install == "ready", clock=clock
        )
        self._landings: dict[Unit, list[_Landing]] = {}
        self._overdue_s = 0.0
        self._stager = Stager(self.pipeline)
        self._launched: list[tuple[Unit, Flight[Refreshed]]] = []
        """Since `begin_step`."""

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
    def collect(self, updates: Mapping[ParameterRecord, Update], governor: Governor) -> None:
        """Take in what lands before this update; waits at the bound.

        Raises what a worker raised. Nothing has changed then: the failed refresh is gone, and the
        basis in use stays in use.
        """
        self._landings.clear()
        waits, begin_s = self.pipeline.waits, self._clock()
        before_s, self._overdue_s = waits.seconds, 0.0
        try:
            for unit in self.pipeline.units():
                if unit.record in updates:
                    self._collect(unit, governor)
        finally:
            waited_s = waits.seconds - before_s
            governor.waited(waited_s, overdue_s=self._overdue_s)
            if self._trace is not None and waited_s:
                self._trace.span("waits", "wait", _ns(begin_s), _ns(self._clock()))

    def _collect(self, unit: Unit, governor: Governor) -> None:
        before_s, flights = self.pipeline.waits.seconds, self.pipeline.flights(unit)
        try:
            due = self.pipeline.due(unit, unit.record.steps)
        finally:
            # A refresh of young factors lands at once: to wait for it is no sign of a slow host.
            if any(flight.lands > flight.version for flight in flights):
                self._overdue_s += self.pipeline.waits.seconds - before_s
        for flight in due:
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
                governor.pace.worked(unit, flight.job.wall_s)
            self._landings.setdefault(unit, []).append(landing)

    def begin_step(self) -> Callable[[], None]:
        """How to take back the launches from now to the next step."""
        launched: list[tuple[Unit, Flight[Refreshed]]] = []
        self._launched = launched

        def undo() -> None:
            for unit, flight in launched:
                self._stager.drop(flight)
                self.pipeline.cancel(unit, flight)

        return undo

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
            part = {name: tensor[blocks] for name, tensor in state.items()} if landings else {}
            for landing in landings:
                if len(landing.outcome.kept) < landing.outcome.count:
                    try:
                        fresh = self._stager.on_device(landing.flight, device)
                    except StoreError:
                        self._lose(unit, landing.flight)
                        continue
                    pair = (scratch[0][blocks], scratch[1][blocks])
                    rule = chunk.extent.rule
                    rotate_(rule, part, fresh, scratch=pair, gate=None, bound=bound)
                    for mode, basis in enumerate(fresh):
                        if basis is not None:
                            part[f"basis_{mode}"].copy_(basis)
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
        self._counters.refreshes += outcome.count
        self._counters.installs += outcome.count - len(reasons)
        self._counters.retried_refreshes += sum(found.retried for found in outcome.failures)
        memory = self._units[unit]
        memory.turned = outcome.turned
        if len(reasons) < outcome.count:
            self._units.installed(unit, flight.version)
        else:
            memory.attempted = flight.version
        self._units.judge(unit, reasons)

    def launches(self, chunk: Chunk) -> bool:
        """Whether anything is due after this update of the chunk."""
        return any(self._is_due(tile, chunk) for tile in chunk.tiles)

    def _is_due(self, tile: Tile, chunk: Chunk) -> bool:
        unit, step = unit_of(tile), chunk.steps + 1
        period, latest = chunk.hyper.precondition_frequency, self._latest(unit)
        # However the schedule has changed, no more are in flight than a checkpoint has places for.
        if self.pipeline.flights(unit) and step - latest < period:
            return False
        phase = self._units[unit].phase
        return step > latest and is_due(step, period=period, phase=phase, version=latest)

    def copies_from_device(self, chunk: Chunk) -> bool:
        """Whether `launch_due` needs the chunk's fields on their device."""
        return self._stager.link(chunk.extent.device).travels

    @phase("launch")
    def launch_due(self, chunk: Chunk, *, prompt: bool) -> None:
        """Begin the refreshes of the chunk's tiles that are due after this update.

        With ``prompt`` they are installed before the next update, without staleness.
        """
        step, period = chunk.steps + 1, chunk.hyper.precondition_frequency
        for tile in chunk.tiles:
            if not self._is_due(tile, chunk):
                continue
            unit = unit_of(tile)
            memory, latest = self._units[unit], self._latest(unit)
            link = self._stager.link(chunk.extent.device)
            snapshots = take_snapshots(
                chunk.extent,
                tile,
                link,
                # An earlier refresh may be installed before this one begins.
                copy_bases=self._config.staleness >= period or bool(self.pipeline.flights(unit)),
            )
            work = refresh_job(
                snapshots,
                way_back(chunk.extent, link),
                exact=self._is_exact(latest <= tile.record.born),
                sort=chunk.extent.rule.sorts_columns,
            )
            if self._first_launch_s is None:
                self._first_launch_s = self._clock()
            lands = step if prompt else step + self._config.staleness
            # Units count steps of their own; what is urgent is told by those of the optimizer.
            urgency = (self._counters.steps + lands - step, -memory.turned)
            flight = self.pipeline.launch(unit, step, work, lands=lands, urgency=urgency)
            self._launched.append((unit, flight))

    def utilization(self) -> float:
        """Share of the workers' time since the first launch that went into installed results."""
        if self._first_launch_s is None:
            return 0.0
        elapsed_s = self._clock() - self._first_launch_s
        return self._counters.worker_s / max(elapsed_s * self.pipeline.executor.size, 1e-9)

    def _latest(self, unit: Unit) -> int:
        """Version of the newest refresh, in flight or in use."""
        flights = self.pipeline.flights(unit)
        return flights[-1].version if flights else self._units.latest(unit)

    def _is_exact(self, first: bool) -> bool:
        begun = self._config.start == "adam" and first
        return begun or self._config.refresh_method == "eigh"

    def forget_older(self, chunk: Chunk) -> None:
        """Drop what is in flight for the chunk's tiles, which have just been refreshed."""
        for tile in chunk.tiles:
            self._forget(unit_of(tile))

    def _forget(self, unit: Unit) -> None:
        for flight in self.pipeline.flights(unit):
            self._stager.drop(flight)
        self.pipeline.forget(unit)

    def restore(self, record: ParameterRecord, saved: Mapping[str, Tensor]) -> None:
        """Take up what was in flight when ``saved`` was made."""
        link, staleness = self._stager.link(record.device), self._config.staleness
        take_up(record, saved, self.pipeline, link, staleness_steps=staleness)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
