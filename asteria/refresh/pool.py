"""Worker threads that take the most urgent job first."""

from __future__ import annotations

import atexit
import heapq
import itertools
import os
import threading
import time
import weakref
from typing import Any, Protocol

from asteria.errors import RefreshError
from asteria.refresh.job import Job
from asteria.refresh.threads import (
    limit_math_threads,
    lower_priority,
    pause_ended_threads,
)

__all__ = ["Executor", "WorkerPool", "jobs_and_threads"]

_ATTEMPTS = 2
"""Workers that may die of a job before the job is given up."""
_CLOSE_S = 0.5
"""How long closing waits for a job that is being done; a factorization cannot be interrupted."""
_LOOK_S = 0.2
"""How often a waiting thread looks whether the workers are alive."""
_MOST_THREADS = 4
"""Math threads of one job; LAPACK gains little from more."""


def jobs_and_threads(workers: int) -> tuple[int, int]:
    """(jobs at a time, math threads of each) of so many ``workers``, math threads in all."""
    threads = min(workers, _MOST_THREADS)
    return max(1, workers // threads), threads


class Executor(Protocol):
    """Does jobs, on threads of its own or when told to. For the training thread."""

    @property
    def size(self) -> int:
        """Jobs that are done at a time."""

    @property
    def deaths(self) -> int:
        """Worker threads that ended in the middle of a job."""

    def submit(self, job: Job[Any]) -> None:
        """Take a job; never blocks."""

    def wait(self, job: Job[Any]) -> None:
        """Return once ``job`` is done; it comes before all others from now on."""

    def discard(self, job: Job[Any]) -> None:
        """Nobody wants the outcome any more; drop the job if nobody has begun it."""

    def close(self) -> None:
        """Stop the threads; what nobody has begun is kept, and done if somebody waits for it."""


class _Queue:
    """What workers and their pool share. A worker knows nothing else, so that it keeps no
    optimizer alive.
    """

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.changed = threading.Condition()
        self.heap: list[tuple[tuple[float, ...], int, Job[Any]]] = []
        self.running: set[Job[Any]] = set()
        self.threads: list[threading.Thread] = []
        self.lingering: list[threading.Thread] = []
        """Those that were still in a job when they were stopped."""
        self.generation = 0
        """Workers of an earlier one end as soon as they can."""
        self.deaths = 0
        self.numbers = itertools.count()
        self._order = itertools.count()

    def put(self, job: Job[Any]) -> None:
        """Add a job behind those of the same urgency; with ``changed`` held."""
        heapq.heappush(self.heap, (job.urgency, next(self._order), job))
        self.changed.notify()

    def take(self, generation: int) -> Job[Any] | None:
        """The most urgent job; None tells the worker to end."""
        with self.changed:
            while generation == self.generation and not self.heap:
                self.changed.wait()
            if generation != self.generation:
                return None
            job = self.heap[0][-1]
            self.running.add(job)  # first: at every moment of a fork it is in one of the two
            heapq.heappop(self.heap)
            return job

    def adopt(self, job: Job[Any]) -> None:
        """Put a job back that an interrupt has kept out of all lists."""
        with self.changed:
            if not (job.done or job in self.running or any(e[-1] is job for e in self.heap)):
                self.put(job)

    def finished(self, job: Job[Any]) -> None:
        with self.changed:
            self.running.discard(job)
            self.changed.notify_all()

    def stop(self, wait_s: float) -> None:
        """End all workers; those in the middle of a job get ``wait_s`` to finish it."""
        if self.pid != os.getpid():
            return  # the threads are the parent's
        with self.changed:
            self.generation += 1
            self.changed.notify_all()
            threads, self.threads = self.threads, []
        until = time.monotonic() + wait_s
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))
        self.lingering = [t for t in (*self.lingering, *threads) if t.is_alive()]


_QUEUES: weakref.WeakSet[_Queue] = weakref.WeakSet()
"""All that there are, for the end of the process only."""


@atexit.register
def _leave() -> None:
    """End all workers; a factorization that goes on must not spoil the end of the process."""
    until = time.monotonic() + _CLOSE_S
    for queue in list(_QUEUES):
        queue.stop(max(0.0, until - time.monotonic()))
        if queue.pid == os.getpid() and queue.lingering:
            pause_ended_threads()


