"""One rank asks another for tensors that only that one has."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from torch import Tensor

from asteria.distributed.letters import Letter
from asteria.distributed.post import Post
from asteria.errors import CheckpointError
from asteria.refresh.job import Job

__all__ = ["Enquiries", "Serve"]

Serve: TypeAlias = Callable[[Mapping[str, Any]], Sequence[Tensor]]
"""Finds what a note asks for, or raises why it cannot be had. On a thread of its own."""

_ASK, _ANSWER = "ask", "answer"


class _Question:
    def __init__(self) -> None:
        self.answered = threading.Event()
        self.answer: Letter | None = None


class Enquiries:
    """Questions and answers of one optimizer on one rank.

    Whoever is asked answers at any time, whatever its training thread does.
    """

    def __init__(self, post: Post, serve: Serve) -> None:
        self._post = post
        self._serve = serve
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._questions: dict[int, _Question] = {}
        """Guarded by the lock."""
        post.on(_ASK, self._take_question)
        post.on(_ANSWER, self._take_answer)

    def ask(self, rank: int, note: Mapping[str, Any], what: str) -> Sequence[Tensor | None]:
        """What ``rank`` finds for ``note``, in memory of its own; ``what`` says what it is.

        Raises CoherenceError where it does not answer, and CheckpointError with what it says where
        it cannot. For the training thread.
        """
        number, question = next(self._numbers), _Question()
        with self._lock:
            self._questions[number] = question
        try:
            self._post.send(Letter(_ASK, number, self._post.rank, note), [rank])
            waited = f"{what} (all ranks must live until a state is saved, as by dist.barrier())"
            self._post.wait(question.answered.wait, lambda: [rank], waited, "state")
        finally:
            with self._lock:
                del self._questions[number]
        if question.answer is None:
            raise RuntimeError("a question was answered by nothing")
        problem = question.answer.note.get("problem")
        if problem is not None:
            raise CheckpointError(f"{what} was asked of {self._post.name(rank)}: {problem}")
        return question.answer.tensors

    def _take_question(self, letter: Letter, _: Tensor) -> None:
        def answer(found: Sequence[Tensor] | None, error: BaseException | None) -> None:
            note = {} if error is None else {"problem": str(error)}
            reply = Letter(_ANSWER, letter.serial, self._post.rank, note, found or ())
            self._post.send(reply, [letter.author])

        work = functools.partial(self._serve, letter.note)
        job = Job(work, name="answer to another rank", urgency=(), then=answer)
        # The state may be in use; the receiving thread must not wait for it.
        threading.Thread(target=job.run, name=job.name, daemon=True).start()

    def _take_answer(self, letter: Letter, _: Tensor) -> None:
        with self._lock:
            question = self._questions.get(letter.serial)
        if question is not None:
            question.answer = letter
            question.answered.set()
