"""Which of the other ranks are there, asked when something that all do together has failed.

What torch.distributed says then names nobody, or a connection. Whoever lives answers a call, on
the thread that takes letters, whatever its training thread does; what is sent to a process that
has ended comes back; who is stopped does neither.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence

from torch import Tensor

from asteria.distributed.letters import Letter
from asteria.distributed.post import Post

__all__ = ["RollCall", "call", "patience_s"]

_CALL, _HERE = "who is there", "here"
_ANSWER_S = 1.0
"""Longest wait for answers, which come within a millisecond from a machine that is not busy."""
_LOOK_S = 0.1
"""How often a caller calls, and looks for letters that have come back."""


def patience_s(timeout_s: float) -> float:
    """How long to wait before ranks are called, so that who is missing is known in the timeout."""
    return max(timeout_s - _ANSWER_S, timeout_s / 2)


class RollCall:
    """Asks the ranks of one optimizer whether they are there, and answers them. Any thread."""

    def __init__(
        self,
        post: Post,
        ranks: Sequence[int],
        *,
        answer_s: float = _ANSWER_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``ranks`` of the default group in order of the post's; before the post is open."""
        self._post = post
        self._numbers_of = {rank: number for number, rank in enumerate(ranks)}
        self._answer_s = answer_s
        self._clock = clock
        self._serials = itertools.count()
        self._heard: dict[int, set[int]] = {}
        """Who has answered which call; guarded by the condition."""
        self._changed = threading.Condition()
        post.on(_CALL, self._answer, counted=False)
        post.on(_HERE, self._hear, counted=False)
        post.on_silence(lambda: self._absent(set(self._numbers_of.values())))
        _OPEN[next(_NUMBERS)] = self

    def reaches(self, ranks: Iterable[int]) -> bool:
        """Whether all of these can be asked."""
        return self._numbers_of.keys() >= set(ranks)

    def missing(self, ranks: Iterable[int]) -> dict[int, str]:
        """Those of ``ranks``, of the default group, that are not there, and what is known of them.

        Waits a second at most, and only where somebody is silent.
        """
        asked = {self._numbers_of[rank]: rank for rank in ranks}
        absent = self._absent(set(asked))
        return {asked[number]: absent[number] for number in sorted(absent, key=asked.__getitem__)}

    def _absent(self, asked: set[int]) -> dict[int, str]:
        """The same by number of the post."""
        asked = asked - {self._post.rank}
        serial = next(self._serials)
        with self._changed:
            heard = self._heard[serial] = set()
        until_s = self._clock() + self._answer_s
        while self._clock() < until_s and (left := self._silent(asked, heard)):
            # Again and again: of a process that is about to end the first one does not come back.
            self._post.send(Letter(_CALL, serial, self._post.rank), left)
            with self._changed:
                self._changed.wait_for(lambda: not self._silent(asked, heard), _LOOK_S)
        with self._changed:
            del self._heard[serial]
        found: dict[int, str] = {}
        for number in sorted(asked - heard):
            why = self._post.lost(number)
            found[number] = "does not answer" if why is None else f"is gone ({why})"
        return found

    def _silent(self, asked: Iterable[int], heard: set[int]) -> list[int]:
        return [n for n in asked if n not in heard and self._post.lost(n) is None]

    def _answer(self, letter: Letter, _: Tensor) -> None:
        self._post.send(Letter(_HERE, letter.serial, self._post.rank), [letter.author])

    def _hear(self, letter: Letter, _: Tensor) -> None:
        with self._changed:
            if letter.serial in self._heard:
                self._heard[letter.serial].add(letter.author)
                self._changed.notify_all()


_NUMBERS = itertools.count()
_OPEN: weakref.WeakValueDictionary[int, RollCall] = weakref.WeakValueDictionary()
"""Of all optimizers of this process, the oldest first: what ranks of a mesh do together belongs to
the process, and any of them can ask for it."""


def call(ranks: Sequence[int]) -> dict[int, str] | None:
    """Those of ``ranks``, of the default group, that are not there; None if nobody can ask. Waits.

    Any thread.
    """
    for roll_call in reversed(list(_OPEN.values())):
        if roll_call.reaches(ranks):
            return roll_call.missing(ranks)
    return None
