"""What a step does with one chunk of blocks: install, update, accumulate, refresh or launch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from torch import Tensor

from asteria.algorithms.adam import largest_ratio
from asteria.config.hyperparameters import Hyperparameters
from asteria.config.runtime import RuntimeConfig
from asteria.errors import StoreError
from asteria.linalg.method import chosen_method
from asteria.refresh.schedule import is_due, is_young_step, young_steps
from asteria.runtime.background import BackgroundRefresher
from asteria.runtime.chunks import Chunk, Update
from asteria.runtime.claims import ledger_steps
from asteria.runtime.governor import Governor
from asteria.runtime.guard import gate_on
from asteria.runtime.inside import InsideRefresher
from asteria.runtime.records import ParameterRecord, Tile
from asteria.runtime.turning import moved_lives
from asteria.runtime.units import Unit, Units, unit_of
from asteria.runtime.updater import Updater, moves
from asteria.store.cell import Cell
from asteria.store.layout import Life
from asteria.telemetry.counters import Counters
from asteria.telemetry.phases import phase
from asteria.telemetry.trace import Trace

__all__ = ["Stepper"]


class Stepper:
    """Takes chunks through a step, one after the other. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        units: Units,
        inside: InsideRefresher,
        background: BackgroundRefresher | None,
        governor: Governor,
        clock: Callable[[], float],
        trace: Trace | None,
    ) -> None:
        self._config = config
        self._counters = counters
        self._units = units
        self._inside = inside
        self._background = background
        self._governor = governor
        self._clock = clock
        self._trace = trace
        self._updater = Updater(config.start)
        self._done: dict[ParameterRecord, set[Unit]] = {}
        """Tiles of records that an interrupted step has begun and not ended."""
        self._round_s = 0.0

    @property
    def was_interrupted(self) -> bool:
        """Whether there are tiles that `is_done` is to be asked for."""
        return bool(self._done)

    def is_done(self, tile: Tile) -> bool:
        """Whether an interrupted step has taken care of the tile."""
        return unit_of(tile) in self._done.get(tile.record, ())

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        gone = set(records)
        self._inside.forget(gone)
        for record in gone:
            self._done.pop(record, None)

    def step(
        self,
        work: Sequence[Chunk],
        updates: Mapping[ParameterRecord, Update],
        gate: Tensor | None,
        ended: list[ParameterRecord],
    ) -> None:
        """Take all chunks through a step, each as a whole or not at all.

        ``ended`` takes the records all of whose tiles are done, also if an error ends the step.
        """
        self._round_s = 0.0
        try:
            for chunk in work:
                if self._can_defer(chunk, gate):
                    self._updater.defer(chunk, updates)
                else:
                    self._updater.run()
                    self._step_chunk(chunk, updates, gate)
                ended += _ended(chunk, self._done)
        finally:
            self._updater.run()
        if self._round_s:
            self._governor.pace.refreshed_inside(self._round_s)

    def _can_defer(self, chunk: Chunk, gate: Tensor | None) -> bool:
        """Whether the chunk's step is an update and nothing else, which may be done later."""
        return (
            self._updater.can_defer(chunk, gate)
            and not self._refreshes(chunk)
            and not self._lands_on(chunk)
        )

    def _step_chunk(
        self, chunk: Chunk, updates: Mapping[ParameterRecord, Update], gate: Tensor | None
    ) -> None:
        extent, lives = chunk.extent, self._lives(chunk)
        changed: set[Life] = set()
        prompt = None
        extent.acquire(lives)
        try:
            if Life.SUM in lives and extent.ledger is not None and len(extent.ledger):
                changed.add(Life.SUM)  # also if it fails in the middle
                extent.fold()
            if Life.SUM not in lives and extent.ledger is not None:
                self._updater.open(chunk, extent.ledger)
            if self._lands_on(chunk):
                self._install_(chunk)
                changed.update(moved_lives(extent.rule))
            if not chunk.begun:
                self._begin_(chunk, lives, gate)
            refreshes = self._refreshes(chunk)
            changed.update(self._updater.update_(chunk, lives, updates, gate))
            if refreshes:
                prompt = self._refresh_(chunk, gate, changed)
            if prompt is not None:
                self._asynchronous.launcher.launch_held(chunk, prompt=prompt)
        except StoreError:
            raise  # which comes before anything else has changed
        except BaseException:
            changed = set(lives)  # nobody knows how far it has come
            raise
        finally:
            if extent.ledger is not None:
                extent.ledger.close()
            extent.release(lives, changed)
        if prompt is not None:
            self._asynchronous.launcher.launch_due(chunk, prompt=prompt)

    def finish(self) -> None:
        """Install the bases that this step or the one before it has computed with other ranks.

        Raises CoherenceError where a rank does not deliver, and StoreError; the next call goes on.
        Raises what a computation raised, for which the basis in use stays.
        """
        start = self._clock()
        self._inside.finish(self._updater.pair)
        self._counters.refresh_s += self._clock() - start

    def cells(self, chunk: Chunk) -> list[Cell]:
        """What the chunk's next step is going to acquire, in order."""
        lives, extent = self._lives(chunk), chunk.extent
        notes = extent.ledger.cells() if extent.ledger is not None and Life.SUM in lives else []
        return extent.cells_of(lives) + notes

    def _lives(self, chunk: Chunk) -> list[Life]:
        """What the chunk's next step needs: the factors may wait until a refresh wants them."""
        extent = chunk.extent
        if extent.ledger is None or not chunk.begun or self._wants_factors(chunk):
            return list(extent.cells)
        return [life for life in extent.cells if life is not Life.SUM]

    def _wants_factors(self, chunk: Chunk) -> bool:
        extent = chunk.extent
        if extent.ledger is not None:
            most = ledger_steps(extent.key, extent.period)
            if len(extent.ledger) + 1 >= most:
                return True
            if extent.rule.in_bases and self._lands_on(chunk):
                return True
        return self._refreshes(chunk)

    def _lands_on(self, chunk: Chunk) -> bool:
        """Whether the chunk's step begins with the install of a refresh."""
        return self._background is not None and self._background.lands_on(chunk)

    def _refreshes(self, chunk: Chunk) -> bool:
        """Whether the chunk is refreshed after the update, at once or by a launch.

        The same on all ranks, be the factors elsewhere.
        """
        if not (chunk.extent.rule.has_bases and moves(self._config.start, chunk)):
            return False
        if self._refreshes_now(chunk):
            return True
        return self._background is not None and self._background.launcher.launches(chunk)

    def _refreshes_now(self, chunk: Chunk) -> bool:
        """Whether the step refreshes the chunk after the update, before it ends."""
        hyper, step = chunk.hyper, chunk.steps + 1
        if self._is_young(chunk) and is_young_step(chunk.age + 1, hyper.young_stride):
            return True
        if self._background is not None:
            return False
        period = hyper.precondition_frequency
        oldest = min([tile.record.versions[tile.plan.ordinal] for tile in chunk.tiles])
        if not is_due(step, period=period, version=oldest):
            return False
        latest = min(self._units.latest(unit_of(tile)) for tile in chunk.tiles)
        return is_due(step, period=period, version=latest)

    def _is_young(self, chunk: Chunk) -> bool:
        steps = young_steps(chunk.hyper.shampoo_beta)
        return self._config.start == "fresh" and chunk.age + 1 < steps

    @property
    def _asynchronous(self) -> BackgroundRefresher:
        if self._background is None:
            raise RuntimeError("there are no refreshes beside the training")
        return self._background

    @phase("install")
    def _install_(self, chunk: Chunk) -> None:
        start = self._clock()
        bound = _bound(self._config.start, chunk.hyper)
        pair = self._updater.pair(chunk)
        state = chunk.state(moved_lives(chunk.extent.rule))
        self._asynchronous.install_(chunk, state, pair, bound=bound)
        end = self._clock()
        self._counters.install_s += end - start
        self._draw("installs", "install", start, end)

    @phase("first_bases")
    def _begin_(self, chunk: Chunk, lives: Sequence[Life], gate: Tensor | None) -> None:
        """First statistics and bases."""
        self._updater.begin_(chunk, lives, gate)
        start = self._clock()
        self._inside.begin_(chunk, lives, self._updater.pair)
        if chunk.has_moments:
            self._updater.project_(chunk, lives)
        end = self._clock()
        self._counters.refresh_s += end - start
        self._governor.pace.made_bases(end - start)
        self._draw("step", "first bases", start, end)

    def _refresh_(self, chunk: Chunk, gate: Tensor | None, changed: set[Life]) -> bool | None:
        """Refresh at once, after the update, if its step says so.

        Otherwise returns whether what is launched now is to be prompt; None if nothing is.
        """
        if self._refreshes_now(chunk):
            if self._is_young(chunk) and is_young_step(chunk.age + 1, chunk.hyper.young_stride):
                self._counters.young_steps.add(self._counters.steps)
            self._refresh_now_(chunk, gate)
            changed.update(moved_lives(chunk.extent.rule))
            if self._background is not None:
                self._background.forget_older(chunk)
            return None
        if self._background is None:
            return None
        # Where early rounds are too dear to take place, early waits are as well.
        return self._is_young(chunk) and chunk.hyper.young_stride == 1

    @phase("refresh")
    def _refresh_now_(self, chunk: Chunk, gate: Tensor | None) -> None:
        start = self._clock()
        first = all(t.record.versions[t.plan.ordinal] <= t.record.born for t in chunk.tiles)
        config = self._config
        method = chosen_method(config.method, start=config.start, first=first)
        gate = gate_on(gate, chunk.extent.device, chunk.extent.dtype)
        bound = _bound(self._config.start, chunk.hyper)
        self._inside.refresh_(chunk, self._updater.pair, gate, method=method, bound=bound)
        end = self._clock()
        self._counters.refresh_s += end - start
        self._round_s += end - start
        self._draw("step", "refresh inside the step", start, end)

    def _draw(self, lane: str, name: str, start_s: float, end_s: float) -> None:
        if self._trace is not None:
            self._trace.span(lane, name, int(start_s * 1e9), int(end_s * 1e9))


def _ended(chunk: Chunk, done: dict[ParameterRecord, set[Unit]]) -> Iterator[ParameterRecord]:
    """Records of which nothing is left to do after the chunk; ``done`` keeps what is, of others."""
    for tile in chunk.tiles:
        record = tile.record
        if len(record.route.tiles) > 1:
            units = done.setdefault(record, set())
            units.add(unit_of(tile))
            if len(units) < len(record.route.tiles):
                continue
            del done[record]
        yield record


def _bound(start: str, hyper: Hyperparameters) -> float | None:
    """Of the ratio of the moments; the published code lets it grow without bound."""
    return None if start == "eigh" else largest_ratio(hyper)
