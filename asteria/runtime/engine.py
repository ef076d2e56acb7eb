"""The step: from gradients to weights, block by block."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from asteria.config.runtime import RuntimeConfig
from asteria.linalg.precision import without_autocast
from asteria.refresh.pool import Executor, WorkerPool, jobs_and_threads
from asteria.refresh.threads import free_cores
from asteria.runtime.admission import Extents, admit, check_room, discard
from asteria.runtime.answers import Answers
from asteria.runtime.background import BackgroundRefresher
from asteria.runtime.choices import shortest_period
from asteria.runtime.chunks import Update, chunks
from asteria.runtime.consent import Consent
from asteria.runtime.extents import Extent
from asteria.runtime.foresight import Foresight
from asteria.runtime.governor import Governor
from asteria.runtime.inside import InsideRefresher
from asteria.runtime.judge import Judge
from asteria.runtime.peers import Member, Peers
from asteria.runtime.placer import Placer
from asteria.runtime.records import ParameterRecord
from asteria.runtime.residence import Residence
from asteria.runtime.results import Exchange
from asteria.runtime.shadows import show_flights
from asteria.runtime.sharded import ShardedParameters
from asteria.runtime.show import show
from asteria.runtime.stepper import Stepper
from asteria.runtime.summary import summarize
from asteria.runtime.units import Units
from asteria.runtime.updater import moves_at_once
from asteria.runtime.verdicts import Verdicts
from asteria.telemetry.counters import Counters, Stats
from asteria.telemetry.trace import Trace, Watch

__all__ = ["Engine"]


class Engine(Judge):
    """State and step of one optimizer. Every method is for the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.perf_counter,
        residence: Residence | None = None,
        peers: Peers | None = None,
    ) -> None:
        """``executor`` does asynchronous refreshes, by default worker threads; ``clock`` in s.

        Raises StoreError if ``config.nvme_path`` cannot be used.
        """
        counters = Counters()
        self._units = Units(counters, max_failures=config.max_failures)
        super().__init__(
            config,
            counters,
            Verdicts(counters, self._units),
            peers or Peers(config),
            ShardedParameters(config.start, node_size=config.node_size),
        )
        self._clock = clock
        self._extents: Extents = {}
        self._ended: set[ParameterRecord] = set()
        """Whose step is complete, of a step that was interrupted."""
        self._trace = None if config.trace is None else Trace(config.trace)
        exchange = Exchange(self._peers)
        known = config, self._counters, self._units, self._verdicts
        watch = Watch(clock, self._trace)
        # Without staleness the step would wait for every result at once.
        beside = config.refresh == "async" and config.staleness > 0
        workers = config.workers or free_cores(_training_threads())
        executor = (executor or WorkerPool(workers)) if beside else None
        jobs = 0 if executor is None else executor.size
        self._governor = Governor(config, self._units, jobs=jobs)
        self._placer = Placer(
            config, self._governor.pace, jobs=jobs, threads=jobs_and_threads(workers)[1]
        )
        self._background: BackgroundRefresher | None = None
        if executor is not None:
            self._background = BackgroundRefresher(
                *known, self._governor, executor, watch, exchange
            )
        self._residence = residence or Residence(config, refreshes=jobs)
        # With the last reference, not when the garbage collector finds the time: it holds a disk.
        self._tenancy = self._residence.promises.tenancy()
        weakref.finalize(self._tenancy, self._residence.abandon).atexit = False
        self._foresight = Foresight()
        inside = InsideRefresher(*known, exchange)
        self._stepper = Stepper(*known[:3], inside, self._background, self._governor, *watch)

    def _meet(self, members: Callable[[], Iterable[Member]]) -> None:
        self._peers.join(members, Answers(self._extents, self._residence.lock))
        self._residence.sharers = self._peers.neighbours

    def admit(
        self,
        records: list[ParameterRecord],
        saved: Mapping[ParameterRecord, Mapping[str, Tensor]] | None = None,
        members: Callable[[], Iterable[Member]] = tuple,
    ) -> None:
        """Make state for new records, from what was ``saved`` of them if anything was.

        ``members()`` are all parameters of the optimizer, known to the ranks that train the same.
        Raises ConfigError where they train something else, and CoherenceError where they do not
        come to do this too.
        """
        given = {record: values for record, values in (saved or {}).items() if values}
        self._meet(members)
        self._placer.admit()
        records, saved = self._sharded.admit(records, given, self.discard)
        self._residence.gathered_bytes = self._sharded.gathered_bytes
        self._residence.promises.keep()
        with self._residence.lock:
            elsewhere = self._peers.elsewhere
            self._residence.promises.with_room(
                lambda: admit(records, saved, self._extents, self._residence, elsewhere)
            )
        self._foresight.watch(self._all())
        here = {tile.record for extent in self._all() for tile in extent.tiles}
        self._units.admit(here | self._sharded.elsewhere)
        _take_up([record for record in records if record.is_here], saved, self._background)
        self._sharded.show(records)

    def consent(
        self, groups: list[dict[str, Any]], members: Callable[[], Iterable[Member]]
    ) -> Consent:
        """What lets all ranks load a state for ``groups``, or none; meets them, as `admit`."""
        self._meet(members)

        def vote(failed: bool) -> list[int]:
            found = self._sharded.failed_ranks(groups, failed=failed)
            # Who has failed is known where a mesh has told; others learn that somebody has.
            others = self._peers.failed_ranks(failed=failed or bool(found))
            return found or others

        return Consent(vote)

    def agree_on_room(
        self,
        records: list[ParameterRecord],
        groups: list[dict[str, Any]],
        members: Callable[[], Iterable[Member]],
    ) -> None:
        """See `ShardedParameters.agree_on_room`; replicas, which need the same, send nothing."""
        if any(record.sharding is not None for record in records):
            self._meet(members)
            here = {tile.record for extent in self._all() for tile in extent.tiles}
            elsewhere, residence = self._peers.elsewhere, self._residence
            check = partial(check_room, residence=residence, elsewhere=elsewhere)
            self._sharded.agree_on_room(records, here, groups, check)

    def check_room(self, records: list[ParameterRecord]) -> None:
        """Raise StoreFullError unless there is room for the state of ``records``, if alone."""
        check_room([r for r in records if r.is_here], self._residence, self._peers.elsewhere)

    def discard(self, records: list[ParameterRecord]) -> None:
        """Drop the state of records."""
        self._residence.promises.keep()
        if self._background is not None:
            self._background.forget(records)
        self._governor.forget(records)
        self._verdicts.forget(records)
        self._units.discard(records)
        with self._residence.lock:
            discard(records, self._extents, self._residence, self._peers.elsewhere)
        self._foresight.forget(records)
        self._stepper.forget(records)
        self._sharded.forget(records)
        self._ended.difference_update(records)

    def close(self) -> None:
        """Stop the worker threads, which a later step starts again, and complete the trace."""
        if self._background is not None:
            self._background.pipeline.close()
        if self._trace is not None:
            self._trace.close()

    def begin_step(self, groups: list[dict[str, Any]]) -> None:
        """A step begins; decide what is left to us in ``groups``, which are changed in place."""
        shared = self._peers.expected or self._sharded.exist
        self._governor.begin_step(groups, self._clock(), shared=shared)
        if not shared:  # each rank would decide for itself
            measured = self._governor.has_measured
            self._placer.begin_step(groups, self._records, measured=measured)

    def _records(self) -> dict[Tensor, ParameterRecord]:
        tiles = (tile for extent in self._all() for tile in extent.tiles)
        return {tile.record.parameter: tile.record for tile in tiles}

    def stats(self) -> Stats:
        """What was done so far; waits for the device."""
        self.settle()
        return summarize(
            self._counters,
            self._units,
            self._background,
            self._governor,
            self._residence,
            self._sharded.beside(self._peers.network()),
            self._all(),
        )

    def step(self, updates: Mapping[ParameterRecord, Update], gate: Tensor | None) -> None:
        """One step of every parameter in ``updates``, whose gradients are there and accepted.

        Raises RefreshError, or what a worker raised, before anything is changed. A StoreError comes
        in the middle: every parameter is then as before the step or as after it, and the
        next call completes the step for the others. So may a CoherenceError, where another rank
        does not deliver what it has computed in this step, or has failed: the next call goes on.
        """

        def own() -> None:
            with self._residence.lock:
                self._step(updates, gate)

        self._sharded.wholes.step(updates, gate, own, self._ended)

    def _step(self, updates: Mapping[ParameterRecord, Update], gate: Tensor | None) -> None:
        start = self._clock()
        self._residence.promises.keep()
        self._units.report()
        _relieve(self._all(), self._residence, self._foresight)
        self._stepper.finish()
        if self._background is not None:
            self._background.collect(updates)
        begin, counters = self._clock(), self._counters
        before_s = counters.install_s + counters.refresh_s
        undos = [self._units.begin_step()]
        if self._background is not None:
            undos.append(self._background.launcher.begin_step())
        moved: list[ParameterRecord] = []
        if gate is not None:
            self._guard.on_refusal(_undo(moved, undos))
        with without_autocast(extent.device for extent in self._all()):
            self._residence.promises.with_room(lambda: self._take(updates, gate, moved))
            self._stepper.finish()
        end = self._clock()
        counters.update_s += end - begin - (counters.install_s + counters.refresh_s - before_s)
        if self._trace is not None:
            name = f"step {counters.steps}"
            self._trace.span("step", name, int(start * 1e9), int(end * 1e9))

    def _take(
        self,
        updates: Mapping[ParameterRecord, Update],
        gate: Tensor | None,
        moved: list[ParameterRecord],
    ) -> None:
        """Take all chunks through the step; ``moved`` takes the records whose moments advanced."""
        left = (
            {r: u for r, u in updates.items() if r not in self._ended} if self._ended else updates
        )
        stepper, ended = self._stepper, list[ParameterRecord]()
        done = stepper.is_done if stepper.was_interrupted else None
        work = [chunk for extent in self._all() for chunk in chunks(extent, left, done)]
        self._foresight.begin_step(work, stepper.cells)
        try:
            stepper.step(work, updates, gate, ended)
            ended += [record for record in left if not record.is_here]
            self._ended.clear()
        except BaseException:
            self._ended.update(ended)  # which the next call leaves out
            raise
        finally:
            start = self._config.start
            counted = [r for r in ended if r.has_moments or moves_at_once(start, r.route.rule)]
            for record in ended:
                record.begin()
                hyper = updates[record].hyper
                record.refresh_steps = hyper.precondition_frequency
                if hyper.refresh_plan:
                    record.refresh_steps = shortest_period(self._config, hyper, record)
            _count_updates(counted, 1)
            moved += counted
        self._foresight.end_step(work, stepper.cells)

    def _all(self) -> list[Extent]:
        return [extent for cut in self._extents.values() for extent in cut]


