"""Sharded parameters as wholes: gradients to their owners, updates back to the shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed
from torch import Tensor

from asteria.distributed.sharded_exchange import Kind, Parcel, Transit
from asteria.distributed.sharded_group import ShardGroup, group_of
from asteria.errors import CoherenceError
from asteria.runtime.chunks import Update
from asteria.runtime.records import ParameterRecord, state_dtype
from asteria.runtime.sharding import Sharding
from asteria.runtime.updater import scale_of
from asteria.runtime.weights import apply_shards_

__all__ = ["Wholes", "council"]

Updates = Mapping[ParameterRecord, Update]


def council(records: Iterable[ParameterRecord]) -> ShardGroup:
    """The ranks that step these sharded parameters together.

    Those of the mesh that all other meshes are parts of (experts have meshes of their own), or
    else all that there are.
    """
    meshes = {r.sharding.layout.ranks for r in records if r.sharding is not None}
    largest = max(meshes, key=lambda ranks: (len(ranks), ranks))
    if all(set(ranks) <= set(largest) for ranks in meshes):
        return group_of(largest)
    return group_of(tuple(range(torch.distributed.get_world_size())))


class Wholes:
    """What a step does together with other ranks. For the training thread, on all of these.

    Without sharded parameters nothing is done here.
    """

    def __init__(self, start: str) -> None:
        """``start`` as in RuntimeConfig."""
        self._start = start
        self._scales: dict[ParameterRecord, float | None] = {}
        """Of the update that is to be sent back; stays when a step is interrupted."""

    def step(
        self,
        updates: Updates,
        gate: Tensor | None,
        own: Callable[[], None],
        ended: set[ParameterRecord],
    ) -> None:
        """A step of which ``own`` is what this rank does by itself.

        Raises what ``own`` raises, on the other ranks a CoherenceError. The next step on all ranks
        completes it then, and ``ended`` has what it is not to do again.
        """
        exact = [record for record in updates if record.is_exact]
        if not exact:
            own()
            _forget_gradients(updates)
            return
        before = {record: (record.steps, record.begun) for record in exact}
        try:
            self._begin(exact, updates)
            try:
                own()
            except Exception as error:
                ended.update(r for r in exact if before[r] != (r.steps, r.begun))
                if not isinstance(error, CoherenceError):  # else there is nobody to be told
                    self._council_fails(exact)
                raise
            if failed := council(exact).failed_ranks(failed=False):
                ended.update(updates)
                raise CoherenceError(
                    f"rank {', '.join(map(str, failed))} could not complete its part of the step, "
                    "and says why; no sharded weight was changed. Once its cause is gone, the next "
                    "step on all ranks completes it"
                )
            for members in _by_mesh(exact):
                self._deliver(members, updates, gate)
        finally:
            _forget_gradients(updates)

    def _council_fails(self, exact: Sequence[ParameterRecord]) -> None:
        """Tell the others, who wait for it, that this rank's part of the step has failed."""
        with suppress(CoherenceError):  # what has failed here is what matters
            council(exact).failed_ranks(failed=True)

    def _begin(self, exact: Sequence[ParameterRecord], updates: Updates) -> None:
        """Bring the gradients of exact parameters to their owners; nothing changes if it raises."""
        under_way: list[tuple[list[tuple[ParameterRecord, int]], Transit]] = []
        for members in _by_mesh(exact):
            for record in members:
                if record not in self._scales:
                    hyper = updates[record].hyper
                    self._scales[record] = scale_of(self._start, record, hyper)
            sent = [(record, *given) for record in members for given in _gradient_parcels(record)]
            kinds = [_gradient_kind(record) for record in members]
            exchange = group_of(_of(members[0]).layout.ranks).exchange
            parcels = [parcel for _, _, parcel in sent]
            transit = exchange.send(kinds, parcels, "gathering gradients")
            under_way.append(([(record, source) for record, source, _ in sent], transit))
        for tags, transit in under_way:
            for place, part in transit.wait().items():
                record, source = tags[place]
                sharding = _of(record)
                if sharding.gradient is None:
                    dtype, device = _gradient_kind(record)
                    sharding.gradient = torch.empty(record.shape, dtype=dtype, device=device)
                if sharding.change is None:  # else it is there since a step was interrupted
                    dtype = state_dtype(record.parameter)
                    sharding.change = torch.empty(record.shape, dtype=dtype, device=record.device)
                sharding.gradient[sharding.layout.boxes[source]].copy_(part)

    def _deliver(
        self, members: Sequence[ParameterRecord], updates: Updates, gate: Tensor | None
    ) -> None:
        moving = [record for record in members if self._scales[record] is not None]
        sent = [(record, parcel) for record in moving for parcel in _change_parcels(record)]
        kinds = [(state_dtype(record.parameter), record.device) for record in moving]
        exchange = group_of(_of(members[0]).layout.ranks).exchange
        transit = exchange.send(kinds, [parcel for _, parcel in sent], "sending updates back")
        parts: list[tuple[ParameterRecord, Tensor, float]] = []
        for place, part in transit.wait().items():
            record = sent[place][0]
            scale = self._scales[record]
            if scale is not None:
                parts.append((record, part, scale))
        apply_shards_(parts, updates, gate)
        for record in members:
            del self._scales[record]
            _of(record).change = None

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        for record in records:
            self._scales.pop(record, None)
            if record.sharding is not None:
                record.sharding.change = None


def _forget_gradients(updates: Updates) -> None:
    for record in updates:
        if record.sharding is not None:
            record.sharding.gradient = record.sharding.local_gradient = None


def _of(record: ParameterRecord) -> Sharding:
    if record.sharding is None:
        raise RuntimeError(f"{record.name} is not sharded")
    return record.sharding


def _by_mesh(records: Iterable[ParameterRecord]) -> list[list[ParameterRecord]]:
    """Exact ones by the ranks that share them, in order: the same on all of these."""
    meshes: dict[tuple[int, ...], list[ParameterRecord]] = {}
    for record in sorted((r for r in records if r.is_exact), key=lambda record: record.index):
        meshes.setdefault(_of(record).layout.ranks, []).append(record)
    return list(meshes.values())


def _gradient_kind(record: ParameterRecord) -> Kind:
    gradient = _of(record).local_gradient
    if gradient is None:
        raise RuntimeError(f"the gradient of {record.name} vanished during the step")
    return gradient.dtype, gradient.device


def _gradient_parcels(record: ParameterRecord) -> list[tuple[int, Parcel]]:
    """Shards of one replica, the owner's, to the owner; with the position of the sender."""
    sharding, kind = _of(record), _gradient_kind(record)
    layout, owner = sharding.layout, sharding.owner
    sources = [
        position
        for position in (range(len(layout.ranks)) if owner == layout.here else [layout.here])
        if layout.replicas[position] == layout.replicas[owner]
    ]
    found = []
    for source in sources:
        shape = tuple(s.stop - s.start for s in layout.boxes[source])
        part = sharding.local_gradient if source == layout.here else None
        found.append((source, Parcel(source, owner, shape, kind, part)))
    return found


def _change_parcels(record: ParameterRecord) -> list[Parcel]:
    """The update from the owner to all ranks, each its box."""
    sharding = _of(record)
    layout, owner, change = sharding.layout, sharding.owner, sharding.change
    kind = state_dtype(record.parameter), record.device
    targets = range(len(layout.ranks)) if owner == layout.here else [layout.here]
    found = []
    for target in targets:
        box = layout.boxes[target]
        part = None if change is None else change[box]
        found.append(Parcel(owner, target, tuple(s.stop - s.start for s in box), kind, part))
    return found
