"""All ranks learn what all of them have."""

import random
import threading

import pytest

from asteria.distributed.agreement import Agreement
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from tests.distributed.test_topology import over_topologies
from tests.support.execution import FakeClock
from tests.support.network import Network, posts


@over_topologies
def test_common_bits(topology: Topology) -> None:
    chance = random.Random(topology.size)
    network = Network(topology.size, chance)
    found: list[list[int]] = [[] for _ in range(topology.size)]
    bits = [[chance.getrandbits(80) for _ in range(5)] for _ in range(topology.size)]
    all_posts = posts(network, topology)
    agreements = [Agreement(post, topology) for post in all_posts]
    for post in all_posts:
        post.open()

    def rank(number: int) -> None:
        found[number] += [agreements[number].common(mine, "this") for mine in bits[number]]

    stop = network.run()
    threads = [threading.Thread(target=rank, args=(n,)) for n in range(topology.size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    stop()
    expected = []
    for step in zip(*bits, strict=True):
        common = -1
        for one in step:
            common &= one
        expected.append(common)
    assert found == [expected] * topology.size
    assert not any(agreement._polls for agreement in agreements)


@pytest.mark.parametrize(
    ("who", "silent", "named"),
    [(0, [3], 2), (0, [1], 1), (2, [3], 3), (3, [], 2), (1, [], 0)],
    ids=["other node", "own node", "leader", "member of another", "member"],
)
def test_who_does_not_vote_is_named(who: int, silent: list[int], named: int) -> None:
    """As far as the way of the votes tells."""
    clock, topology = FakeClock(), Topology.even(4, 2)
    network = Network(4)
    all_posts = posts(network, topology, clock)
    agreements = [Agreement(post, topology) for post in all_posts]
    for post in all_posts:
        post.open()
    for rank in range(4):
        if rank not in (who, *silent) and silent:
            agreements[rank]._vote(1, rank, 1)
    network.deliver_all()
    poll = agreements[who]._poll(1)
    agreements[who]._vote(1, who, 1)

    def silence(seconds: float) -> bool:
        clock.advance(seconds)
        return poll.done.is_set()

    missing = agreements[who]._missing
    with pytest.raises(CoherenceError, match=f"rank {named} does not answer"):
        all_posts[who].wait(silence, lambda: missing(poll), "an agreement", "agreement")
