"""The sharded parameters of one engine: who owns them, and what ranks decide together."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from asteria.distributed.sharded_group import ShardGroup
from asteria.distributed.sharded_layout import is_sharded, mesh_ranks
from asteria.distributed.sharded_traffic import ShardTraffic
from asteria.runtime.consent import unanimously
from asteria.runtime.owners import places
from asteria.runtime.pieces import gathered_bytes
from asteria.runtime.records import ParameterRecord
from asteria.runtime.sharded_state import handed_over, saved_whole, show_shards
from asteria.runtime.wholes import Wholes, council, council_of
from asteria.telemetry.counters import Network

__all__ = ["ShardedParameters", "Together"]

Saved = Mapping[ParameterRecord, Mapping[str, Tensor]]
Groups = Iterable[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Together:
    """What all ranks decide together on the gradients of a step. For the training thread."""

    council: ShardGroup
    present: dict[int, str]
    """Numbers and names of the parameters that are stepped."""
    parameters: int
    """How many the optimizer has."""

    @classmethod
    def of(cls, records: Sequence[ParameterRecord], parameters: int) -> Together | None:
        """None if none of ``records`` is sharded. Raises CoherenceError."""
        if all(record.sharding is None for record in records):
            return None
        present = {record.index: record.name for record in records}
        return cls(council(records), present, parameters)

    def reduce_(self, flags: Tensor) -> None:
        """Make ``flags`` (bool), one for each name, those of all ranks; the host does not wait."""
        self.council.reduce_flags_(flags)

    def agree(self, bad: Collection[str]) -> list[str]:
        """Names of those whose gradient is bad on any rank; raises CoherenceError."""
        mine = [number for number, name in self.present.items() if name in bad]
        found = self.council.agree_on_gradients(self.present, mine, self.parameters)
        return [self.present[number] for number in found]


class ShardedParameters:
    """Which sharded parameters have state, and where. For the training thread, on all ranks.

    Without any, nothing is done here.
    """

    def __init__(self, start: str, *, node_size: int | None = None) -> None:
        """Arguments as in RuntimeConfig."""
        self.traffic = ShardTraffic(node_size)
        self.wholes = Wholes(start, self.traffic)
        self._exact: set[ParameterRecord] = set()
        """Those that have state, here or elsewhere."""
        self._any = False

    def admit(
        self,
        records: list[ParameterRecord],
        saved: Saved,
        discard: Callable[[list[ParameterRecord]], None],
    ) -> tuple[list[ParameterRecord], Saved]:
        """Find owners as ``records`` come; returns all that are to be admitted, and their states.

        Those that were here before and get another place (what is multiplied together depends on
        which parameters there are) have been ``discard``ed. States come to their owners.
        """
        for record in records:
            if record.sharding is not None:
                self._any, record.sharding.traffic = True, self.traffic
        arrivals = [record for record in records if record.is_exact]
        if not arrivals:
            return records, saved
        found = places([*self._exact, *arrivals])
        moved = [record for record in _in_order(self._exact) if _place(record) != found[record]]
        states: dict[ParameterRecord, Mapping[str, Tensor]] = dict(saved)
        states |= {record: handed_over(record, found[record].owner) for record in moved}
        discard(moved)
        for record in (*arrivals, *moved):
            if record.sharding is not None:
                record.sharding.owner, record.sharding.cuts = found[record]
        for record in _in_order(arrivals):
            if record in saved:
                states[record] = saved_whole(record, saved[record])
        self._exact.update(arrivals, moved)
        return [*records, *moved], states

    def agree_on_room(
        self,
        arrivals: Collection[ParameterRecord],
        here: Iterable[ParameterRecord],
        groups: Groups,
        check: Callable[[list[ParameterRecord]], None],
    ) -> None:
        """``check`` what this rank will have once ``arrivals`` join those that are ``here``.

        Raises what it raises, and CoherenceError where it has raised on another rank; nothing has
        changed then. Some of ``arrivals`` are sharded.
        """
        exact = {*self._exact, *(record for record in arrivals if record.is_exact)}
        found = places(exact)
        staying = {record for record in (*here, *arrivals) if not record.is_exact}
        owned = {r for r in exact if r.sharding and found[r].owner == r.sharding.layout.here}
        unanimously(
            lambda: check(_in_order(staying | owned)),
            lambda failed: self.failed_ranks(groups, failed=failed),
            "make room for the state of new parameters",
        )

    def show(self, records: Iterable[ParameterRecord]) -> None:
        """Let the facades of sharded ones show their state."""
        for record in records:
            if record.sharding is not None:
                show_shards(record)

    @property
    def exist(self) -> bool:
        """Whether any parameter with state is sharded."""
        return self._any

    @property
    def elsewhere(self) -> set[ParameterRecord]:
        """Those whose state another rank has."""
        return {record for record in self._exact if not record.is_here}

    @property
    def gathered_bytes(self) -> int:
        """The most memory that a step takes here for whole gradients and updates."""
        return gathered_bytes(self._exact, self.wholes.message_bytes)

    def beside(self, network: Network) -> Network:
        """``network`` with what sharded parameters have had to do with other ranks."""
        found = self.traffic.beside(network)
        return replace(found, gathered_peak_bytes=self.wholes.peak_bytes)

    def failed_ranks(self, groups: Groups, *, failed: bool) -> list[int]:
        """Which ranks have failed in what all do for the parameters of ``groups``, as all tell."""
        meshes = {mesh_ranks(p) for group in groups for p in group["params"] if is_sharded(p)}
        return council_of(meshes).failed_ranks(failed=failed) if meshes else []

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        gone = set(records)
        self._exact -= gone
        self.wholes.forget(gone)


def _place(record: ParameterRecord) -> object:
    return None if record.sharding is None else (record.sharding.owner, record.sharding.cuts)


def _in_order(records: Iterable[ParameterRecord]) -> list[ParameterRecord]:
    """The order that all ranks go through them."""
    return sorted(records, key=lambda record: record.index)
