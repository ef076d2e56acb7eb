"""Letters find their handlers, and who waits for one learns what has become of it."""

import pytest
import torch

from asteria.distributed.letters import Letter
from asteria.distributed.post import Post
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from tests.support.execution import FakeClock
from tests.support.network import Network, posts

TIMEOUT_S = 10.0


class Pair:
    """Two ranks on two nodes, and what they have received."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.network = Network(2)
        self.posts = posts(self.network, Topology.even(2, 1), self.clock, TIMEOUT_S)
        self.received: list[list[Letter]] = [[], []]
        for post, received in zip(self.posts, self.received, strict=True):
            post.on("basis", lambda letter, _, to=received: to.append(letter))  # type: ignore[misc]
            post.open()

    def silence(self, seconds: float) -> bool:
        """Nothing arrives, and time passes; what is on its way is delivered as far as it can be."""
        self.clock.advance(seconds)
        self.network.deliver_all()
        return False


def letter(rank: int, size: int = 4) -> Letter:
    return Letter("basis", 1, rank, {}, [torch.zeros(size)])


def waits(post: Post) -> list[tuple[int, str, str, int]]:
    return [(w.rank, w.link, w.cause, w.count) for w in post.counters.summary().waits]


def test_letters_arrive_and_are_counted() -> None:
    pair = Pair()
    delivery = pair.posts[0].send(letter(0), [1])
    assert delivery.missing == [1]
    assert not delivery.wait(0.0)
    pair.network.deliver_all()
    assert delivery.wait(0.0)
    assert [got.author for got in pair.received[1]] == [0]
    for post, direction in zip(pair.posts, ("sent", "received"), strict=True):
        links = post.counters.summary().links
        assert getattr(links["inter"], f"{direction}_bytes") == 16
        assert getattr(links["inter"], f"{direction}_messages") == 1
        assert links["intra"].sent_messages == links["intra"].received_messages == 0


def test_a_wait_that_ends_is_counted() -> None:
    pair = Pair()
    delivery = pair.posts[0].send(letter(0), [1])

    def arrived(seconds: float) -> bool:
        self_paced = seconds > 0 and not pair.silence(seconds)
        return self_paced and delivery.wait(0.0)

    pair.posts[0].wait(arrived, lambda: delivery.missing, "others to take it", "delivery")
    assert waits(pair.posts[0]) == [(1, "inter", "delivery", 1)]
    pair.posts[0].wait(delivery.wait, lambda: delivery.missing, "it again", "delivery")
    assert waits(pair.posts[0]) == [(1, "inter", "delivery", 1)], "it is there: no wait"


def test_a_rank_that_is_gone_is_found_out_at_once() -> None:
    """Although nothing was sent to it: who waits asks whether it is there."""
    pair = Pair()
    pair.network.lose(1)
    with pytest.raises(
        CoherenceError, match="rank 0 waited for the basis of w, and rank 1 is gone"
    ):
        pair.posts[0].wait(pair.silence, lambda: [1], "the basis of w", "basis")
    assert pair.clock.now_s <= 1.0
    assert waits(pair.posts[0]) == [(1, "inter", "basis", 1)]


def test_a_rank_that_is_stuck_is_found_out_after_the_timeout() -> None:
    pair = Pair()
    pair.network.stopped.add(1)
    with pytest.raises(CoherenceError, match="waited 10 s for the basis of w, and rank 1 does not"):
        pair.posts[0].wait(pair.silence, lambda: [1], "the basis of w", "basis")
    assert pair.clock.now_s == TIMEOUT_S
    assert len(pair.network.messages) == 1, "it is asked once"


def test_who_is_stuck_is_named_and_not_who_waits_for_it() -> None:
    clock, network = FakeClock(), Network(3)
    three = posts(network, Topology.even(3, 3), clock, TIMEOUT_S)
    for post in three:
        post.on("basis", lambda *_: None)
        post.open()
    network.stopped.add(2)
    three[0].send(letter(0), [2])
    delivery = three[0].send(letter(0), [1, 2])
    network.deliver_all()

    def silence(seconds: float) -> bool:
        clock.advance(seconds)
        return delivery.wait(0.0)

    with pytest.raises(CoherenceError, match="rank 2 does not answer"):
        three[0].wait(silence, lambda: delivery.missing, "others", "delivery")


def test_a_letter_that_nobody_can_read_ends_the_waits() -> None:
    pair = Pair()
    pair.posts[1].send(Letter("nonsense", 1, 1), [0])
    pair.network.deliver_all()
    with pytest.raises(CoherenceError, match="nonsense"):
        pair.posts[0].wait(pair.silence, lambda: [1], "the basis of w", "basis")


def test_a_group_that_is_gone_ends_the_waits() -> None:
    pair = Pair()
    pair.posts[0].take(-1, RuntimeError("the process group was destroyed"))
    with pytest.raises(CoherenceError, match="the process group was destroyed"):
        pair.posts[0].wait(pair.silence, lambda: [1], "the basis of w", "basis")


def test_pings_are_no_traffic() -> None:
    pair = Pair()
    steps = iter([False, False, False, True])
    pair.posts[0].wait(lambda s: bool(s) and next(steps), lambda: [1], "w", "basis")
    assert pair.network.messages
    pair.network.deliver_all()
    assert pair.posts[0].counters.summary().links["inter"].sent_messages == 0
    assert pair.posts[1].counters.summary().links["inter"].received_messages == 0
