"""Results of refreshes as letters, and what else a rank has to do with those of the others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from asteria.distributed.coherence import Arrival
from asteria.distributed.letters import Letter
from asteria.errors import RefreshError, StoreError
from asteria.linalg.verified import Failures
from asteria.refresh.pipeline import Flight, name_of
from asteria.runtime.host_refresh import Refreshed
from asteria.runtime.peers import Peers
from asteria.runtime.records import ParameterRecord
from asteria.runtime.transfer import Link, in_memory
from asteria.runtime.units import Unit

__all__ = ["Exchange", "Then"]

Then: TypeAlias = Callable[[Refreshed | None, BaseException | None], None]
"""What happens to a result, or to an error, on the thread that has it."""


class Exchange:
    """Sends the results of this rank's refreshes and expects those of the others.

    For the training thread. A process that is alone has all to itself.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers

    @property
    def is_shared(self) -> bool:
        """Whether other ranks have their part."""
        return self._peers.coherence is not None

    def shares(self, record: ParameterRecord) -> bool:
        """Whether other ranks have their part in refreshes of the record, which all install."""
        return self.is_shared and record.sharding is None

    def owns(self, unit: Unit) -> bool:
        """Whether this rank refreshes the unit."""
        return self._peers.owner(unit) is None

    def own(self, unit: Unit, version: int) -> tuple[int, Then | None]:
        """Launch a refresh here: its number, and what sends the result to the others."""
        coherence, subject = self._peers.coherence, name_of(unit, version)
        if coherence is None or not self.shares(unit.record):
            return 0, None
        number = coherence.own(subject)

        def publish(outcome: Refreshed | None, error: BaseException | None) -> None:
            coherence.publish(number, subject, *_written(outcome, error))

        return number, publish

    def expect(self, unit: Unit, version: int, link: Link) -> tuple[int, Arrival[Refreshed]]:
        """Launch a refresh at its owner: its number, and a job that is done when it has come."""
        owner, coherence = self._peers.owner(unit), self._peers.coherence
        if owner is None or coherence is None:
            raise RuntimeError(f"{unit} is refreshed here")
        return coherence.expect(name_of(unit, version), owner, lambda letter: _read(letter, link))

    def landing(self, flight: Flight[Refreshed]) -> None:
        """A result lands here, so see to it that the others have what they need of this rank.

        Raises CoherenceError where they do not take it.
        """
        if self._peers.coherence is not None and flight.number:
            self._peers.coherence.wait_delivered(flight.number, flight.job.name)

    def dropped(self, flight: Flight[Refreshed]) -> None:
        """The flight will not land, on no rank."""
        if self._peers.coherence is not None:
            self._peers.coherence.forget(flight.number)

    def arrived_everywhere(self, flights: Iterable[Flight[Refreshed]]) -> set[int]:
        """Numbers of the results that all ranks have, of all that are in flight.

        One small reduction, of which every rank takes part with the same flights.
        """
        shared = sorted((f for f in flights if f.number), key=lambda flight: flight.number)
        agreement = self._peers.agreement
        if agreement is None or not shared:
            return set()
        here = sum(flight.job.done << place for place, flight in enumerate(shared))
        common = agreement.common(here, "the other ranks to say which results they have")
        return {flight.number for place, flight in enumerate(shared) if common >> place & 1}


def _written(
    outcome: Refreshed | None, error: BaseException | None
) -> tuple[dict[str, Any], Sequence[Tensor | None]]:
    """Note and tensors of a result; bases that are the old ones do not travel."""
    if isinstance(error, StoreError):
        return {"lost": str(error)}, []
    if outcome is None:
        return {"raised": f"{type(error).__name__}: {error}"}, []
    note = {
        "turned": outcome.turned,
        "kept": [list(found.kept.items()) for found in outcome.failures],
        "retried": [found.retried for found in outcome.failures],
    }
    nothing_new = len(outcome.kept) == outcome.count
    tensors: list[Tensor | None] = []
    for basis in outcome.bases:
        if basis is None:
            tensors.append(None)
        elif nothing_new:
            tensors.append(torch.empty(basis.shape[0], 0, 0, device="cpu"))
        else:
            tensors.append(in_memory(basis).cpu())
    return note, tensors


def _read(letter: Letter, link: Link) -> Refreshed:
    """A result of another rank, where a transfer to the device can start from.

    Raises what has become of it there. On the receiving thread.
    """
    note = letter.note
    if "lost" in note:
        raise StoreError(f"a refresh of rank {letter.author} was lost there: {note['lost']}")
    if "raised" in note:
        raise RefreshError(
            f"{note['subject']} has failed on rank {letter.author} of the group, which raises the "
            f"same with its traceback: {note['raised']}"
        )
    failures = [
        Failures(dict(kept), retried)
        for kept, retried in zip(note["kept"], note["retried"], strict=True)
    ]
    bases = [None if basis is None else link.outgoing(basis) for basis in letter.tensors]
    return Refreshed(list(bases), failures, note["turned"])
