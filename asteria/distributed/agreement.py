"""One small reduction over all ranks: what every one of them has.

Votes go to the first rank of each node and from there to rank 0; the result takes the way back. A
rank that does not vote is known by name to who waits for it.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from torch import Tensor

from asteria.distributed.letters import Letter
from asteria.distributed.post import Post
from asteria.distributed.topology import Topology

__all__ = ["Agreement"]

_VOTE, _RESULT = "vote", "result"


@dataclass(slots=True)
class _Poll:
    """One reduction, as far as this rank knows it."""

    voters: list[int] = field(default_factory=list)
    bits: int = -1
    result: int | None = None
    done: threading.Event = field(default_factory=threading.Event)


class Agreement:
    """Reductions among the ranks of one optimizer, one after the other."""

    def __init__(self, post: Post, topology: Topology) -> None:
        self._post = post
        self._lock = threading.Lock()
        self._polls: dict[int, _Poll] = {}
        """Guarded by the lock."""
        self._count = 0
        mine = topology.nodes[topology.node_of(post.rank)]
        leaders = [ranks[0] for ranks in topology.nodes]
        self._leader = mine[0] if post.rank != mine[0] else leaders[0]
        """Where this rank's votes go."""
        self._members: list[int] = []
        """Whose votes come here, besides its own."""
        if post.rank == mine[0]:
            self._members += mine[1:]
        if post.rank == leaders[0]:
            self._members += leaders[1:]
        self._is_root = post.rank == leaders[0]
        post.on(_VOTE, self._take_vote)
        post.on(_RESULT, self._take_result)

    def common(self, bits: int, what: str) -> int:
        """The bits that are set on every rank; all of them ask, in the same order.

        ``what`` says what it is about. Raises CoherenceError where a rank does not answer. For the
        training thread.
        """
        self._count += 1
        number = self._count
        self._vote(number, self._post.rank, bits)
        poll = self._poll(number)
        self._post.wait(poll.done.wait, lambda: self._missing(poll), what, "agreement")
        with self._lock:
            del self._polls[number]
        return poll.result or 0

    def _missing(self, poll: _Poll) -> list[int]:
        with self._lock:
            silent = [rank for rank in self._members if rank not in poll.voters]
        return silent or [self._leader]

    def _poll(self, number: int) -> _Poll:
        with self._lock:
            return self._polls.setdefault(number, _Poll())

    def _vote(self, number: int, rank: int, bits: int) -> None:
        poll = self._poll(number)
        with self._lock:
            poll.voters.append(rank)
            poll.bits &= bits
            complete = len(poll.voters) == 1 + len(self._members)
        if complete and self._is_root:
            self._conclude(number, poll.bits)
        elif complete:
            letter = Letter(_VOTE, number, self._post.rank, {"bits": hex(poll.bits)})
            self._post.send(letter, [self._leader])

    def _conclude(self, number: int, bits: int) -> None:
        poll = self._poll(number)
        self._post.send(
            Letter(_RESULT, number, self._post.rank, {"bits": hex(bits)}), self._members
        )
        poll.result = bits
        poll.done.set()

    def _take_vote(self, letter: Letter, _: Tensor) -> None:
        self._vote(letter.serial, letter.author, int(letter.note["bits"], 16))

    def _take_result(self, letter: Letter, _: Tensor) -> None:
        self._conclude(letter.serial, int(letter.note["bits"], 16))
