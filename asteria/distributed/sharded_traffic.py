"""Counts what one optimizer sends to and receives from the ranks of its meshes."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace

from asteria.distributed.links import ALL, LinkCounters
from asteria.distributed.sharded_exchange import Tally
from asteria.distributed.sharded_group import ShardGroup
from asteria.distributed.topology import Topology
from asteria.telemetry.counters import LinkTraffic, Network, Waited

__all__ = ["ShardTraffic"]


class ShardTraffic:
    """Messages, bytes and waits, by mesh. For the training thread."""

    def __init__(self, node_size: int | None) -> None:
        """``node_size`` as in RuntimeConfig: ranks of the default group that share a node."""
        self._node_size = node_size
        self._counters: dict[tuple[int, ...], LinkCounters] = {}

    def tally(self, group: ShardGroup, cause: str) -> Tally:
        """Where exchanges of ``group`` are counted."""
        if group.ranks not in self._counters:
            topology, size = group.topology, self._node_size
            if size is not None:
                topology = Topology.of([rank // size for rank in group.ranks])
            self._counters[group.ranks] = LinkCounters(group.here, topology)
        return Tally(self._counters[group.ranks], cause)

    @contextmanager
    def deciding(self, group: ShardGroup) -> Iterator[None]:
        """Count what is within as a wait for a decision of all ranks of ``group``."""
        begin_s = time.monotonic()
        yield
        counters, cause = self.tally(group, "decision")
        counters.waited(ALL, cause, time.monotonic() - begin_s)

    def beside(self, network: Network) -> Network:
        """``network`` with what was counted here."""
        found = [counters.summary() for counters in self._counters.values()]
        waits = _summed([*network.waits, *(waited for one in found for waited in one.waits)])
        return replace(network, shard_links=_added([one.links for one in found]), waits=waits)


def _added(links: Iterable[Mapping[str, LinkTraffic]]) -> dict[str, LinkTraffic]:
    sums: dict[str, Counter[str]] = {}
    for one in links:
        for name, traffic in one.items():
            sums.setdefault(name, Counter()).update(asdict(traffic))
    return {name: LinkTraffic(**counts) for name, counts in sums.items()}


def _summed(waits: Iterable[Waited]) -> tuple[Waited, ...]:
    """One for each rank, link and cause, the longest first."""
    found: dict[tuple[int, str, str], Waited] = {}
    for one in waits:
        key = (one.rank, one.link, one.cause)
        if (known := found.get(key)) is not None:
            one = replace(one, count=known.count + one.count, seconds=known.seconds + one.seconds)
        found[key] = one
    return tuple(sorted(found.values(), key=lambda one: -one.seconds))
