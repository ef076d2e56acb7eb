"""Eigenbases computed at once, where the parameter is: first, young and synchronous ones."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from asteria.algorithms.algorithm import BlockState, Pair
from asteria.config.runtime import RuntimeConfig
from asteria.linalg.eigenbasis import eigh_basis
from asteria.linalg.method import Method, method_of_kept, refreshed
from asteria.linalg.modes import replace_
from asteria.linalg.packed import unpacked
from asteria.linalg.verified import Failures, verified_refresh
from asteria.runtime.chunks import Chunk
from asteria.runtime.extents import block_parts
from asteria.runtime.narrow import as_stored, widened
from asteria.runtime.records import Tile
from asteria.runtime.reports import Report
from asteria.runtime.turning import rotate_, turn_first_
from asteria.runtime.units import Units, unit_of
from asteria.runtime.verdicts import Verdicts
from asteria.telemetry.counters import Counters

__all__ = ["InlineRefresher", "factors_of"]


class InlineRefresher:
    """Makes and refreshes the bases of whole chunks. For the training thread."""

    def __init__(
        self, config: RuntimeConfig, counters: Counters, units: Units, verdicts: Verdicts
    ) -> None:
        self._config = config
        self._counters = counters
        self._units = units
        self._verdicts = verdicts

    def begin_(self, chunk: Chunk, state: BlockState) -> None:
        """First bases, of the first factors; waits for the device."""
        for mode in range(len(chunk.extent.shape.dims)):
            factor, basis = state.get(f"factor_{mode}"), state.get(f"basis_{mode}")
            if factor is None or basis is None:
                continue
            failures = Failures()
            if self._config.start == "adam" and not chunk.has_moments:
                basis.copy_(torch.eye(basis.shape[-1], dtype=basis.dtype, device=basis.device))
                continue
            on_host = self._is_on_host(factor)
            for blocks in block_parts(factors_of(state)):
                part = factor[blocks].cpu() if on_host else factor[blocks]
                fresh = eigh_basis(unpacked(part))
                basis[blocks].copy_(fresh.basis)
                if chunk.extent.rule.in_bases:
                    turn_first_(factor[blocks], basis[blocks])
                self._counters.refreshes += len(fresh.basis)
                self._counters.refresh_cost += len(fresh.basis) * float(basis.shape[-1]) ** 3
                self._counters.installs += len(fresh.basis)
                bad = (~fresh.usable).nonzero().flatten().tolist()
                failures.kept |= {blocks.start + block: "no first basis" for block in bad}
            for tile in chunk.tiles if failures.kept else ():
                self._units.judge(unit_of(tile), _reasons(chunk, tile, [failures]))

    def refresh_(
        self,
        chunk: Chunk,
        state: BlockState,
        scratch: Pair,
        gate: Tensor | None,
        *,
        method: Method,
        bound: float | None,
    ) -> None:
        """Refresh every basis of the chunk and carry the moments along.

        ``bound`` as in `Algorithm.rotate_`. Waits for the device only with `"eigh"` or on the host.
        """
        rule = chunk.extent.rule
        method = method_of_kept(method, in_bases=rule.in_bases)
        modes = range(len(chunk.extent.shape.dims))
        found = _Found()
        for blocks in block_parts(factors_of(state)):
            stored = {name: tensor[blocks] for name, tensor in state.items()}
            part = widened(stored, chunk.extent.dtype)
            fresh: list[Tensor | None] = [None for _ in modes]
            for mode in modes:
                factor, basis = part.get(f"factor_{mode}"), part.get(f"basis_{mode}")
                if factor is not None and basis is not None:
                    sort = rule.sorts_columns
                    fresh[mode] = self._refreshed(factor, basis, found, method=method, sort=sort)
            found.blocks += blocks.stop - blocks.start
            pair = (scratch[0][blocks], scratch[1][blocks])
            fresh = as_stored(fresh, stored)
            rotate_(rule, part, fresh, scratch=pair, gate=gate, bound=bound)
            for mode, basis in enumerate(fresh):
                if basis is not None:
                    replace_(stored[f"basis_{mode}"], basis, gate)
        self._settle(chunk, found)

    def _settle(self, chunk: Chunk, found: _Found) -> None:
        """Take note of what has become of the bases, as far as the host knows."""
        report = found.report(chunk.stop - chunk.start)
        for tile in chunk.tiles:
            unit, step = unit_of(tile), chunk.steps + 1
            reasons = _reasons(chunk, tile, found.failures)
            before = unit.record.versions[unit.ordinal]
            bases = tile.plan.blocks * len(tile.plan.shape.factor_sizes())
            self._counters.refreshes += bases
            self._counters.refresh_cost += tile.plan.refresh_cost
            self._counters.installs += bases - len(reasons)
            if len(reasons) < bases:
                self._units.replaced(unit, step, last_use=step)
            else:
                self._units[unit].attempted = step
            if report is None:
                self._units.judge(unit, reasons)
                continue
            mine = report.part(tile.start - chunk.start, tile.stop - chunk.start)
            self._verdicts.expect(unit, mine, before=before, version=step)

    def _refreshed(
        self, factor: Tensor, basis: Tensor, found: _Found, *, method: Method, sort: bool
    ) -> Tensor:
        """New bases (b, n, n); where none could be computed, the ones in use."""
        if self._is_on_host(factor):
            outcome = verified_refresh(
                unpacked(factor.cpu()), basis.cpu(), method=method, sort=sort
            )
            found.failures.append(outcome.failures.moved(found.blocks))
            self._counters.retried_refreshes += outcome.failures.retried
            return outcome.basis.to(factor.device)
        result = refreshed(unpacked(factor), basis, method=method, sort=sort)
        found.usable.append(result.usable)
        return torch.where(result.usable[:, None, None], result.basis, basis)

    def _is_on_host(self, factor: Tensor) -> bool:
        return factor.device.type == "cpu" or self._config.refresh_on == "host"


@dataclass(slots=True)
class _Found:
    """What became of the bases of a chunk."""

    failures: list[Failures] = field(default_factory=list)
    """Of those that the host has computed."""
    usable: list[Tensor] = field(default_factory=list)
    """(b,) of every part and mode, if a device has computed them and only it knows."""
    blocks: int = 0
    """Done so far."""

    def report(self, blocks: int) -> Report | None:
        """(blocks, modes) flags, on their way from the device; None if there are none there."""
        if not self.usable:
            return None
        # Parts come one after the other, each with all its modes.
        modes = sum(map(len, self.usable)) // blocks
        parts = [self.usable[at : at + modes] for at in range(0, len(self.usable), modes)]
        return Report.of(torch.cat([torch.stack(part, dim=-1) for part in parts]))


def _reasons(chunk: Chunk, tile: Tile, failures: list[Failures]) -> list[str]:
    """Why bases of the tile were kept, one for each; blocks are counted within the chunk."""
    blocks = range(tile.start - chunk.start, tile.stop - chunk.start)
    return [reason for found in failures for block, reason in found.kept.items() if block in blocks]


def factors_of(state: BlockState) -> list[Tensor]:
    """Of all modes, as they are stored."""
    return [tensor for name, tensor in state.items() if name.startswith("factor_")]
