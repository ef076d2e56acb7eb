"""Refreshes in flight as state tensors whose keys and shapes do not depend on what is in flight.

torch.distributed.checkpoint reads into the loader's own state, so that a key which only the file
has is lost. Therefore a parameter with eigenbases always has ``shadow_version`` and
``shadow_lands`` (positions, tiles), and ``shadow_basis_{mode}`` (positions, blocks, n, n) for each
of its bases, also in a synchronous run; the positions of a tile count from its oldest refresh.
Zeros stand where nothing is in flight, for no refresh is of step 0; where nothing at all is, they
take no room in files.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from asteria.refresh.job import Job
from asteria.refresh.pipeline import Flight, Pipeline
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.records import ParameterRecord, Route, TilePlan, state_dtype
from asteria.runtime.transfer import Link, in_memory
from asteria.runtime.units import Unit
from asteria.store.distant import Distant, Opened, Source, Values
from asteria.store.sources import ZeroSource

__all__ = ["Shadow", "shadow_shapes", "show_flights", "take_up"]

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


class Shadow(Distant):
    """What is in flight for a parameter, made when somebody looks at it.

    torch.distributed.checkpoint writes it as one object of any shape, because the shape depends on
    the staleness and the period of the run that saves, and zeros would take the room of bases.
    """

    def __create_write_items__(self, fqn: str, _: object) -> list[object]:
        # To import it takes a second, and who asks has done it.
        checkpoint: Any = torch.distributed.checkpoint  # type: ignore[attr-defined]
        planner, metadata = checkpoint.planner, checkpoint.metadata
        whole = planner.WriteItemType.BYTE_IO
        return [planner.WriteItem(index=metadata.MetadataIndex(fqn), type=whole)]


def show_flights(
    record: ParameterRecord, pipeline: Refreshes | None, *, staleness_steps: int
) -> None:
    """Let the entries of ``record`` tell what is in flight for it; to read them waits for workers.

    Without a pipeline nothing ever is. For the training thread. The tensors are made anew each
    time, bases where those in use are. Refreshes that raised are left out: the step at which they
    land tells of them.
    """
    record.in_flight = tuple(shadow_shapes(record.route, 1))
    for key in record.in_flight:
        entry = _Entry(record, pipeline, key, staleness_steps)
        record.entries.put_away(key, entry.read, entry.promise)


class _Entry:
    """One key of one record; keeps neither workers nor state alive."""

    def __init__(
        self, record: ParameterRecord, pipeline: Refreshes | None, key: str, staleness_steps: int
    ) -> None:
        self._record = weakref.ref(record)
        self._pipeline = None if pipeline is None else weakref.ref(pipeline)
        self._key = key
        self._staleness_steps = staleness_steps

    def read(self) -> Tensor:
        """A tensor of what is in flight now."""
        return self.promise().hold()

    def promise(self) -> Shadow:
        """A tensor that is made of what is in flight now when it is needed."""
        record = self._record()
        if record is None:
            raise RuntimeError(f"{self._key} was asked for, and its optimizer is gone")
        flights = self._flights(record)
        # The most of one tile that the schedule has in flight at a time. If the period has grown,
        # there may be more for a while.
        most = math.ceil((self._staleness_steps + 1) / record.refresh_steps)
        places = max([most, *map(len, flights)])
        shape = shadow_shapes(record.route, places)[self._key]
        source: Source = ZeroSource(shape, _dtype(self._key, record))
        if any(flights):
            source = _Packed(record.route, self._key, flights, shape, _dtype(self._key, record))
        name = self._key.removeprefix(_PREFIX)
        device = torch.device("cpu") if record.entries.is_away(name) else record.device
        return Shadow(Values(source, shape, _dtype(self._key, record), device))

    def _flights(self, record: ParameterRecord) -> list[list[Flight[Refreshed]]]:
        """Of each tile those that have not raised, oldest first, all done."""
        tiles = range(len(record.route.tiles))
        pipeline = None if self._pipeline is None else self._pipeline()
        if pipeline is None:
            return [[] for _ in tiles]
        finished = (pipeline.finished(Unit(record, ordinal)) for ordinal in tiles)
        return [[flight for flight in mine if flight.job.succeeded] for mine in finished]


def _dtype(key: str, record: ParameterRecord) -> torch.dtype:
    steps = key.removeprefix(_PREFIX) in _STEPS
    return torch.float32 if steps else state_dtype(record.parameter)


class _Packed:
    """The tensor of one key, from the flights of each tile, oldest first, which are done."""

    lasts = True

    def __init__(
        self,
        route: Route,
        key: str,
        flights: Sequence[Sequence[Flight[Refreshed]]],
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._route = route
        self._name = key.removeprefix(_PREFIX)
        self._flights = flights
        self._shape = shape
        self._dtype = dtype

    def read(self) -> Tensor:
        """See `Source`."""
        packed = torch.zeros(self._shape, dtype=self._dtype, device="cpu")
        for tile, mine in enumerate(self._flights):
            for place, flight in enumerate(mine):
                if self._name in _STEPS:
                    step = flight.version if self._name == "version" else flight.lands
                    packed[place, tile] = step
                else:
                    self._put(packed[place], self._route.tiles[tile], flight)
        return packed

    def _put(self, packed: Tensor, plan: TilePlan, flight: Flight[Refreshed]) -> None:
        """The bases of one flight in their places, (blocks, n, n)."""
        suffix, first, _ = self._route.place_of(plan)
        outcome = flight.job.outcome()
        outcome.join()
        for mode, basis in enumerate(outcome.bases):
            if basis is not None and self._name == f"basis_{mode}{suffix}":
                packed[first : first + plan.blocks].copy_(in_memory(basis))

    def replaced(self, value: Tensor) -> Source | None:
        """See `Source`."""
        return None


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
    for ordinal, (version, lands), bases in _unpack(record.route, Opened(saved), dtype):
        outcome = Refreshed([None if b is None else link.outgoing(b) for b in bases], [], 0.0)
        unit = Unit(record, ordinal)
        job = Job.finished(outcome, name=f"saved refresh of {unit} at step {version}")
        pipeline.add(unit, Flight(version, min(lands, version + staleness_steps), job))


def _unpack(
    route: Route, saved: Opened, dtype: torch.dtype
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
