"""Results reach every rank once, whenever they are there, and are told apart."""

import itertools
import random

import pytest
import torch

from asteria.distributed.coherence import Arrival, Coherence
from asteria.distributed.letters import Letter
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from tests.support.execution import FakeClock
from tests.support.network import Network, posts


class Ranks:
    """Some ranks whose messages arrive when a test says so."""

    def __init__(self, topology: Topology, seed: int = 0) -> None:
        self.clock = FakeClock()
        self.network = Network(topology.size, random.Random(seed))
        self.posts = posts(self.network, topology, self.clock)
        self.all = [Coherence(post, topology) for post in self.posts]
        for post in self.posts:
            post.open()

    def launch(self, rank: int, subject: str, owner: int) -> tuple[int, Arrival[float] | None]:
        """One rank launches a refresh."""
        if rank == owner:
            return self.all[rank].own(subject), None
        return self.all[rank].expect(subject, owner, value)


def value(letter: Letter) -> float:
    (tensor,) = letter.tensors
    assert tensor is not None
    return float(tensor) + float(letter.note["more"])


def publish(ranks: Ranks, owner: int, number: int, subject: str, size: float) -> None:
    ranks.all[owner].publish(number, subject, {"more": 0.5}, [torch.tensor(size)])


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_launches_results_and_letters(seed: int) -> None:
    """Ranks are steps apart, results come before or after their launch; all get the same."""
    chance = random.Random(seed)
    topology = Topology.even(4, 2)
    ranks = Ranks(topology, seed)
    plan = [(f"refresh {n}", chance.randrange(4)) for n in range(12)]
    launched: list[list[tuple[int, Arrival[float] | None]]] = [[] for _ in range(4)]
    unpublished = list(range(len(plan)))
    while unpublished or any(len(mine) < len(plan) for mine in launched) or ranks.network.messages:
        rank = chance.randrange(4)
        if len(launched[rank]) < len(plan):
            launched[rank].append(ranks.launch(rank, *plan[len(launched[rank])]))
        ready = [n for n in unpublished if len(launched[plan[n][1]]) > n]
        if ready and chance.random() < 0.5:
            n = chance.choice(ready)
            unpublished.remove(n)
            publish(ranks, plan[n][1], n + 1, plan[n][0], float(n))
        ranks.network.deliver_one()
    for rank, mine in enumerate(launched):
        assert [number for number, _ in mine] == list(range(1, len(plan) + 1))
        for n, (_, arrival) in enumerate(mine):
            assert (arrival is None) == (plan[n][1] == rank)
            if arrival is not None:
                arrival.await_by(lambda job: None)
                assert arrival.outcome() == n + 0.5
            ranks.all[rank].wait_delivered(n + 1, plan[n][0])
    assert not any(post.counters.summary().waits for post in ranks.posts)


def test_bytes_are_those_of_the_formula() -> None:
    topology = Topology.even(4, 2)
    ranks = Ranks(topology)
    for rank in range(4):
        ranks.launch(rank, "w", 1)
    publish(ranks, 1, 1, "w", 2.0)
    ranks.network.deliver_all()
    links = [post.counters.summary().links for post in ranks.posts]
    assert [(link["intra"].sent_bytes, link["inter"].sent_bytes) for link in links] == [
        (0, 0),
        (4, 4),
        (0, 0),
        (4, 0),
    ]
    assert [sum(link.received_messages for link in mine.values()) for mine in links] == [1, 0, 1, 1]


def test_ranks_that_launch_different_refreshes_are_told_apart() -> None:
    """Whoever owns what, and whether the result comes before the launch or after."""
    owners = [(0, 0), (0, 1), (1, 0)]
    for (real, believed), early in itertools.product(owners, [False, True]):
        ranks = Ranks(Topology.even(2, 2))
        ranks.launch(real, "refresh of a at step 3", real)
        publish(ranks, real, 1, "refresh of a at step 3", 1.0)
        other = 1 - real
        if early:
            ranks.network.deliver_all()
        ranks.launch(other, "refresh of b at step 3", believed)
        ranks.network.deliver_all()
        _, arrival = ranks.launch(other, "refresh of c at step 3", real)
        assert arrival is not None
        with pytest.raises(
            CoherenceError,
            match=f"rank {other} has refresh of b at step 3, of rank {believed}, as number 1 of "
            f"all refreshes, and rank {real} refresh of a at step 3",
        ):
            arrival.await_by(lambda job: None)


def test_an_error_in_a_result_is_its_outcome() -> None:
    ranks = Ranks(Topology.even(2, 2))
    ranks.launch(0, "w", 0)
    _, arrival = ranks.launch(1, "w", 0)
    ranks.all[0].publish(1, "w", {}, [torch.zeros(())])
    ranks.network.deliver_all()
    assert arrival is not None
    assert arrival.done
    with pytest.raises(KeyError, match="more"):
        arrival.outcome()


def test_what_nobody_wants_any_more_is_dropped() -> None:
    ranks = Ranks(Topology.even(2, 2))
    for rank in range(2):
        ranks.launch(rank, "w", 0)
    ranks.all[1].forget(1)
    publish(ranks, 0, 1, "w", 1.0)
    ranks.network.deliver_all()
    assert not ranks.all[1]._expected
    assert not ranks.all[1]._early


def test_a_wait_for_a_rank_that_is_gone() -> None:
    ranks = Ranks(Topology.even(2, 2))
    _, arrival = ranks.launch(1, "refresh of w at step 3", 0)
    ranks.network.lose(0)
    assert arrival is not None
    with pytest.raises(CoherenceError, match="waited for refresh of w at step 3, and rank 0 is"):
        arrival.await_by(lambda job: None)


def test_records_of_deliveries_do_not_pile_up() -> None:
    ranks = Ranks(Topology.even(2, 2))
    for n in range(1, 10):
        ranks.all[0].own("w")
        publish(ranks, 0, n, "w", 1.0)
        ranks.network.deliver_all()
    assert len(ranks.all[0]._deliveries) == 1
