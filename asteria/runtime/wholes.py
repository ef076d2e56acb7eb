"""Sharded parameters as wholes: gradients to their owners, updates back to the shards."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress

import torch
import torch.distributed
from torch import Tensor

from asteria.distributed.sharded_exchange import Kind, Parcel, Transit
from asteria.distributed.sharded_group import ShardGroup, group_of
from asteria.distributed.sharded_traffic import ShardTraffic
from asteria.errors import CoherenceError
from asteria.runtime.chunks import Update
from asteria.runtime.pieces import MESSAGE_BYTES, by_mesh, pieces
from asteria.runtime.records import ParameterRecord, state_dtype
from asteria.runtime.updater import scale_of
from asteria.runtime.weights import apply_shards_

__all__ = ["Wholes", "council", "council_of"]

Updates = Mapping[ParameterRecord, Update]


def council(records: Iterable[ParameterRecord]) -> ShardGroup:
    """The ranks that step these sharded parameters together; see `council_of`."""
    return council_of({r.sharding.layout.ranks for r in records if r.sharding is not None})


def council_of(meshes: Collection[tuple[int, ...]]) -> ShardGroup:
    """Those of the mesh that all other meshes are parts of, or else all ranks that there are.

    Experts have meshes of their own. ``meshes`` have their ranks in ascending order.
    """
    largest = max(meshes, key=lambda ranks: (len(ranks), ranks))
    if all(set(ranks) <= set(largest) for ranks in meshes):
        return group_of(largest)
    return group_of(tuple(range(torch.distributed.get_world_size())))


class Wholes:
    """What a step does together with other ranks. For the training thread, on all of these.

    Without sharded parameters nothing is done here.
    """

    def __init__(self, start: str, traffic: ShardTraffic) -> None:
        """``start`` as in RuntimeConfig; ``traffic`` counts what travels."""
        self._start = start
        self._traffic = traffic
        self.message_bytes = MESSAGE_BYTES
        """Most that a rank sends or receives at a time; the same on all ranks."""
        self.peak_bytes = 0
        """The most that whole gradients, updates and messages took here."""
        self._held_bytes = 0
        """What the gradients and updates take that are there just now."""
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
                    with suppress(CoherenceError):  # what has failed here is what matters
                        self._failed_ranks(exact, failed=True)
                raise
            if failed := self._failed_ranks(exact, failed=False):
                ended.update(updates)
                raise CoherenceError(
                    f"rank {', '.join(map(str, failed))} could not complete its part of the step, "
                    "and says why; no sharded weight was changed. Once its cause is gone, the next "
                    "step on all ranks completes it"
                )
            _forget_gradients(updates)  # before there are messages again
            self._held_bytes = sum(_held_bytes(record) for record in exact)
            for members in by_mesh(exact):
                for piece in pieces(members, self.message_bytes):
                    self._deliver(piece, updates, gate)
        finally:
            _forget_gradients(updates)

    def _failed_ranks(self, exact: Sequence[ParameterRecord], *, failed: bool) -> list[int]:
        """Tell the others whether this rank's part has failed, and hear whose has."""
        group = council(exact)
        with self._traffic.deciding(group):
            return group.failed_ranks(failed=failed)

    def _begin(self, exact: Sequence[ParameterRecord], updates: Updates) -> None:
        """Bring the gradients of exact parameters to their owners; nothing changes if it raises."""
        self._held_bytes = sum(_held_bytes(record) for record in exact)
        for record in exact:
            if record not in self._scales:
                hyper = updates[record].hyper
                self._scales[record] = scale_of(self._start, record, hyper)
        for members in by_mesh(exact):
            for piece in pieces(members, self.message_bytes):
                self._gather(piece)

    def _gather(self, members: Sequence[ParameterRecord]) -> None:
        """The gradients of some parameters of one mesh to their owners."""
        sent = [(record, *given) for record in members for given in _gradient_parcels(record)]
        kinds = [_gradient_kind(record) for record in members]
        group = group_of(members[0].as_sharded.layout.ranks)
        transit = group.exchange.send(
            kinds,
            [parcel for _, _, parcel in sent],
            f"gathering gradients of {_named(members)}",
            self._traffic.tally(group, "gradients"),
        )
        for record in members:
            self._make_room(record)
        self._note(transit)
        for place, part in transit.wait().items():
            record, source, _ = sent[place]
            sharding = record.as_sharded
            if sharding.gradient is not None:
                sharding.gradient[sharding.layout.boxes[source]].copy_(part)

    def _make_room(self, record: ParameterRecord) -> None:
        """For the whole gradient and update of a parameter, at its owner."""
        sharding = record.as_sharded
        if not sharding.is_here:
            return
        before = _held_bytes(record)
        if sharding.gradient is None:
            dtype, device = _gradient_kind(record)
            sharding.gradient = torch.empty(record.shape, dtype=dtype, device=device)
        if sharding.change is None:  # else it is there since a step was interrupted
            dtype = state_dtype(record.parameter)
            sharding.change = torch.empty(record.shape, dtype=dtype, device=record.device)
        self._held_bytes += _held_bytes(record) - before

    def _note(self, transit: Transit) -> None:
        self.peak_bytes = max(self.peak_bytes, self._held_bytes + transit.nbytes)

    def _deliver(
        self, members: Sequence[ParameterRecord], updates: Updates, gate: Tensor | None
    ) -> None:
        """The updates of some parameters of one mesh to the shards."""
        moving = [record for record in members if self._scales[record] is not None]
        sent = [(record, parcel) for record in moving for parcel in _change_parcels(record)]
        kinds = [(state_dtype(record.parameter), record.device) for record in moving]
        group = group_of(members[0].as_sharded.layout.ranks)
        transit = group.exchange.send(
            kinds,
            [parcel for _, parcel in sent],
            f"sending back updates of {_named(members)}",
            self._traffic.tally(group, "updates"),
        )
        self._note(transit)
        parts: list[tuple[ParameterRecord, Tensor, float]] = []
        for place, part in transit.wait().items():
            record = sent[place][0]
            scale = self._scales[record]
            if scale is not None:
                parts.append((record, part, scale))
        apply_shards_(parts, updates, gate)
        for record in members:
            del self._scales[record]
            before = _held_bytes(record)
            record.as_sharded.change = None
            self._held_bytes += _held_bytes(record) - before

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


