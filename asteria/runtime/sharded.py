"""The sharded parameters of one engine: who owns them, and what ranks decide together."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from torch import Tensor

from asteria.runtime.guard import DeviceGuard, finite_flags, surely_finite
from asteria.runtime.owners import places
from asteria.runtime.records import ParameterRecord
from asteria.runtime.sharded_state import handed_over, saved_whole, show_shards
from asteria.runtime.wholes import Wholes

__all__ = ["ShardedParameters"]

Saved = Mapping[ParameterRecord, Mapping[str, Tensor]]


class ShardedParameters:
    """Which sharded parameters have state, and where. For the training thread, on all ranks.

    Without any, nothing is done here.
    """

    def __init__(self, start: str) -> None:
        """``start`` as in RuntimeConfig."""
        self.wholes = Wholes(start)
        self._exact: set[ParameterRecord] = set()
        """Those that have state, here or elsewhere."""

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

    def show(self, records: Iterable[ParameterRecord]) -> None:
        """Let the facades of sharded ones show their state."""
        for record in records:
            if record.sharding is not None:
                show_shards(record)

    @property
    def elsewhere(self) -> set[ParameterRecord]:
        """Those whose state another rank has."""
        return {record for record in self._exact if not record.is_here}

    def forget(self, records: Iterable[ParameterRecord]) -> None:
        """These have no state any more."""
        gone = set(records)
        self._exact -= gone
        self.wholes.forget(gone)

    def judge(
        self,
        records: Sequence[ParameterRecord],
        guard: DeviceGuard,
        *,
        parameters: int,
        ready: bool,
    ) -> tuple[list[str], Tensor | None]:
        """(names of those with a non-finite gradient on any rank, gate); all ranks get the same.

        On devices that are ``ready`` the ``guard`` gates the step without waiting for them, and
        nothing is known yet. ``parameters``: how many the optimizer has. Raises CoherenceError.
        """
        gradients = _gradients(records)
        on_host = all(gradient.is_cpu for gradient in gradients)
        if ready and not on_host:
            return [], self._gate(records, guard)
        bad: list[int] = []
        if not (on_host and surely_finite(gradients)):
            numbers, flags = finite_flags([str(record.index) for record in records], gradients)
            bad = [int(n) for n, ok in zip(numbers, flags.tolist(), strict=True) if not ok]
        present = {record.index: record.name for record in records}
        bad = self.wholes.council(records).agree_on_gradients(present, bad, parameters)
        return [present[number] for number in bad], None

    def _gate(self, records: Sequence[ParameterRecord], guard: DeviceGuard) -> Tensor:
        names = [record.name for record in records]
        return guard.gate(_gradients(records), names, self.wholes.council(records).reduce_flags_)


def _gradients(records: Sequence[ParameterRecord]) -> list[Tensor]:
    """What this rank has; empty ones, of which others may have more, as a single zero."""
    return [
        gradient if gradient.numel() else gradient.new_zeros(1)
        for record in records
        if (gradient := record.local_gradient) is not None
    ]


def _place(record: ParameterRecord) -> object:
    return None if record.sharding is None else (record.sharding.owner, record.sharding.cuts)


def _in_order(records: Iterable[ParameterRecord]) -> list[ParameterRecord]:
    """The order that all ranks go through them."""
    return sorted(records, key=lambda record: record.index)
