"""Letters between ranks: sorted by kind when they arrive, and followed until they have arrived."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from typing import TypeAlias

from torch import Tensor

from asteria.distributed.letters import Letter, pack, unpack
from asteria.distributed.links import LinkCounters
from asteria.distributed.wire import Wire
from asteria.errors import CoherenceError

__all__ = ["Delivery", "Handler", "Post"]

Handler: TypeAlias = Callable[[Letter, Tensor], None]
"""Called with a letter and the buffer it came in, on the receiving thread."""

_LOOK_S = 0.5
"""How often a waiting thread looks whether the other rank is alive."""
_PING = "ping"


class Delivery:
    """A letter on its way to some ranks. Any thread."""

    def __init__(self, ranks: Iterable[int]) -> None:
        self._missing = dict.fromkeys(ranks)
        self._lock = threading.Lock()
        self._done = threading.Event()
        if not self._missing:
            self._done.set()

    @property
    def missing(self) -> list[int]:
        """Ranks that it has not reached."""
        with self._lock:
            return list(self._missing)

    def wait(self, timeout_s: float) -> bool:
        """Whether it has reached all ranks, after waiting so long at most."""
        return self._done.wait(timeout_s)

    def arrived(self, rank: int) -> None:
        """It has reached ``rank``."""
        with self._lock:
            self._missing.pop(rank, None)
            if not self._missing:
                self._done.set()


class Post:
    """Sends letters of one rank and hands those that come to their handlers.

    Sending never waits. Any thread may call anything.
    """

    def __init__(
        self,
        rank: int,
        wire: Wire,
        counters: LinkCounters,
        *,
        timeout_s: float,
        names: Mapping[int, str] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``timeout_s`` bounds every wait; ``names`` of ranks for messages; ``clock`` in s."""
        self.rank = rank
        self.counters = counters
        self._wire = wire
        self._timeout_s = timeout_s
        self._names = names or {}
        self._clock = clock
        self._handlers: dict[str, Handler] = {}
        self._uncounted = {_PING}
        self._missing: Callable[[], Mapping[int, str]] = dict
        self._lost: dict[int, str] = {}
        """Ranks that nothing can be sent to any more, and why."""
        self._broken: Exception | None = None
        self._lock = threading.Lock()
        self._outstanding: dict[int, int] = {}
        """Number of a sending -> rank, oldest first."""
        self._numbers = itertools.count()

    def name(self, rank: int) -> str:
        """For messages."""
        return self._names.get(rank, f"rank {rank}")

    def lost(self, rank: int) -> str | None:
        """Why nothing can be sent to ``rank`` any more; None as long as something can."""
        return self._lost.get(rank)

    def on(self, kind: str, handler: Handler, *, counted: bool = True) -> None:
        """Who takes letters of this kind, and whether these are traffic; before `open`."""
        self._handlers[kind] = handler
        if not counted:
            self._uncounted.add(kind)

    def on_silence(self, missing: Callable[[], Mapping[int, str]]) -> None:
        """Who knows, after a timeout, which ranks are not there and what has become of them."""
        self._missing = missing

    def open(self) -> None:
        """Take letters from now on."""
        self._wire.listen(self.take)

    def send(self, letter: Letter, ranks: Iterable[int]) -> Delivery:
        """Send a letter to some ranks."""
        return self.forward(letter, pack(letter), ranks)

    def forward(self, letter: Letter, buffer: Tensor, ranks: Iterable[int]) -> Delivery:
        """Send a letter to some ranks that is packed in ``buffer``."""
        ranks = list(ranks)
        delivery = Delivery(ranks)
        for rank in ranks:
            number = next(self._numbers)
            with self._lock:
                self._outstanding[number] = rank
            if letter.kind not in self._uncounted:
                self.counters.sent(rank, letter.tensor_bytes)
            self._wire.send(rank, buffer, self._follow(number, rank, delivery))
        return delivery

    def _follow(
        self, number: int, rank: int, delivery: Delivery
    ) -> Callable[[Exception | None], None]:
        def sent(error: Exception | None) -> None:
            with self._lock:
                self._outstanding.pop(number, None)
            if error is None:
                delivery.arrived(rank)
            else:
                self._lost.setdefault(rank, str(error))

        return sent

    def fail(self, error: CoherenceError) -> None:
        """End all waits, those that are to come too, with this error."""
        self._broken = error

    def take(self, source: int, received: Tensor | Exception) -> None:
        """What has come in; for the wire."""
        if isinstance(received, Exception):
            self._broken = received
            return
        try:
            letter = unpack(received)
            if letter.kind not in self._uncounted:
                self.counters.received(source, letter.tensor_bytes)
            if letter.kind != _PING:
                self._handlers[letter.kind](letter, received)
        except Exception as error:  # for who waits in the training thread
            self._broken = error

    def wait(
        self,
        arrived: Callable[[float], bool],
        ranks: Callable[[], list[int]],
        what: str,
        cause: str,
    ) -> None:
        """Wait until ``arrived(seconds)``, which waits so long at most, is true.

        Raises CoherenceError where one of ``ranks()``, which it depends on, is gone, or after the
        timeout; ``what`` completes "waited for". Counted as a wait for ``cause``. For the training
        thread.
        """
        if arrived(0.0):
            return
        begin_s, suspects = self._clock(), ranks()
        try:
            while not arrived(_LOOK_S):
                suspects = ranks() or suspects
                self._check(suspects, self._clock() - begin_s, what)
                # What is sent to a rank that has gone comes back.
                for rank in set(suspects).difference(self._stalled()):
                    self.send(Letter(_PING, 0, self.rank), [rank])
        finally:
            for rank in suspects[:1]:
                self.counters.waited(rank, cause, self._clock() - begin_s)

    def _stalled(self) -> list[int]:
        """Ranks that something is on its way to, the oldest letter first."""
        with self._lock:
            return list(self._outstanding.values())

    def _check(self, suspects: list[int], waited_s: float, what: str) -> None:
        if isinstance(self._broken, CoherenceError):
            raise self._broken
        lost = [rank for rank in suspects if rank in self._lost]
        if lost or self._broken is not None:
            who, why = "the other ranks are", self._broken
            if lost:
                who, why = f"{self.name(lost[0])} is", Exception(self._lost[lost[0]])
            raise CoherenceError(
                f"{self.name(self.rank)} waited for {what}, and {who} gone: {why}. Weights and "
                "state are as the last step left them; start all ranks again from a checkpoint"
            )
        if waited_s >= self._timeout_s:
            # Who is waited for may wait for somebody else itself.
            missing = self._missing()
            # What was sent first arrives first: who does not take it is stuck.
            stuck = missing or {[*self._stalled(), *suspects][0]: "does not answer"}
            who = "; ".join(f"{self.name(rank)} {why}" for rank, why in stuck.items())
            raise CoherenceError(
                f"{self.name(self.rank)} waited {waited_s:.0f} s for {what}, and {who}. Look why "
                "it is stuck or slow, or raise the timeout of init_process_group. Weights and "
                "state are as the last step left them"
            )