def _work(queue: _Queue, generation: int, math_threads: int) -> None:
    """Body of a worker thread."""
    limit_math_threads(math_threads)
    lower_priority()
    while (job := queue.take(generation)) is not None:
        try:
            job.run()
        except BaseException as error:
            # Not an error of the work but the end of this thread; another one tries again.
            with queue.changed:
                queue.deaths += 1
                if job.attempts < _ATTEMPTS:
                    queue.put(job)
                else:
                    lost = RefreshError(
                        f"{job.name}: {job.attempts} worker threads died of this refresh, the last "
                        f"one of {type(error).__name__}: {error}"
                    )
                    lost.__cause__ = error
                    job.fail(lost)
            return
        finally:
            queue.finished(job)
            del job  # while this thread waits for the next one, it must not keep tensors alive


class WorkerPool:
    """Daemon threads that do jobs in the order of their urgency.

    Threads are started by the first job and end with `close`, with the pool's last reference, or
    with the interpreter, which waits at most half a second for a job that is being done. Each job
    runs with up to four math threads; a worker changes no other thread's settings. A forked child
    starts workers of its own if it submits or waits.
    """

    def __init__(self, workers: int) -> None:
        """``workers`` counts math threads in all."""
        self._size, self._math_threads = jobs_and_threads(workers)
        self._queue = _Queue()
        _QUEUES.add(self._queue)
        self._finalizer = weakref.finalize(self, self._queue.stop, _CLOSE_S)
        self._finalizer.atexit = False  # `_leave` does it for all pools in one half second

    @property
    def size(self) -> int:
        """Jobs that are done at a time."""
        return self._size

    @property
    def deaths(self) -> int:
        """Worker threads that ended in the middle of a job."""
        return self._queue.deaths

    def submit(self, job: Job[Any]) -> None:
        """Take a job; never blocks. Starts the threads that are missing."""
        queue = self._here()
        with queue.changed:
            queue.put(job)
        self._start_missing()

    def wait(self, job: Job[Any]) -> None:
        """Return once ``job`` is done; it comes before all others from now on."""
        queue = self._here()
        if not job.done:
            with queue.changed:
                for place, (_, order, other) in enumerate(queue.heap):
                    if other is job:
                        job.urgency = ()  # before every other tuple
                        queue.heap[place] = (job.urgency, order, job)
                        heapq.heapify(queue.heap)
                        break
        self._start_missing()
        while not job.wait(_LOOK_S):
            queue.adopt(job)
            self._start_missing()

    def discard(self, job: Job[Any]) -> None:
        """Drop the job if nobody has begun it."""
        queue = self._here()
        with queue.changed:
            queue.heap = [entry for entry in queue.heap if entry[-1] is not job]
            heapq.heapify(queue.heap)

    def close(self) -> None:
        """Stop the threads, within half a second; a later job starts new ones."""
        self._here().stop(_CLOSE_S)

    def _start_missing(self) -> None:
        queue = self._queue
        with queue.changed:
            queue.threads = [thread for thread in queue.threads if thread.is_alive()]
            missing = min(self._size - len(queue.threads), len(queue.heap))
            for _ in range(missing):
                thread = threading.Thread(
                    target=_work,
                    args=(queue, queue.generation, self._math_threads),
                    name=f"refresh worker {next(queue.numbers)}",
                    daemon=True,
                )
                queue.threads.append(thread)
                thread.start()

    def _here(self) -> _Queue:
        """The queue, made usable if this is the child of a fork, which has no worker threads."""
        queue = self._queue
        if queue.pid != os.getpid():
            pending = dict.fromkeys([entry[-1] for entry in queue.heap] + list(queue.running))
            queue.pid, queue.changed = os.getpid(), threading.Condition()
            queue.heap, queue.running = [], set()
            queue.threads, queue.lingering = [], []
            with queue.changed:
                for job in pending:
                    if not job.done:
                        job.renew_lock()
                        queue.put(job)
        return queue
