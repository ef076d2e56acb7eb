"""Which refreshes begin after an update, and where: with the workers, or beside the training."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from asteria.config.runtime import RuntimeConfig
from asteria.linalg.method import Method, chosen_method
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.refresh.schedule import is_due
from asteria.runtime.choices import choice_of, method_aside
from asteria.runtime.chunks import Chunk
from asteria.runtime.device_refresh import DeviceRefresher
from asteria.runtime.host_refresh import Refreshed, host_work, nothing_new
from asteria.runtime.records import Tile
from asteria.runtime.results import Exchange
from asteria.runtime.staging import Stager
from asteria.runtime.units import Unit, Units, unit_of
from asteria.telemetry.counters import Counters
from asteria.telemetry.phases import phase

__all__ = ["Launcher"]

_NO_MEMORY = "no memory on the device"


class Launcher:
    """Launches refreshes of single units. For the training thread."""

    def __init__(
        self,
        config: RuntimeConfig,
        counters: Counters,
        units: Units,
        pipeline: Pipeline[Unit, Refreshed],
        stager: Stager,
        clock: Callable[[], float],
        exchange: Exchange,
    ) -> None:
        """``clock`` tells seconds as `time.perf_counter`."""
        self._config = config
        self._counters = counters
        self._units = units
        self._pipeline = pipeline
        self._stager = stager
        self._clock = clock
        self._exchange = exchange
        self.landing: Callable[[Unit], int] = lambda unit: 0
        """How many flights of a unit land at this step."""
        self._devices = DeviceRefresher()
        self._first_launch_s: float | None = None
        self._launched: list[tuple[Unit, Flight[Refreshed]]] = []
        """Since `begin_step`."""

    def begin_step(self) -> Callable[[], None]:
        """How to take back the launches from now to the next step."""
        launched: list[tuple[Unit, Flight[Refreshed]]] = []
        self._launched = launched

        def undo() -> None:
            for unit, flight in launched:
                self._stager.drop(flight)
                self._exchange.dropped(flight)
                self._pipeline.cancel(unit, flight)

        return undo

    def launches(self, chunk: Chunk) -> bool:
        """Whether anything is due after this update of the chunk."""
        return any(self._is_due(tile, chunk) for tile in chunk.tiles)

    def _is_due(self, tile: Tile, chunk: Chunk) -> bool:
        unit, step = unit_of(tile), chunk.steps + 1
        period, latest = self._period(tile, chunk), self._latest(unit)
        # However the schedule has changed, no more are in flight than a checkpoint has places for.
        aloft = len(self._pipeline.flights(unit)) - self.landing(unit)
        if aloft and step - latest < period:
            return False
        phase = self._units[unit].phase
        return step > latest and is_due(step, period=period, phase=phase, version=latest)

    def launch_held(self, chunk: Chunk, *, prompt: bool) -> None:
        """`launch_due` for what starts from fields on their device, as long as they are acquired.

        The rest is launched when they are released.
        """
        aside: dict[Method, list[Tile]] = {}
        for tile in chunk.tiles:
            method = self._method_aside(tile, chunk)
            if method is not None and self._is_due(tile, chunk):
                aside.setdefault(method, []).append(tile)
        for method, tiles in aside.items():
            lands = self._landing(chunk, prompt=prompt)
            self._launch_aside(chunk, tiles, method=method, lands=lands)
        if self._stager.link(chunk.extent.device).travels:
            self.launch_due(chunk, prompt=prompt)

    @phase("launch")
    def launch_due(self, chunk: Chunk, *, prompt: bool) -> None:
        """Begin the refreshes of the chunk's tiles that are due after this update.

        With ``prompt`` they are installed before the next update, without staleness.
        """
        for tile in chunk.tiles:
            if self._is_due(tile, chunk):
                self._launch(chunk, tile, lands=self._landing(chunk, prompt=prompt))

    def _landing(self, chunk: Chunk, *, prompt: bool) -> int:
        """Steps of the units after which what is launched now is installed."""
        return chunk.steps + 1 + (0 if prompt else self._config.staleness)

    def _method_aside(self, tile: Tile, chunk: Chunk) -> Method | None:
        """By which the tile is refreshed on its device; None where a worker does it."""
        turn = (chunk.steps + 1) // self._period(tile, chunk)
        method = self._method(tile)
        return method_aside(self._config, chunk.hyper, tile, method=method, turn=turn)

    def _period(self, tile: Tile, chunk: Chunk) -> int:
        choice = choice_of(self._config, chunk.hyper, chunk.extent.device, tile.plan.shape.dims)
        asked = chunk.hyper.precondition_frequency
        return asked if choice is None or choice.period is None else min(asked, choice.period)

    def _launch_aside(self, chunk: Chunk, tiles: list[Tile], *, method: Method, lands: int) -> None:
        step = chunk.steps + 1
        flights: dict[Unit, Flight[Refreshed]] = {}
        mine = [tile for tile in tiles if self._exchange.owns(unit_of(tile))]
        try:
            if mine:
                flights = dict(self._begin_aside(chunk, mine, method=method, lands=lands))
        except torch.OutOfMemoryError:
            if not self._exchange.shares(chunk.tiles[0].record):
                for unit in map(unit_of, mine):
                    self._units[unit].attempted = step
                    self._units.judge(unit, [_NO_MEMORY])
                return
        for tile in tiles:
            unit = unit_of(tile)
            if not self._exchange.owns(unit):
                self._expect(chunk, unit, lands=lands)
            elif self._exchange.shares(tile.record):
                # Others must know what has become of it when they install it, so a worker waits.
                work: Callable[[], Refreshed] = functools.partial(
                    nothing_new, tile.plan, _NO_MEMORY
                )
                if unit in flights:
                    work = flights[unit].job.outcome().known
                self._submit(unit, step, work, lands=lands)
            else:
                self._add(unit, flights[unit])

    def _begin_aside(
        self, chunk: Chunk, tiles: list[Tile], *, method: Method, lands: int
    ) -> list[tuple[Unit, Flight[Refreshed]]]:
        return self._devices.launch(
            chunk,
            tiles,
            method=method,
            version=chunk.steps + 1,
            lands=lands,
            copy_bases=any(self._may_be_replaced(tile, chunk) for tile in tiles),
        )

    def _launch(self, chunk: Chunk, tile: Tile, *, lands: int) -> None:
        step, unit = chunk.steps + 1, unit_of(tile)
        if not self._exchange.owns(unit):
            self._expect(chunk, unit, lands=lands)
            return
        work = host_work(
            chunk,
            tile,
            self._stager.link(chunk.extent.device),
            copy_bases=self._may_be_replaced(tile, chunk),
            method=self._method(tile),
            # What all ranks are to have, no disk may lose for one of them.
            in_memory=self._exchange.shares(tile.record),
        )
        if self._first_launch_s is None:
            self._first_launch_s = self._clock()
        self._submit(unit, step, work, lands=lands)

    def _submit(self, unit: Unit, step: int, work: Callable[[], Refreshed], *, lands: int) -> None:
        """Let a worker do it, and all ranks have what comes of it."""
        # Units count steps of their own; what is urgent is told by those of the optimizer.
        urgency = (self._counters.steps + lands - step, -self._units[unit].turned)
        number, then = self._exchange.own(unit, step)
        flight = self._pipeline.launch(
            unit, step, work, lands=lands, urgency=urgency, number=number, then=then
        )
        self._launched.append((unit, flight))

    def _expect(self, chunk: Chunk, unit: Unit, *, lands: int) -> None:
        """Another rank does it."""
        step, link = chunk.steps + 1, self._stager.link(chunk.extent.device)
        number, job = self._exchange.expect(unit, step, link)
        self._add(unit, Flight(step, lands, job, number))

    def _add(self, unit: Unit, flight: Flight[Refreshed]) -> None:
        self._pipeline.add(unit, flight)
        self._launched.append((unit, flight))

    def _may_be_replaced(self, tile: Tile, chunk: Chunk) -> bool:
        """Whether an earlier refresh may be installed before the next one begins."""
        period = self._period(tile, chunk)
        return self._config.staleness >= period or bool(self._pipeline.flights(unit_of(tile)))

    def utilization(self) -> float:
        """Share of the workers' time since the first launch that went into installed results."""
        if self._first_launch_s is None:
            return 0.0
        elapsed_s = self._clock() - self._first_launch_s
        return self._counters.worker_s / max(elapsed_s * self._pipeline.executor.size, 1e-9)

    def _latest(self, unit: Unit) -> int:
        """Version of the newest refresh, in flight or in use."""
        flights = self._pipeline.flights(unit)
        return flights[-1].version if flights else self._units.latest(unit)

    def _method(self, tile: Tile) -> Method:
        config, first = self._config, self._latest(unit_of(tile)) <= tile.record.born
        return chosen_method(config.method, start=config.start, first=first)
