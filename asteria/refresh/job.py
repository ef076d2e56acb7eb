"""A piece of work for a worker thread, and its outcome."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

__all__ = ["Job"]

T = TypeVar("T")


class Job(Generic[T]):
    """A callable, how urgent it is, and what came of it.

    ``run`` is for one worker; everything else may be called from any thread.
    """

    def __init__(
        self,
        work: Callable[[], T],
        *,
        name: str,
        urgency: tuple[float, ...],
        then: Callable[[T | None, BaseException | None], None] | None = None,
    ) -> None:
        """``then`` gets the outcome or the error, on the worker's thread, before anybody else."""
        self.name = name
        self.urgency = urgency
        """Smaller is more urgent; compared as a tuple."""
        self.attempts = 0
        """Workers that took this job."""
        self.started_ns = self.ended_ns = 0
        """Of `time.perf_counter_ns`, once done."""
        self.worker = ""
        """Name of the thread that did it."""
        self.cpu_s = 0.0
        """CPU seconds of the worker's thread."""
        self._work: Callable[[], T] | None = work
        self._outcome: T | None = None
        self._error: BaseException | None = None
        self._then = then
        self._done = threading.Event()

    @classmethod
    def finished(cls, outcome: T, *, name: str) -> Job[T]:
        """A job that somebody else has done: no worker, and no time."""
        job: Job[T] = cls(lambda: outcome, name=name, urgency=())
        job._outcome, job._work = outcome, None
        job._done.set()
        return job

    @property
    def done(self) -> bool:
        """Whether `outcome` has something to tell."""
        return self._done.is_set()

    @property
    def error(self) -> Exception | None:
        """What `outcome` raises, if it is done and does."""
        return self._error if self.done and isinstance(self._error, Exception) else None

    @property
    def wall_s(self) -> float:
        """Seconds that the work took."""
        return (self.ended_ns - self.started_ns) * 1e-9

    @property
    def succeeded(self) -> bool:
        """Whether it is done and `outcome` does not raise."""
        return self.done and self._error is None

    def run(self) -> None:
        """Do the work; an Exception becomes the outcome, anything worse passes through."""
        work = self._work
        if work is None:
            return
        self.attempts += 1
        self.worker = threading.current_thread().name
        self.started_ns = time.perf_counter_ns()
        cpu = time.thread_time()
        try:
            self._outcome = work()
        except Exception as error:
            self._error = error
        self.cpu_s = time.thread_time() - cpu
        self._finish()

    def complete(self, outcome: T) -> None:
        """Somebody else has done it."""
        self._outcome = outcome
        self._finish()

    def fail(self, error: BaseException) -> None:
        """Give up: ``error`` is the outcome."""
        self._error = error
        self._finish()

    def _finish(self) -> None:
        self.ended_ns = time.perf_counter_ns()
        self._work = None  # with it go the tensors it was made for
        then, self._then = self._then, None
        try:
            if then is not None:
                then(self._outcome, self._error)
        finally:
            self._done.set()

    def outcome(self) -> T:
        """What the work returned; raises what it raised, with the worker's traceback.

        Only for a job that is done.
        """
        if not self.done:
            raise RuntimeError(f"the job {self.name!r} was asked for its outcome before its end")
        if self._error is not None:
            raise self._error
        outcome: Any = self._outcome
        return outcome  # type: ignore[no-any-return]

    def await_by(self, wait: Callable[[Job[T]], None]) -> None:
        """Return once it is done; ``wait`` is how to wait for what workers do."""
        wait(self)

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end, at most so long; whether it came."""
        return self._done.wait(timeout_s)

    def renew_lock(self) -> None:
        """In the child of a fork: forget a lock that a thread of the parent may have held."""
        if not self.done:
            self._done = threading.Event()
