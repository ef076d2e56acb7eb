"""What it costs to bring results everywhere."""

from collections import Counter

import pytest

from asteria.distributed.spread import Speed, messages, round_bytes, sent_bytes, spread_s
from asteria.distributed.topology import Link, Topology
from tests.distributed.test_topology import deliveries, over_topologies

SPEEDS = {Link.INTRA: Speed(1000.0), Link.INTER: Speed(10.0)}


@over_topologies
def test_messages_are_those_of_the_way(topology: Topology) -> None:
    for source in range(topology.size):
        counted = Counter(topology.link(*pair) for pair in deliveries(topology, source))
        assert messages(topology, source) == {link: counted[link] for link in Link}


def test_the_hierarchy_spares_the_slow_link() -> None:
    topology = Topology.even(32, 8)
    assert sent_bytes(100, topology, 0) == {Link.INTRA: 2800, Link.INTER: 300}
    flat = sent_bytes(100, topology, 0, hierarchical=False)
    assert flat == {Link.INTRA: 700, Link.INTER: 2400}


@over_topologies
def test_a_round_is_the_sum_of_its_results(topology: Topology) -> None:
    sizes = [7 * (place + 1) for place in range(2 * topology.size)]
    owners = [place % topology.size for place in range(len(sizes))]
    expected: Counter[Link] = Counter()
    for size, owner in zip(sizes, owners, strict=True):
        expected.update(sent_bytes(size, topology, owner))
    sent = round_bytes(sizes, owners, topology)
    assert len(sent) == topology.size
    assert +sum(sent, Counter()) == +expected


def test_seconds() -> None:
    """Two copies over the slow link, one after the other, and three within the last node."""
    assert spread_s(100, Topology.even(12, 4), 0, SPEEDS) == pytest.approx(20.3)
    assert spread_s(100, Topology.even(4, 4), 0, SPEEDS) == pytest.approx(0.3)
    assert spread_s(100, Topology.even(1, 1), 0, SPEEDS) == 0
    slow = {Link.INTRA: Speed(1000.0, latency_s=1.0), Link.INTER: Speed(10.0)}
    assert spread_s(100, Topology.even(4, 4), 0, slow) == pytest.approx(3.3)
