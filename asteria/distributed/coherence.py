"""New bases travel from their owner to every rank; nothing else does.

Every rank counts the refreshes that are launched, in the same order, because it decides from the
same counters: this number names a result on all ranks without a word between them. The owner sends
a result when it is there, and a rank takes it whenever it comes, be it before it has launched the
refresh itself. What each rank installs, and when, follows from the schedule; a rank whose result
is not there at that step waits for it.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, TypeVar

from torch import Tensor

from asteria.distributed.letters import Letter, pack
from asteria.distributed.post import Delivery, Post
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from asteria.refresh.job import Job

__all__ = ["Arrival", "Coherence"]

T = TypeVar("T")

_KIND = "basis"
_REMEMBERED = 10_000
"""Launches, of which results may still come."""


class Arrival(Job[T], Generic[T]):
    """A refresh that another rank computes: done when its result has come. As `Job`."""

    def __init__(self, subject: str, owner: int, unpack: Callable[[Letter], T], post: Post) -> None:
        """``unpack`` makes the outcome of what has come by ``post``, on the receiving thread."""
        super().__init__(_nobody, name=subject, urgency=())
        self.owner = owner
        self._unpack = unpack
        self._post = post

    def await_by(self, wait: Callable[[Job[T]], None]) -> None:
        """Return once the result has come, whatever workers do here.

        Raises CoherenceError where it does not come. For the training thread.
        """
        self._post.wait(self.wait, lambda: [self.owner], self.name, "basis")

    def take(self, letter: Letter) -> None:
        """The result has come."""
        work = functools.partial(self._unpack, letter)
        Job(work, name=self.name, urgency=(), then=self._end).run()

    def _end(self, outcome: T | None, error: BaseException | None) -> None:
        if error is not None:
            self.fail(error)
        else:
            self.complete(outcome)  # type: ignore[arg-type]  # None is an outcome, too


def _nobody() -> Any:
    raise RuntimeError("another rank does this job")


class Coherence:
    """What travels for one optimizer on one rank. For the training thread unless said otherwise."""

    def __init__(self, post: Post, topology: Topology) -> None:
        self._post = post
        self._topology = topology
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._number = 0
        """Refreshes launched so far."""
        self._launched: dict[int, tuple[str, int]] = {}
        """(subject, owner) by number, of the latest."""
        self._early: dict[int, Letter] = {}
        """Results of refreshes that this rank has not launched yet."""
        self._expected: dict[int, Arrival[Any]] = {}
        self._deliveries: dict[int, Delivery] = {}
        """Of results that this rank has sent or passed on."""
        post.on(_KIND, self._take)

    def own(self, subject: str) -> int:
        """This rank launches a refresh: its number, the same on all ranks."""
        with self._lock:
            number, early = self._count(subject, self._post.rank)
        if early is not None:
            self._check(early)
        return number

    def _count(self, subject: str, owner: int) -> tuple[int, Letter | None]:
        """Number of a refresh that is launched, and its result if that is there already."""
        self._number += 1
        self._launched[self._number] = subject, owner
        self._launched.pop(self._number - _REMEMBERED, None)
        return self._number, self._early.pop(self._number, None)

    def expect(
        self, subject: str, owner: int, unpack: Callable[[Letter], T]
    ) -> tuple[int, Arrival[T]]:
        """Another rank launches a refresh: its number, and a job that is done when it has come."""
        arrival = Arrival(subject, owner, unpack, self._post)
        with self._lock:
            number, early = self._count(subject, owner)
            if early is None:
                self._expected[number] = arrival
        if early is not None and self._check(early):
            arrival.take(early)
        return number, arrival

    def publish(
        self, number: int, subject: str, note: Mapping[str, Any], tensors: Sequence[Tensor | None]
    ) -> None:
        """Send a result of this rank to all others. Any thread; never waits."""
        rank = self._post.rank
        letter = Letter(_KIND, number, rank, {**note, "subject": subject}, tensors)
        self._send(letter, pack(letter), self._topology.destinations(rank))

    def _send(self, letter: Letter, buffer: Tensor, ranks: Sequence[int]) -> None:
        if not ranks:
            return
        delivery = self._post.forward(letter, buffer, ranks)
        with self._lock:
            for number in [n for n, known in self._deliveries.items() if not known.missing]:
                del self._deliveries[number]
            self._deliveries[letter.serial] = delivery

    def _take(self, letter: Letter, buffer: Tensor) -> None:
        """A result has come. On the receiving thread."""
        self._send(letter, buffer, self._topology.passes_on(self._post.rank, letter.author))
        with self._lock:
            arrival = self._expected.pop(letter.serial, None)
            if letter.serial > self._number:
                self._early[letter.serial] = letter
        if self._check(letter) and arrival is not None:
            arrival.take(letter)

    def _check(self, letter: Letter) -> bool:
        """Whether the letter is about what this rank has launched with that number.

        If not, every wait for another rank ends with an error that says so.
        """
        found = letter.note["subject"], letter.author
        with self._lock:
            subject, owner = self._launched.get(letter.serial, found)
        if (subject, owner) == found:
            return True
        name = self._post.name
        self._post.fail(
            CoherenceError(
                f"{name(self._post.rank)} has {subject}, of {name(owner)}, as number "
                f"{letter.serial} of all refreshes, and {name(letter.author)} {found[0]}: their "
                "schedules differ. All ranks must step the same parameters, with the same options, "
                "and load the same state; start them again from a checkpoint"
            )
        )
        return False

    def forget(self, number: int) -> None:
        """Nobody wants this result any more; it is dropped when it comes."""
        with self._lock:
            self._expected.pop(number, None)

    def wait_delivered(self, number: int, subject: str) -> None:
        """Return once the others have a result that this rank has sent or passed on.

        So whoever has taken a step may end: what others need for theirs is with them. Raises
        CoherenceError where it does not arrive.
        """
        with self._lock:
            delivery = self._deliveries.get(number)
        if delivery is not None:
            what = f"others to take {subject}"
            self._post.wait(delivery.wait, lambda: delivery.missing, what, "delivery")
