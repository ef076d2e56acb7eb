"""The worker pool: order, waits, deaths, forks and ends. Events only, no sleeps."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from asteria.errors import RefreshError
from asteria.refresh.job import Job
from asteria.refresh.pool import WorkerPool, jobs_and_threads

PATIENCE_S = 60.0
"""For what should come at once; only a failing test takes so long."""


@pytest.fixture
def pool() -> Iterator[WorkerPool]:
    """Of one thread."""
    one = WorkerPool(1)
    yield one
    one.close()


class Gate:
    """A job that occupies a worker until told to end."""

    def __init__(self, pool: WorkerPool) -> None:
        self.entered, self.open = threading.Event(), threading.Event()
        self.job = Job(self._pass, name="gate", urgency=(-1.0,))
        pool.submit(self.job)
        assert self.entered.wait(PATIENCE_S)

    def _pass(self) -> bool:
        self.entered.set()
        return self.open.wait(PATIENCE_S)


def job_of(work: Callable[[], Any], *urgency: float, name: str = "a job") -> Job[Any]:
    return Job(work, name=name, urgency=urgency)


def workers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "asteria-refresh"]


@pytest.mark.parametrize(
    ("count", "size"), [(1, 1), (2, 1), (4, 1), (5, 1), (8, 2), (11, 2), (64, 16)]
)
def test_workers_are_shared_out_in_jobs_of_up_to_four_threads(count: int, size: int) -> None:
    assert WorkerPool(count).size == size


def test_no_thread_is_started_before_the_first_job() -> None:
    before = threading.active_count()
    pool = WorkerPool(8)
    pool.close()
    assert threading.active_count() == before
    job = job_of(lambda: threading.current_thread().daemon)
    pool.submit(job)
    pool.wait(job)
    assert job.outcome() is True
    assert before < threading.active_count() <= before + pool.size
    pool.close()
    assert threading.active_count() == before


def test_the_most_urgent_comes_first_and_equals_in_order(pool: WorkerPool) -> None:
    gate, order = Gate(pool), []
    urgencies = [(5.0, 0.0), (3.0, -0.1), (3.0, -0.9), (7.0,), (3.0, -0.1), (1.0, 9.0)]
    jobs = [
        job_of(lambda i=index: order.append(i), *urgency) for index, urgency in enumerate(urgencies)
    ]
    for job in jobs:
        pool.submit(job)
    gate.open.set()
    for job in jobs:
        assert job.wait(PATIENCE_S)
    assert order == [5, 2, 1, 4, 0, 3]


def test_what_is_waited_for_comes_before_all_others(pool: WorkerPool) -> None:
    gate, order = Gate(pool), []

    class Awaited(Job[Any]):
        def wait(self, timeout_s: float) -> bool:
            gate.open.set()
            return super().wait(timeout_s)

    first, second = (job_of(lambda i=i: order.append(i), float(i)) for i in (1, 2))
    awaited = Awaited(lambda: order.append(3), name="late", urgency=(3.0,))
    for job in (first, second, awaited):
        pool.submit(job)
    pool.wait(awaited)
    assert awaited.done
    assert second.wait(PATIENCE_S)
    assert order == [3, 1, 2]


def test_waiting_for_what_is_done_returns(pool: WorkerPool) -> None:
    pool.wait(Job.finished(1, name="saved"))


def test_what_is_discarded_is_not_begun(pool: WorkerPool) -> None:
    gate = Gate(pool)
    wanted, unwanted = job_of(lambda: 1), job_of(lambda: 2)
    for job in (unwanted, wanted):
        pool.submit(job)
    pool.discard(unwanted)
    pool.discard(gate.job)  # begun: it goes on
    gate.open.set()
    pool.wait(wanted)
    assert (unwanted.attempts, unwanted.done) == (0, False)
    assert gate.job.outcome() is True
    pool.discard(wanted)
    assert wanted.outcome() == 1


def test_an_error_of_the_work_is_its_outcome_and_no_death(pool: WorkerPool) -> None:
    def work() -> None:
        raise KeyError("k")

    job = job_of(work)
    pool.submit(job)
    pool.wait(job)
    with pytest.raises(KeyError):
        job.outcome()
    assert pool.deaths == 0


def dying(times: int) -> Callable[[], str]:
    """Work that ends its thread so many times, and then succeeds."""
    left = [times]

    def work() -> str:
        left[0] -= 1
        if left[0] >= 0:
            raise SystemExit(f"death {times - left[0]}")
        return "done"

    return work


def test_a_worker_that_dies_is_replaced_and_its_job_repeated(pool: WorkerPool) -> None:
    job, after = job_of(dying(1)), job_of(lambda: "after")
    pool.submit(job)
    pool.wait(job)
    assert job.outcome() == "done"
    assert (job.attempts, pool.deaths) == (2, 1)
    pool.submit(after)
    pool.wait(after)
    assert after.outcome() == "after"


def test_a_job_that_kills_two_workers_fails_with_their_reason(pool: WorkerPool) -> None:
    job, after = job_of(dying(2), 0.0, name="refresh of w"), job_of(lambda: "after", 1.0)
    pool.submit(job)
    pool.submit(after)
    pool.wait(job)
    with pytest.raises(RefreshError, match="refresh of w: 2 worker.*SystemExit: death 2") as caught:
        job.outcome()
    assert isinstance(caught.value.__cause__, SystemExit)
    assert pool.deaths == 2
    pool.wait(after)
    assert after.outcome() == "after"


def test_closing_waits_half_a_second_for_what_cannot_be_interrupted(pool: WorkerPool) -> None:
    gate = Gate(pool)
    begin = time.monotonic()
    pool.close()
    assert 0.4 < time.monotonic() - begin < 5
    assert not gate.job.done
    gate.open.set()
    assert gate.job.wait(PATIENCE_S), "it is finished all the same"


def test_closing_idle_threads_takes_no_time_and_a_later_job_starts_others() -> None:
    pool = WorkerPool(8)
    for _ in range(3):
        jobs = [job_of(lambda: 1) for _ in range(4)]
        for job in jobs:
            pool.submit(job)
        for job in jobs:
            pool.wait(job)
        threads = list(pool._queue.threads)
        assert 1 <= len(threads) <= 2
        pool.close()
        assert not any(thread.is_alive() for thread in threads)
    pool.close()


def test_what_is_left_at_closing_is_done_when_somebody_waits(pool: WorkerPool) -> None:
    gate = Gate(pool)
    job = job_of(lambda: "late")
    pool.submit(job)
    threading.Thread(target=gate.open.set).start()
    pool.close()
    pool.wait(job)
    assert job.outcome() == "late"


def test_threads_end_with_the_pool_even_in_the_middle_of_a_job() -> None:
    pool = WorkerPool(1)
    gate = Gate(pool)
    (thread,) = pool._queue.threads
    reference = weakref.ref(pool)
    gate.job.work = None  # the job lives on
    del pool
    gc.collect()
    assert reference() is None
    gate.open.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert gate.job.done


def test_pools_leave_no_thread_and_no_finalizer() -> None:
    before = len(workers())
    finalizers = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    for count in range(2000):
        pool = WorkerPool(1)
        if count % 4 == 0:
            job = job_of(lambda: 1)
            pool.submit(job)
            pool.wait(job)
    del pool
    assert len(workers()) == before
    assert len(weakref.finalize._registry) == finalizers  # type: ignore[attr-defined]


def in_a_child(body: Callable[[], bool]) -> bool:
    """Whether ``body`` is true in the child of a fork, and does not hang."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking with threads
        child = os.fork()
    if child == 0:
        signal.alarm(int(PATIENCE_S))  # it ends if it hangs
        code = 1
        try:
            code = 0 if body() else 1
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")


