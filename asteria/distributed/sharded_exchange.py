"""Parts of tensors on their way between the ranks of a mesh: one message for each pair of ranks."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
import torch.distributed
from torch import Tensor

from asteria.distributed.links import ALL, LinkCounters

__all__ = ["Exchange", "Kind", "Parcel", "Tally", "Told", "Transit"]


Kind: TypeAlias = tuple[torch.dtype, torch.device]
"""What parts must have in common to travel in one message."""
Told: TypeAlias = Callable[[str], AbstractContextManager[None]]
"""Within it an error is told as one of what the ranks were to do together, which is given."""


class Parcel(NamedTuple):
    """A part that travels. Both ranks list it, in the same order among their parcels."""

    source: int
    """Position of the rank that sends it."""
    target: int
    """Position of the rank that receives it."""
    shape: tuple[int, ...]
    kind: Kind
    part: Tensor | None = None
    """What is sent; None where it is not this rank that sends."""

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)


class Tally(NamedTuple):
    """Where an exchange is counted."""

    counters: LinkCounters
    """By position in the mesh."""
    cause: str
    """Of its wait."""


@dataclass(slots=True)
class Transit:
    """Parts under way. For the training thread."""

    _what: str
    _told: Told
    _tally: Tally | None
    _arrivals: list[tuple[int, Tensor]]
    """(place of the parcel in the list that was given, the memory that it comes to)"""
    _works: list[Any]
    _sent: list[Tensor]
    """Memory that is read until all have arrived."""
    nbytes: int = 0
    """Of that memory, and of what comes."""

    def wait(self) -> dict[int, Tensor]:
        """The parts for this rank, by the place of their parcel; valid for the device's next work.

        Raises CoherenceError if a rank is gone, or does not answer within the group's timeout.
        """
        begin_s = time.monotonic()
        with self._told(self._what):
            for work in self._works:
                work.wait()
        if self._tally is not None and self._works:
            counters, cause = self._tally
            counters.waited(ALL, cause, time.monotonic() - begin_s)
        self._sent = []
        return dict(self._arrivals)


class Exchange:
    """Sends parts between the ranks of one group. For the training thread, on all of its ranks."""

    def __init__(self, data: Any, host: Any, told: Told, *, size: int, here: int) -> None:
        """Process groups for tensors on devices and on the host, which may be the same.

        ``here`` is this rank's position among their ``size`` ranks.
        """
        self._groups = {"cpu": host}
        self._data = data
        self._told = told
        self._size = size
        self._here = here

    def send(
        self,
        kinds: Iterable[Kind],
        parcels: Sequence[Parcel],
        what: str,
        tally: Tally | None = None,
    ) -> Transit:
        """Begin to send parcels, one message for each pair of ranks and each kind.

        All ranks call this with the same ``kinds`` (but for the numbers of devices) in the same
        order, and each with the parcels that it sends or receives. ``what`` is said of them in
        errors, and ``tally`` counts them. Raises CoherenceError.
        """
        transit = Transit(what, self._told, tally, [], [], [])
        for kind in dict.fromkeys(kinds):
            places = [place for place, parcel in enumerate(parcels) if parcel.kind == kind]
            self._begin(transit, parcels, places, kind)
        return transit

    def _begin(
        self,
        transit: Transit,
        parcels: Sequence[Parcel],
        places: Sequence[int],
        kind: Kind,
    ) -> None:
        dtype, device = kind
        leaving: list[list[Tensor]] = [[] for _ in range(self._size)]
        coming: list[list[int]] = [[] for _ in range(self._size)]
        for place in places:
            parcel = parcels[place]
            if parcel.source == self._here and parcel.part is not None:
                leaving[parcel.target].append(parcel.part.reshape(-1))
            if parcel.target == self._here:
                coming[parcel.source].append(place)
        flat = [part for parts in leaving for part in parts]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=device)
        sent_sizes = [sum(part.numel() for part in parts) for parts in leaving]
        sizes = [sum(parcels[place].size for place in each) for each in coming]
        received = torch.empty(sum(sizes), dtype=dtype, device=device)
        with self._told(transit._what):
            work = torch.distributed.all_to_all_single(
                received,
                sent,
                sizes,
                sent_sizes,
                group=self._groups.get(device.type, self._data),
                async_op=True,
            )
        self._count(transit._tally, dtype.itemsize, sent_sizes, sizes)
        transit._works.append(work)
        transit._sent.append(sent)
        transit.nbytes += sent.nbytes + received.nbytes
        start = 0
        for place in (place for each in coming for place in each):
            parcel = parcels[place]
            part = received[start : start + parcel.size].view(parcel.shape)
            transit._arrivals.append((place, part))
            start += parcel.size

    def _count(
        self, tally: Tally | None, itemsize: int, sent: Sequence[int], received: Sequence[int]
    ) -> None:
        """Messages to and from others; one of no elements is none."""
        if tally is None:
            return
        for rank in range(self._size):
            if rank != self._here and sent[rank]:
                tally.counters.sent(rank, itemsize * sent[rank])
            if rank != self._here and received[rank]:
                tally.counters.received(rank, itemsize * received[rank])
