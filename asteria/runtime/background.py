"""Eigenbases computed by worker threads from snapshots, and installed between two updates."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair, bases, factors
from asteria.config.runtime import RuntimeConfig
from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.refresh.pool import Executor
from asteria.refresh.schedule import is_due
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.governor import Governor
from asteria.runtime.host_refresh import Refreshed, refresh_job
from asteria.runtime.records import ParameterRecord, state_dtype
from asteria.runtime.shadows import pack, unpack
from asteria.runtime.staging import Stager
from asteria.runtime.units import Unit, Units
from asteria.telemetry.counters import Counters
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

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """Drop what is in flight for ``records``."""
        gone = set(records)
        for unit in self.pipeline.units():
            if unit.record in gone:
                self._forget(unit)
        for record in gone:
            self._stager.unwatch(record)

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

    @property
    def has_landings(self) -> bool:
        """Whether the latest `collect` has found anything to install."""
        return bool(self._landings)

    def install_(
        self, chunk: Chunk, state: BlockState, scratch: Pair, *, bound: float | None
    ) -> None:
        """Make live what has landed for the chunk's tiles, and carry their moments along."""
        device = chunk.extent.stack.device
        for tile in chunk.tiles:
            unit = Unit(tile.record, tile.plan.ordinal)
            landings = self._landings.pop(unit, ())
            blocks = slice(tile.start - chunk.start, tile.stop - chunk.start)
            part = {name: tensor[blocks] for name, tensor in state.items()} if landings else {}
            for landing in landings:
                if len(landing.outcome.kept) < landing.outcome.count:
                    fresh = self._stager.on_device(landing.flight, device)
                    pair = (scratch[0][blocks], scratch[1][blocks])
                    chunk.extent.rule.rotate_(part, fresh, scratch=pair, gate=None, bound=bound)
                    for mode, basis in enumerate(fresh):
                        if basis is not None:
                            part[f"basis_{mode}"].copy_(basis)
                self._landed(unit, landing)

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
            self._units.replaced(unit, flight.version, last_use=unit.record.steps)
        else:
            memory.attempted = flight.version
        self._units.judge(unit, reasons)

    def launch_due(self, chunk: Chunk, state: BlockState, *, prompt: bool) -> None:
        """Begin the refreshes of the chunk's tiles that are due after this update.

        With ``prompt`` they are installed before the next update, without staleness.
        """
        step, period = chunk.steps + 1, chunk.hyper.precondition_frequency
        rank = len(chunk.extent.shape.dims)
        for tile in chunk.tiles:
            unit = Unit(tile.record, tile.plan.ordinal)
            memory, latest = self._units[unit], self._latest(unit)
            if step <= latest or not is_due(
                step, period=period, phase=memory.phase, version=latest
            ):
                continue
            blocks = slice(tile.start - chunk.start, tile.stop - chunk.start)
            part = {name: tensor[blocks] for name, tensor in state.items()}
            work = refresh_job(
                self._stager.link(chunk.extent.stack.device),
                factors(part, rank),
                bases(part, rank),
                exact=self._is_exact(latest),
                sort=chunk.extent.rule.sorts_columns,
                # An earlier refresh may be installed before this one begins.
                copy_bases=self._config.staleness >= period or bool(self.pipeline.flights(unit)),
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

    def _is_exact(self, latest: int) -> bool:
        first = self._config.start == "adam" and latest == 0
        return first or self._config.refresh_method == "eigh"

    def forget_older(self, chunk: Chunk) -> None:
        """Drop what is in flight for the chunk's tiles, which have just been refreshed."""
        for tile in chunk.tiles:
            self._forget(Unit(tile.record, tile.plan.ordinal))

    def _forget(self, unit: Unit) -> None:
        for flight in self.pipeline.flights(unit):
            self._stager.drop(flight)
        self.pipeline.forget(unit)

    def shadows(self, record: ParameterRecord) -> dict[str, Tensor]:
        """What is in flight for ``record``, as state tensors; waits for the workers.

        Without refreshes that raised: the step at which they land tells of them.
        """
        entries: dict[str, Tensor] = {}
        for ordinal in range(len(record.route.tiles)):
            flights = [f for f in self.pipeline.finished(Unit(record, ordinal)) if f.job.succeeded]
            for position, flight in enumerate(flights):
                entries |= pack(ordinal, position, flight, flight.job.outcome().bases)
        return entries

    def restore(self, record: ParameterRecord, saved: Mapping[str, Tensor]) -> None:
        """Take up what was in flight when ``saved`` was made."""
        link = self._stager.link(record.device)
        for ordinal, (version, lands), shadow in unpack(
            record.route, saved, state_dtype(record.parameter)
        ):
            outcome = Refreshed([None if b is None else link.outgoing(b) for b in shadow], [], 0.0)
            unit = Unit(record, ordinal)
            job = Job.finished(outcome, name=f"saved refresh of {unit} at step {version}")
            lands = min(lands, version + self._config.staleness)
            self.pipeline.add(unit, Flight(version, lands, job))


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
