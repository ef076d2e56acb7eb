"""Who is near whom, and the way of a result to all ranks."""

import pytest

from asteria.distributed.topology import Link, Topology
from asteria.errors import ConfigError

TOPOLOGIES = {
    "one rank": Topology.of(["a"]),
    "one node": Topology.even(4, 4),
    "two nodes": Topology.even(4, 2),
    "a rank per node": Topology.even(5, 1),
    "many nodes": Topology.even(24, 4),
    "uneven": Topology.of("aaabbc"),
    "mixed": Topology.of("abcabcab"),
}
over_topologies = pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)


def deliveries(topology: Topology, source: int) -> list[tuple[int, int]]:
    """(from, to) of every message that spreads a result of ``source``."""
    found = []
    for rank in topology.destinations(source):
        found.append((source, rank))
        found += [(rank, other) for other in topology.passes_on(rank, source)]
    return found


@over_topologies
def test_a_result_reaches_every_rank_once(topology: Topology) -> None:
    for source in range(topology.size):
        reached = sorted(to for _, to in deliveries(topology, source))
        assert reached == [rank for rank in range(topology.size) if rank != source]


@over_topologies
def test_it_crosses_the_slow_link_once_per_node(topology: Topology) -> None:
    for source in range(topology.size):
        slow = [pair for pair in deliveries(topology, source) if topology.link(*pair) is Link.INTER]
        nodes = [topology.node_of(to) for _, to in slow]
        assert sorted([topology.node_of(source), *nodes]) == list(range(len(topology.nodes)))
        assert all(sender == source for sender, _ in slow)


def test_the_network_cards_of_a_node_take_turns() -> None:
    topology = Topology.even(8, 4)
    assert [topology.representative(1, source) for source in range(4)] == [4, 5, 6, 7]
    assert Topology.of("aaab").representative(1, 2) == 3, "a smaller node"


def test_few_owners_are_spread_over_the_nodes() -> None:
    assert Topology.even(6, 3).in_turns() == [0, 3, 1, 4, 2, 5]
    assert Topology.of("aaab").in_turns() == [0, 3, 1, 2]


def test_nodes_may_be_interleaved() -> None:
    topology = Topology.of("abab")
    assert topology.nodes == ((0, 2), (1, 3))
    assert topology.link(0, 2) is Link.INTRA
    assert topology.link(0, 1) is Link.INTER
    assert topology.neighbours(3) == 2


@pytest.mark.parametrize("node_size", [3, 0, -1])
def test_ranks_that_are_no_whole_number_of_nodes(node_size: int) -> None:
    with pytest.raises(ConfigError, match=f"node_size={node_size} was asked for, found 4 ranks"):
        Topology.even(4, node_size)