def _count_updates(records: list[ParameterRecord], change: int) -> None:
    for record in records:
        record.steps += change
        record.counter[0] += change


def _undo(moved: list[ParameterRecord], parts: list[Callable[[], None]]) -> Callable[[], None]:
    """What takes back the host's part of a step that the device has refused."""

    def undo() -> None:
        _count_updates(moved, -1)
        for undo_part in parts:
            undo_part()

    return undo


def _take_up(
    records: Iterable[ParameterRecord],
    saved: Mapping[ParameterRecord, Mapping[str, Tensor]],
    background: BackgroundRefresher | None,
) -> None:
    """Prepare for refreshes of these records, and go on with those that were saved."""
    for record in records:
        if background is None:
            show_flights(record, None, staleness_steps=0)
            continue
        background.admit([record])
        if record in saved:
            background.restore(record, saved[record])


def _relieve(extents: list[Extent], residence: Residence, foresight: Foresight) -> None:
    """Move state to a lower tier where memory is short."""
    moved = True  # some of it, if it raises
    try:
        moved = residence.relieve(extents)
    finally:
        if moved:
            show(extents, residence.promises)
            foresight.watch(extents)


def _training_threads() -> int:
    """Cores that training keeps busy; on an accelerator it is one thread that launches kernels."""
    return 2 if torch.accelerator.is_available() else torch.get_num_threads()
