"""Refreshes on the device of the parameters, beside the training and without a word to the host.

Everything that a host would decide is decided on the device: a new basis that cannot be used is
replaced by the one in use, by a select, and the host reads the flags some steps later. Tiles of
one chunk that are due at the same step go through the products together.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from asteria.linalg.method import Method, method_of_kept, refreshed
from asteria.linalg.packed import unpacked
from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight
from asteria.runtime.chunks import Chunk
from asteria.runtime.extents import block_parts
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.pending import Pending
from asteria.runtime.records import Tile
from asteria.runtime.reports import to_host
from asteria.runtime.side import Side, side_of
from asteria.runtime.units import Unit, unit_of
from asteria.store.layout import Life

__all__ = ["DeviceRefresher"]

Pairs = list[tuple[Tensor, Tensor]]
"""(factors, bases) of every mode that has them, (b, n, n) each; of packed factors half."""


class DeviceRefresher:
    """Begins refreshes beside the training. For the training thread."""

    def __init__(self, sides: Callable[[torch.device], Side] = side_of) -> None:
        """``sides``: where work beside the training on a device is done; tests have their own."""
        self._make_side = sides
        self._sides: dict[torch.device, Side] = {}

    def launch(
        self,
        chunk: Chunk,
        tiles: Sequence[Tile],
        *,
        method: Method,
        version: int,
        lands: int,
        copy_bases: bool,
    ) -> list[tuple[Unit, Flight[Refreshed]]]:
        """Begin to refresh these tiles of a chunk, whose fields are acquired; never waits.

        ``method`` is not `"eigh"`, which waits; ``copy_bases`` where those in use may be replaced
        before the work is done. Raises what torch raises where the device has no memory left;
        nothing has begun then.
        """
        side = self._side(chunk.extent.device)
        pairs = _snapshots(chunk, tiles, copy_bases=copy_bases)
        sort = chunk.extent.rule.sorts_columns
        reads = [tensor for pair in pairs for tensor in pair]
        kind = method_of_kept(method, in_bases=chunk.extent.rule.in_bases)
        results, passed = side.run(lambda: _refreshed(pairs, method=kind, sort=sort), reads)
        modes = len(pairs)
        bases, usable, told = results[:modes], results[modes], results[modes + 1]
        stops = list(itertools.accumulate(tile.plan.blocks for tile in tiles))
        flights = []
        for tile, stop in zip(tiles, stops, strict=True):
            blocks = slice(stop - tile.plan.blocks, stop)
            mine, flags = iter([b[blocks] for b in bases]), iter(usable[blocks].unbind(1))
            factored = chunk.shape.factored
            pending = Pending(
                side,
                passed,
                usable=[next(flags) if has_basis else None for has_basis in factored],
                told=told[blocks],
                share=tile.plan.blocks / stops[-1],
                method=method,
            )
            fresh = [next(mine) if has_basis else None for has_basis in factored]
            outcome = Refreshed(list(fresh), [], 0.0, pending)
            name = f"refresh of {unit_of(tile)} at step {version} on {chunk.extent.device}"
            job = Job.finished(outcome, name=name)
            flights.append((unit_of(tile), Flight(version, lands, job, passed=passed.query)))
        return flights

    def _side(self, device: torch.device) -> Side:
        side = self._sides.get(device)
        if side is None:
            side = self._sides[device] = self._make_side(device)
        return side


def _snapshots(chunk: Chunk, tiles: Sequence[Tile], *, copy_bases: bool) -> Pairs:
    """Factors of now, and bases, of these tiles; on the device, nothing travels."""
    extent, cells = chunk.extent, chunk.extent.cells
    places = [extent.place(tile.start, tile.stop, Life.SUM) for tile in tiles]
    factors = [cells[Life.SUM].window(*place) for place in places]
    bases = [cells[Life.BASIS].window(tile.start, tile.stop) for tile in tiles]
    own = bases[0]
    if len(tiles) > 1 or copy_bases:
        # Column after column in memory, as they are.
        own = {name: torch.cat([b[name].mT for b in bases]).mT for name in own}
    else:
        # Wherever its cell goes meanwhile, this memory does not become another's.
        cells[Life.BASIS].shown = True
    return [
        (torch.cat([f[f"factor_{mode}"] for f in factors]), own[f"basis_{mode}"])
        for mode, factored in enumerate(chunk.shape.factored)
        if factored
    ]


def _refreshed(pairs: Pairs, *, method: Method, sort: bool) -> list[Tensor]:
    """Bases of every mode, then flags (b, modes) on the device, then the same for the host."""
    fresh = [torch.empty_like(basis.mT).mT for _, basis in pairs]
    flags = []
    for (factor, basis), target in zip(pairs, fresh, strict=True):
        usable = []
        for part in block_parts([factor]):
            # Bases may be stored in fewer bits.
            before = basis[part].to(factor.dtype)
            result = refreshed(unpacked(factor[part]), before, method=method, sort=sort)
            usable.append(result.usable)
            kept = torch.where(result.usable[:, None, None], result.basis, before)
            target[part].copy_(kept)
        flags.append(torch.cat(usable))
    stacked = torch.stack(flags, dim=1)
    return [*fresh, stacked, to_host(stacked)]