@needs_fork
def test_the_child_of_a_fork_has_workers_of_its_own(pool: WorkerPool) -> None:
    gate = Gate(pool)
    queued = job_of(lambda: "queued", 1.0)
    pool.submit(queued)

    def body() -> bool:
        new = job_of(lambda: "new", 2.0)
        pool.submit(new)
        gate.open.set()  # the child's; it repeats what the parent was doing
        for job in (new, queued, gate.job):
            pool.wait(job)
        return (new.outcome(), queued.outcome(), gate.job.outcome()) == ("new", "queued", True)

    assert in_a_child(body)
    assert not gate.job.done
    gate.open.set()
    pool.wait(queued)
    assert queued.outcome() == "queued"
    assert queued.attempts == 1


@needs_fork
@pytest.mark.parametrize("way", ["close", "drop", "discard"])
def test_the_end_of_a_child_does_not_touch_the_parents_threads(pool: WorkerPool, way: str) -> None:
    """Nor does a lock matter that one of them held when the child was made."""
    gate = Gate(pool)
    queued = job_of(lambda: "queued")
    pool.submit(queued)
    held, release = threading.Event(), threading.Event()

    def hold() -> None:
        with pool._queue.changed:
            held.set()
            release.wait(PATIENCE_S)

    holder = threading.Thread(target=hold)
    holder.start()
    assert held.wait(PATIENCE_S)

    def body() -> bool:
        begin = time.monotonic()
        if way == "close":
            pool.close()
        elif way == "discard":
            pool.discard(queued)
        else:
            pool._finalizer()
        return time.monotonic() - begin < 5

    unharmed = in_a_child(body)
    release.set()
    holder.join(PATIENCE_S)
    assert unharmed
    gate.open.set()
    pool.wait(queued)
    assert queued.outcome() == "queued"
    assert pool.deaths == 0


LONG_JOB = """
import sys, threading, time, torch
from asteria.refresh.job import Job
from asteria.refresh.pool import WorkerPool, jobs_and_threads
torch.set_num_threads(1)
started = threading.Event()
size = int(sys.argv[1])
matrix = torch.randn(size, size)
def work():
    started.set()
    while True:
        torch.geqrf(matrix)
pool = WorkerPool(1)
job = Job(work, name="long", urgency=())
pool.submit(job)
started.wait()
print(time.time(), flush=True)
"""


@pytest.mark.parametrize("size", [600, 2500])
def test_the_interpreter_ends_in_the_middle_of_a_long_job(size: int) -> None:
    """Within half a second and what the interpreter itself needs, and without a crash.

    The smaller one comes back from LAPACK while the interpreter is being taken down.
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", LONG_JOB, str(size)],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=environment,
        check=False,
    )
    took = time.time() - float(done.stdout)
    assert (done.returncode, done.stderr) == (0, "")
    assert took < 5, "of which half a second is ours; the rest is the machine's"


@pytest.mark.parametrize(
    ("workers", "jobs", "threads"), [(1, 1, 1), (3, 1, 3), (4, 1, 4), (7, 1, 4), (8, 2, 4)]
)
def test_workers_become_jobs_of_up_to_four_threads(workers: int, jobs: int, threads: int) -> None:
    assert jobs_and_threads(workers) == (jobs, threads)
    assert WorkerPool(workers).size == jobs