def _held_bytes(record: ParameterRecord) -> int:
    """Of the whole gradient and update, as far as they are here."""
    sharding = record.as_sharded
    return sum(t.nbytes for t in (sharding.gradient, sharding.change) if t is not None)


def _named(members: Sequence[ParameterRecord]) -> str:
    """For messages."""
    more = f" and {len(members) - 3} more" if len(members) > 3 else ""
    return ", ".join(record.name for record in members[:3]) + more


def _gradient_kind(record: ParameterRecord) -> Kind:
    gradient = record.as_sharded.local_gradient
    if gradient is None:
        raise RuntimeError(f"the gradient of {record.name} vanished during the step")
    return gradient.dtype, gradient.device


def _gradient_parcels(record: ParameterRecord) -> list[tuple[int, Parcel]]:
    """Shards of one replica, the owner's, to the owner; with the position of the sender."""
    sharding, kind = record.as_sharded, _gradient_kind(record)
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
    sharding = record.as_sharded
    layout, owner, change = sharding.layout, sharding.owner, sharding.change
    kind = state_dtype(record.parameter), record.device
    targets = range(len(layout.ranks)) if owner == layout.here else [layout.here]
    found = []
    for target in targets:
        box = layout.boxes[target]
        part = None if change is None else change[box]
        found.append(Parcel(owner, target, tuple(s.stop - s.start for s in box), kind, part))
    return found
