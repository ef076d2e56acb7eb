"""Wires between ranks of one process that carry what a test tells them to, in any order."""

import random
import threading
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from asteria.distributed.links import LinkCounters
from asteria.distributed.post import Post
from asteria.distributed.topology import Topology
from asteria.distributed.wire import Sent, Take


class Message(NamedTuple):
    """On its way."""

    source: int
    target: int
    buffer: Tensor
    sent: Sent


class Network:
    """Wires of so many ranks. Messages of a pair of ranks arrive in order, others in any order."""

    def __init__(self, size: int, chance: random.Random | None = None) -> None:
        self.wires = [NetworkWire(self, rank) for rank in range(size)]
        self.takes: dict[int, Take] = {}
        self.messages: list[Message] = []
        self.gone: set[int] = set()
        """Ranks that have ended: who sends to them is told."""
        self.stopped: set[int] = set()
        """Ranks that take nothing, and nobody is told."""
        self._chance = chance or random.Random(0)
        self._changed = threading.Condition()
        self._ends = False

    def listen(self, rank: int, take: Take) -> None:
        """For the wires: what comes for ``rank`` before waits."""
        with self._changed:
            self.takes[rank] = take
            self._changed.notify_all()

    def put(self, message: Message) -> None:
        """For the wires."""
        if message.target in self.gone:
            message.sent(RuntimeError("connection closed by peer"))
            return
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def _next(self) -> Message | None:
        """A random message that is the oldest of its pair; with the condition held."""
        ready: dict[tuple[int, int], Message] = {}
        for message in self.messages:
            if message.target in self.takes.keys() - self.stopped:
                ready.setdefault((message.source, message.target), message)
        if not ready:
            return None
        message = self._chance.choice(list(ready.values()))
        self.messages = [other for other in self.messages if other is not message]
        return message

    def deliver_one(self) -> bool:
        """Whether there was a message to deliver."""
        with self._changed:
            message = self._next()
        if message is None:
            return False
        self._deliver(message)
        return True

    def deliver_all(self) -> None:
        """Until nobody writes any more."""
        while self.deliver_one():
            pass

    def _deliver(self, message: Message) -> None:
        self.takes[message.target](message.source, message.buffer)
        message.sent(None)

    def lose(self, rank: int) -> None:
        """A rank ends; what is on its way to it is lost."""
        self.gone.add(rank)
        lost = [message for message in self.messages if rank in message[:2]]
        self.messages = [message for message in self.messages if rank not in message[:2]]
        for message in lost:
            message.sent(RuntimeError("connection closed by peer"))

    def run(self) -> Callable[[], None]:
        """Deliver on a thread of its own, in random order, until the result is called."""

        def work() -> None:
            while True:
                with self._changed:
                    while (message := self._next()) is None:
                        if self._ends:
                            return
                        self._changed.wait()
                self._deliver(message)

        self._ends = False
        thread = threading.Thread(target=work, daemon=True)
        thread.start()

        def stop() -> None:
            with self._changed:
                self._ends = True
                self._changed.notify_all()
            thread.join()

        return stop


class NetworkWire:
    """The end of one rank."""

    def __init__(self, network: Network, rank: int) -> None:
        self._network = network
        self._rank = rank

    def listen(self, take: Take) -> None:
        """See `Wire`."""
        self._network.listen(self._rank, take)

    def send(self, rank: int, buffer: Tensor, sent: Sent) -> None:
        """See `Wire`."""
        self._network.put(Message(self._rank, rank, buffer, sent))


def posts(
    network: Network,
    topology: Topology,
    clock: Callable[[], float] | None = None,
    timeout_s: float = 10.0,
) -> list[Post]:
    """A post of every rank."""
    times = {} if clock is None else {"clock": clock}
    return [
        Post(rank, wire, LinkCounters(rank, topology), timeout_s=timeout_s, **times)
        for rank, wire in enumerate(network.wires)
    ]
