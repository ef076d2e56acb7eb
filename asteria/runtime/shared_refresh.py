"""Eigenbases that a step computes itself, each on the rank that keeps the factors.

Every rank computes what it owns while it goes through the chunks, and sends it off. At the end of
the step all install all of it: nobody waits for a chunk that another rank has much to do for.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.eigenbasis import eigh_basis
from asteria.linalg.method import Method, method_of_kept, refreshed
from asteria.linalg.modes import replace_
from asteria.linalg.packed import unpacked
from asteria.linalg.verified import Failures, VerifiedBasis, verified_refresh
from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight, name_of
from asteria.runtime.chunks import Chunk
from asteria.runtime.extents import block_parts
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.inline import factors_of
from asteria.runtime.records import ParameterRecord, Tile
from asteria.runtime.results import Exchange
from asteria.runtime.transfer import HostLink, in_memory
from asteria.runtime.turning import moved_lives, rotate_, turn_first_, with_own_factors
from asteria.runtime.units import Units, unit_of
from asteria.store.layout import Life
from asteria.telemetry.counters import Counters

__all__ = ["SharedRefresher"]


@dataclass(frozen=True, slots=True, eq=False)
class _Pending:
    """A refresh of a tile that is not installed."""

    chunk: Chunk
    tile: Tile
    flight: Flight[Refreshed]
    method: Method | None
    """None for a first basis, which no moment has to follow."""
    gate: Tensor | None
    bound: float | None


class SharedRefresher:
    """Makes and refreshes bases inside the step, with other ranks. For the training thread."""

    def __init__(
        self, config: RuntimeConfig, counters: Counters, units: Units, exchange: Exchange
    ) -> None:
        self._config = config
        self._counters = counters
        self._units = units
        self._exchange = exchange
        self._pending: list[_Pending] = []

    def begin(self, chunk: Chunk) -> None:
        """First bases of a chunk, from its first factors; waits for the device."""
        if self._config.start == "adam" and not chunk.has_moments:
            for name, field in chunk.state([Life.BASIS]).items():
                if name.startswith("basis_"):
                    field.copy_(_identity(field))
            return
        for tile in chunk.tiles if chunk.extent.rule.has_bases else ():
            self._compute(chunk, tile, method=None, gate=None, bound=None)

    def refresh(
        self, chunk: Chunk, gate: Tensor | None, *, method: Method, bound: float | None
    ) -> None:
        """Refresh the bases of a chunk whose fields are acquired; ``bound`` as in `rotate_`."""
        method = method_of_kept(method, in_bases=chunk.extent.rule.in_bases)
        for tile in chunk.tiles:
            self._compute(chunk, tile, method=method, gate=gate, bound=bound)

    def _compute(
        self,
        chunk: Chunk,
        tile: Tile,
        *,
        method: Method | None,
        gate: Tensor | None,
        bound: float | None,
    ) -> None:
        unit, step = unit_of(tile), chunk.steps + 1
        if self._exchange.owns(unit):
            number, then = self._exchange.own(unit, step)
            work = functools.partial(self._computed, chunk, tile, method)
            job = Job(work, name=name_of(unit, step), urgency=(), then=then)
            job.run()
        else:
            number, job = self._exchange.expect(unit, step, HostLink())
        flight = Flight(step, step, job, number)
        self._pending.append(_Pending(chunk, tile, flight, method, gate, bound))

    def _computed(self, chunk: Chunk, tile: Tile, method: Method | None) -> Refreshed:
        extent = chunk.extent
        fields: dict[str, Tensor] = {}
        for life in (Life.SUM, Life.BASIS):
            fields |= extent.cells[life].window(*extent.place(tile.start, tile.stop, life))
        bases: list[Tensor | None] = []
        failures = []
        for mode, factored in enumerate(chunk.shape.factored):
            if not factored:
                bases.append(None)
                continue
            factor, basis, found, made = fields[f"factor_{mode}"], fields[f"basis_{mode}"], [], []
            for part in block_parts(factors_of(fields)):
                outcome = self._made(factor[part], basis[part], method, extent.rule.sorts_columns)
                found.append(outcome.failures.moved(part.start))
                made.append(outcome.basis)
            # Column after column in memory, as they are.
            bases.append(made[0] if len(made) == 1 else torch.cat([b.mT for b in made]).mT)
            kept = {block: why for one in found for block, why in one.kept.items()}
            failures.append(Failures(kept, sum(one.retried for one in found)))
        return Refreshed(list(bases), failures, 0.0)

    def _made(
        self, factor: Tensor, basis: Tensor, method: Method | None, sort: bool
    ) -> VerifiedBasis:
        """New bases, or those in use where that fails, which the host waits to know."""
        on_host = factor.device.type == "cpu" or self._config.refresh_on == "host"
        if on_host and method is not None:
            return verified_refresh(unpacked(factor.cpu()), basis.cpu(), method=method, sort=sort)
        if method is None:
            fresh = eigh_basis(unpacked(factor.cpu() if on_host else factor))
            why, kept = "no first basis", fresh.basis
        else:
            fresh = refreshed(unpacked(factor), basis, method=method, sort=sort)
            why = "no basis on the device"
            kept = torch.where(fresh.usable[:, None, None], fresh.basis, basis)
        bad = (~fresh.usable).nonzero().flatten().tolist()
        return VerifiedBasis(kept, Failures(dict.fromkeys(bad, why)))

    def finish(self, scratch: Callable[[Chunk], Pair]) -> None:
        """Install everything that was computed, here and by others; waits for it.

        ``scratch`` gives temporary tensors for a chunk. Raises CoherenceError where a rank does
        not deliver, and StoreError; the next call goes on then. Raises what a computation raised,
        for which the basis in use stays, when all others are installed.
        """
        errors: list[Exception] = []
        for one in self._pending:
            if not one.flight.job.done:
                one.flight.job.await_by(_wait)
        by_chunk = [list(group) for _, group in itertools.groupby(self._pending, _chunk_of)]
        for mine in by_chunk:
            for one in mine:
                self._exchange.landing(one.flight)
            self._install_all_(mine, scratch, errors)
            del self._pending[: len(mine)]
        if errors:
            raise errors[0]

    def _install_all_(
        self, mine: list[_Pending], scratch: Callable[[Chunk], Pair], errors: list[Exception]
    ) -> None:
        """Those of one chunk."""
        chunk = mine[0].chunk
        moved = moved_lives(chunk.extent.rule)
        chunk.extent.acquire(moved)
        try:
            for one in mine:
                self._install_(one, chunk.state(moved), scratch(chunk), errors)
        finally:
            chunk.extent.release(moved, moved)

    def _install_(
        self, one: _Pending, state: BlockState, scratch: Pair, errors: list[Exception]
    ) -> None:
        chunk, tile, unit = one.chunk, one.tile, unit_of(one.tile)
        if one.flight.job.error is not None:
            self._counters.failures["refresh raised"] += 1
            self._units[unit].attempted = one.flight.version
            errors.append(one.flight.job.error)
            return
        outcome = one.flight.job.outcome()
        reasons, anew = outcome.kept, len(outcome.kept) < outcome.count
        if anew or one.method is None:
            blocks = slice(tile.start - chunk.start, tile.stop - chunk.start)
            shown = {name: tensor[blocks] for name, tensor in state.items()}
            part = with_own_factors(chunk.extent, tile, shown)
            device = chunk.extent.device
            fresh = [b if b is None else in_memory(b).to(device) for b in outcome.bases]
            if not anew:
                names = [f"basis_{mode}" for mode in range(len(fresh))]
                fresh = [_identity(part[name]) if name in part else None for name in names]
            rule = chunk.extent.rule
            if one.method is not None:
                pair = (scratch[0][blocks], scratch[1][blocks])
                rotate_(rule, part, fresh, scratch=pair, gate=one.gate, bound=one.bound)
            for mode, basis in enumerate(fresh):
                if basis is not None:
                    replace_(part[f"basis_{mode}"], basis, one.gate)
                    if one.method is None and rule.in_bases and tile.kept:
                        turn_first_(part[f"factor_{mode}"], basis)
        if self._exchange.owns(unit):
            self._counters.refreshes += outcome.count
            self._counters.refresh_cost += tile.plan.refresh_cost
        self._counters.retried_refreshes += sum(found.retried for found in outcome.failures)
        self._counters.installs += outcome.count - len(reasons)
        if one.method is not None and anew:
            self._units.replaced(unit, one.flight.version, last_use=one.flight.version)
        elif one.method is not None:
            self._units[unit].attempted = one.flight.version
        self._units.judge(unit, reasons)

    def forget(self, records: set[ParameterRecord]) -> None:
        """These have no state any more."""
        for one in self._pending:
            if one.tile.record in records:
                self._exchange.dropped(one.flight)
        self._pending = [one for one in self._pending if one.tile.record not in records]


def _chunk_of(one: _Pending) -> int:
    return id(one.chunk)


def _identity(basis: Tensor) -> Tensor:
    return torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device).expand_as(basis)


def _wait(job: Job[Refreshed]) -> None:
    raise RuntimeError(f"{job.name} should have been done at once")
