"""What it costs to spread results over the ranks: bytes, messages, seconds. Pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from asteria.distributed.topology import Link, Topology

__all__ = ["Speed", "messages", "round_bytes", "sent_bytes", "spread_s"]


@dataclass(frozen=True, slots=True)
class Speed:
    """Of one link, one way."""

    bytes_per_s: float
    latency_s: float = 0.0

    def seconds(self, nbytes: float, count: int = 1) -> float:
        """For so many messages, one after the other."""
        return count * (self.latency_s + nbytes / self.bytes_per_s)


def messages(topology: Topology, source: int, *, hierarchical: bool = True) -> dict[Link, int]:
    """Messages that bring one result of ``source`` to all other ranks, by what they cross.

    Without hierarchy the source sends to each rank itself.
    """
    nodes, home = len(topology.nodes), topology.neighbours(source)
    far = topology.size - home
    if hierarchical:
        return {Link.INTRA: home - 1 + far - (nodes - 1), Link.INTER: nodes - 1}
    return {Link.INTRA: home - 1, Link.INTER: far}


def sent_bytes(
    nbytes: int, topology: Topology, source: int, *, hierarchical: bool = True
) -> dict[Link, int]:
    """Bytes that cross each class of links until a result of ``nbytes`` is everywhere."""
    counts = messages(topology, source, hierarchical=hierarchical)
    return {link: nbytes * count for link, count in counts.items()}


def spread_s(nbytes: int, topology: Topology, source: int, speeds: Mapping[Link, Speed]) -> float:
    """Seconds until a result of ``nbytes`` is everywhere, on links that carry nothing else.

    A rank sends one message after the other on each class of links.
    """
    intra, inter = speeds[Link.INTRA], speeds[Link.INTER]
    near_s = intra.seconds(nbytes, topology.neighbours(source) - 1)
    far = [ranks for ranks in topology.nodes if source not in ranks]
    far_s = [
        inter.seconds(nbytes, place) + intra.seconds(nbytes, len(ranks) - 1)
        for place, ranks in enumerate(far, start=1)
    ]
    return max([near_s, *far_s])


def round_bytes(
    sizes: Sequence[int], owners: Sequence[int], topology: Topology
) -> list[Counter[Link]]:
    """Bytes that each rank sends when every unit is refreshed once, what it passes on included.

    ``sizes`` are the bytes of the units' results, ``owners`` their ranks.
    """
    owned: Counter[int] = Counter()
    for size, owner in zip(sizes, owners, strict=True):
        owned[owner] += size
    sent: list[Counter[Link]] = [Counter() for _ in range(topology.size)]
    for owner, nbytes in owned.items():
        for rank in topology.destinations(owner):
            sent[owner][topology.link(owner, rank)] += nbytes
            for _ in topology.passes_on(rank, owner):
                sent[rank][Link.INTRA] += nbytes
    return sent
