"""Counts what one rank sends, receives and waits for."""

from __future__ import annotations

import threading
from collections import Counter

from asteria.distributed.topology import Link, Topology
from asteria.telemetry.counters import LinkTraffic, Network, Waited

__all__ = ["ALL", "LinkCounters"]

ALL = -1
"""Who is waited for where all ranks do something together."""


class LinkCounters:
    """Bytes and messages by class of link, waits by rank and cause. Any thread."""

    def __init__(self, rank: int, topology: Topology) -> None:
        self._rank = rank
        self._topology = topology
        self._slowest = Link.INTRA if len(topology.nodes) == 1 else Link.INTER
        self._lock = threading.Lock()
        self._sent: dict[Link, Counter[str]] = {link: Counter() for link in Link}
        self._received: dict[Link, Counter[str]] = {link: Counter() for link in Link}
        self._waits: dict[tuple[int, Link, str], tuple[int, float]] = {}

    def link(self, rank: int) -> Link:
        """What connects this rank with another one."""
        return self._topology.link(self._rank, rank)

    def sent(self, rank: int, nbytes: int) -> None:
        """A message of so many bytes goes to ``rank``."""
        self._count(self._sent, rank, nbytes)

    def received(self, rank: int, nbytes: int) -> None:
        """A message of so many bytes has come from ``rank``."""
        self._count(self._received, rank, nbytes)

    def _count(self, table: dict[Link, Counter[str]], rank: int, nbytes: int) -> None:
        with self._lock:
            table[self.link(rank)].update(bytes=nbytes, messages=1)

    def waited(self, rank: int, cause: str, seconds: float) -> None:
        """The training thread has waited so long for ``rank``, or for `ALL`."""
        link = self._slowest if rank == ALL else self.link(rank)
        with self._lock:
            key = (rank, link, cause)
            count, before_s = self._waits.get(key, (0, 0.0))
            self._waits[key] = count + 1, before_s + seconds

    def summary(self) -> Network:
        """What was counted so far."""
        with self._lock:
            return Network(
                links={
                    link.value: LinkTraffic(
                        sent_bytes=self._sent[link]["bytes"],
                        sent_messages=self._sent[link]["messages"],
                        received_bytes=self._received[link]["bytes"],
                        received_messages=self._received[link]["messages"],
                    )
                    for link in Link
                },
                waits=tuple(
                    Waited(rank=rank, link=link.value, cause=cause, count=count, seconds=seconds)
                    for (rank, link, cause), (count, seconds) in sorted(
                        self._waits.items(), key=lambda item: -item[1][1]
                    )
                ),
            )
