"""Refreshes in flight as state tensors whose keys and shapes do not depend on what is in flight.

torch.distributed.checkpoint reads into the loader's own state, so that a key which only the file
has is lost. Therefore a parameter with eigenbases always has ``shadow_version`` and
``shadow_lands`` (positions, tiles), and ``shadow_basis_{mode}`` (positions, blocks, n, n) for each
of its bases; the positions of a tile count from its oldest refresh. Zeros stand where nothing is
in flight, for no refresh is of step 0.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.records import ParameterRecord, Route, state_dtype
from asteria.runtime.transfer import Link, in_memory
from asteria.runtime.units import Unit

__all__ = ["shadow_shapes", "show_flights", "take_up"]

Refreshes: TypeAlias = Pipeline[Unit, Refreshed]

_PREFIX = "shadow_"
_STEPS = ("version", "lands")


def shadow_shapes(route: Route, places: int) -> dict[str, tuple[int, ...]]:
    """Key and shape of everything that tells of ``places`` refreshes of each tile."""
    if not route.rule.has_bases:
        return {}
    shapes = {_PREFIX + name: (places, len(route.tiles)) for name in _STEPS}
    return shapes | {
        f"{_PREFIX}basis_{mode}{suffix}": (places, blocks, size, size)
        for suffix, block, blocks in route.extents()
        for mode, size in enumerate(block.dims)
        if block.factored[mode]
    }


def show_flights(record: ParameterRecord, pipeline: Refreshes, *, staleness_steps: int) -> None:
    """Let the entries of ``record`` tell what is in flight for it; to read them waits for workers.

    For the training thread. The tensors are made anew each time, bases where those in use are.
    Refreshes that raised are left out: the step at which they land tells of them.
    """
    record.in_flight = tuple(shadow_shapes(record.route, 1))
    for key in record.in_flight:
        record.entries.put_away(key, _reader(record, pipeline, key, staleness_steps))


def _reader(
    record: ParameterRecord, pipeline: Refreshes, key: str, staleness_steps: int
) -> Callable[[], Tensor]:
    """Reads one key; keeps neither workers nor state alive."""
    whose, where = weakref.ref(record), weakref.ref(pipeline)

    def read() -> Tensor:
        record, pipeline = whose(), where()
        if record is None or pipeline is None:
            raise RuntimeError(f"{key} was asked for, and its optimizer is gone")
        flights = [
            [flight for flight in pipeline.finished(Unit(record, ordinal)) if flight.job.succeeded]
            for ordinal in range(len(record.route.tiles))
        ]
        # The most of one tile that the schedule has in flight at a time. If the period has grown,
        # there may be more for a while.
        most = math.ceil((staleness_steps + 1) / record.refresh_steps)
        return _pack(record, key, flights, max([most, *map(len, flights)]))

    return read


def _pack(
    record: ParameterRecord, key: str, flights: Sequence[Sequence[Flight[Refreshed]]], places: int
) -> Tensor:
    """The tensor of one key, given the flights of each tile, oldest first, which are done."""
    route, name = record.route, key.removeprefix(_PREFIX)
    shape = shadow_shapes(route, places)[key]
    if name in _STEPS:
        table = torch.zeros(shape, dtype=torch.float32, device="cpu")
        for tile, mine in enumerate(flights):
            for place, flight in enumerate(mine):
                table[place, tile] = flight.version if name == "version" else flight.lands
        return table.to(record.device)
    device = torch.device("cpu") if record.entries.is_away(name) else record.device
    packed = torch.zeros(shape, dtype=state_dtype(record.parameter), device=device)
    for tile, mine in enumerate(flights):
        plan = route.tiles[tile]
        suffix, first, _ = route.place_of(plan)
        for place, flight in enumerate(mine):
            outcome = flight.job.outcome()
            outcome.join()
            for mode, basis in enumerate(outcome.bases):
                if basis is not None and name == f"basis_{mode}{suffix}":
                    packed[place, first : first + plan.blocks].copy_(in_memory(basis))
    return packed


def take_up(
    record: ParameterRecord,
    saved: Mapping[str, Tensor],
    pipeline: Refreshes,
    link: Link,
    *,
    staleness_steps: int,
) -> None:
    """Put into the pipeline what was in flight when the state of ``record`` was saved.

    Whoever saved may have allowed more staleness; nothing lands later than allowed here.
    """
    dtype = state_dtype(record.parameter)
    for ordinal, (version, lands), bases in _unpack(record.route, saved, dtype):
        outcome = Refreshed([None if b is None else link.outgoing(b) for b in bases], [], 0.0)
        unit = Unit(record, ordinal)
        job = Job.finished(outcome, name=f"saved refresh of {unit} at step {version}")
        pipeline.add(unit, Flight(version, min(lands, version + staleness_steps), job))


def _unpack(
    route: Route, saved: Mapping[str, Tensor], dtype: torch.dtype
) -> Iterator[tuple[int, tuple[int, int], list[Tensor | None]]]:
    """(tile, (version, lands), basis of every mode) of each refresh, oldest first for each tile.

    The bases are host copies in ``dtype``, column after column in memory.
    """
    if not route.rule.has_bases or f"{_PREFIX}version" not in saved:
        return
    versions, lands = (saved[_PREFIX + name].tolist() for name in _STEPS)
    for tile, plan in enumerate(route.tiles):
        suffix, first, _ = route.place_of(plan)
        for place in sorted(range(len(versions)), key=lambda place: versions[place][tile]):
            version = int(versions[place][tile])
            if not version:
                continue
            bases: list[Tensor | None] = []
            for mode, factored in enumerate(plan.shape.factored):
                if not factored:
                    bases.append(None)
                    continue
                key = f"{_PREFIX}basis_{mode}{suffix}"
                basis = saved[key][place, first : first + plan.blocks]
                columns = torch.empty(basis.mT.shape, dtype=dtype, device="cpu")
                bases.append(columns.copy_(basis.mT).mT)
            yield tile, (version, int(lands[place][tile])), bases
