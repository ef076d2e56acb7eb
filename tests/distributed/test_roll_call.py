"""Whoever lives answers a call; who is gone and who is stopped are told apart."""

import gc

import pytest

from asteria.distributed.roll_call import RollCall, call, patience_s
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from tests.support.execution import FakeClock
from tests.support.network import Network, posts

RANKS = (4, 6, 7)
"""Of the default group."""


class Delivering:
    """A clock that passes by a second at each look, and until then everything has arrived."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._now_s = 0.0

    def __call__(self) -> float:
        self._network.deliver_all()
        self._now_s += 1.0
        return self._now_s


def roll_calls(network: Network) -> list[RollCall]:
    made = []
    for post in posts(network, Topology.even(3, 3)):
        made.append(RollCall(post, RANKS, answer_s=2.0, clock=Delivering(network)))
        post.open()
    return made


def test_all_are_there() -> None:
    for asking in roll_calls(Network(3)):
        assert asking.missing(RANKS) == {}


def test_who_is_gone_and_who_is_silent_are_named_as_the_user_knows_them() -> None:
    network = Network(3)
    first = roll_calls(network)[0]
    network.lose(2)
    network.stopped.add(1)
    assert first.missing(RANKS) == {
        6: "does not answer",
        7: "is gone (connection closed by peer)",
    }
    assert first.missing([4]) == {}, "who asks is there"
    assert first.missing([4, 7]) == {7: "is gone (connection closed by peer)"}
    network.stopped.clear()
    assert first.missing([4, 6]) == {}, "late answers to the first call are none to this one"


def test_a_wait_that_is_too_long_names_who_is_missing_and_not_who_waits_for_it() -> None:
    """Rank 6 is asked for something that it cannot have, because of rank 7."""
    network = Network(3)
    clock = FakeClock()
    first, *_ = made = posts(network, Topology.even(3, 3), clock, timeout_s=5.0)
    for post in made:
        RollCall(post, RANKS, answer_s=2.0, clock=Delivering(network))
        post.open()
    network.stopped.add(2)

    def silence(seconds: float) -> bool:
        clock.advance(seconds)
        return False

    with pytest.raises(CoherenceError, match="for a basis, and rank 2 does not answer. Look"):
        first.wait(silence, lambda: [1], "a basis", "basis")
    links = first.counters.summary().links
    assert not any(link.sent_messages or link.received_messages for link in links.values())


def test_who_is_missing_is_known_within_the_timeout() -> None:
    assert patience_s(1800.0) == 1799.0
    assert patience_s(1.0) == 0.5


def test_any_optimizer_of_the_process_can_ask() -> None:
    network = Network(3)
    made = roll_calls(network)
    network.lose(0)
    assert call([6, 4]) == {4: "is gone (connection closed by peer)"}
    assert call([4, 5]) is None, "nobody reaches rank 5"
    made.clear()
    del network
    gc.collect()
    assert call([6, 7]) is None
