"""Which ranks share a node, and the way that a result takes to all of them. Pure functions.

Ranks are those of the group, from 0. A result goes from its owner to one representative of each
other node, over the slow link, and from there to the rest of the node: it crosses the slow link
once per node, whatever the number of ranks on it.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from asteria.errors import ConfigError

__all__ = ["Link", "Topology"]


class Link(enum.Enum):
    """How two ranks are connected."""

    INTRA = "intra"
    """Within a node."""
    INTER = "inter"
    """Between nodes: the slow one."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The ranks of each node, in ascending order; nodes in order of their first rank."""

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, labels: Sequence[Hashable]) -> Topology:
        """From a label of the node of each rank, in order of the ranks."""
        nodes: dict[Hashable, list[int]] = {}
        for rank, label in enumerate(labels):
            nodes.setdefault(label, []).append(rank)
        return cls(tuple(tuple(ranks) for ranks in nodes.values()))

    @classmethod
    def even(cls, size: int, node_size: int) -> Topology:
        """Nodes of ``node_size`` neighbouring ranks each; raises ConfigError if some are left."""
        if node_size < 1 or size % node_size:
            raise ConfigError(
                f"RuntimeConfig.node_size={node_size} was asked for, found {size} ranks, which are "
                "not a whole number of such nodes; leave it at None, and nodes are found out"
            )
        return cls.of([rank // node_size for rank in range(size)])

    @property
    def size(self) -> int:
        """Ranks in all."""
        return sum(map(len, self.nodes))

    def node_of(self, rank: int) -> int:
        """Position of the rank's node."""
        return next(node for node, ranks in enumerate(self.nodes) if rank in ranks)

    def neighbours(self, rank: int) -> int:
        """Ranks on the node of ``rank``, itself included."""
        return len(self.nodes[self.node_of(rank)])

    def link(self, one: int, other: int) -> Link:
        """What connects two ranks."""
        return Link.INTRA if self.node_of(one) == self.node_of(other) else Link.INTER

    def representative(self, node: int, source: int) -> int:
        """Who takes what ``source``, a rank of another node, sends to ``node``.

        The rank with the place on its node that the source has on its own, so that all network
        cards of a node have their part.
        """
        ranks = self.nodes[node]
        place = self.nodes[self.node_of(source)].index(source)
        return ranks[place % len(ranks)]

    def destinations(self, source: int) -> tuple[int, ...]:
        """To whom ``source`` sends its own results: representatives first, then its node."""
        home = self.node_of(source)
        far = [self.representative(n, source) for n in range(len(self.nodes)) if n != home]
        return (*far, *(rank for rank in self.nodes[home] if rank != source))

    def passes_on(self, rank: int, source: int) -> tuple[int, ...]:
        """To whom ``rank`` passes on what came from ``source``; empty for most."""
        node = self.node_of(rank)
        if node == self.node_of(source) or self.representative(node, source) != rank:
            return ()
        return tuple(other for other in self.nodes[node] if other != rank)

    def in_turns(self) -> list[int]:
        """All ranks, one of each node after the other: few owners are spread over the nodes."""
        most = max(map(len, self.nodes))
        return [ranks[place] for place in range(most) for ranks in self.nodes if place < len(ranks)]
