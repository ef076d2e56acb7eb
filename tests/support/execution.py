"""Workers and time that do what a test tells them to, and nothing else."""

import random
from collections.abc import Callable
from typing import Any

import torch

from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.job import Job
from asteria.refresh.pool import Executor
from asteria.runtime.engine import Engine


class FakeClock:
    """Seconds that pass when somebody says so."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now_s += seconds


class ManualExecutor:
    """Does jobs when told to, on the calling thread, the most urgent first.

    A job that is waited for is done at once, before all others; with ``clock`` that takes
    ``job_s`` seconds.
    """

    def __init__(self, clock: FakeClock | None = None, job_s: float = 0.0) -> None:
        self.size = 1
        self.deaths = 0
        self.queue: list[Job[Any]] = []
        """Not begun."""
        self.submitted: list[Job[Any]] = []
        self.done: list[Job[Any]] = []
        """In the order in which they were done."""
        self.waited_for: list[Job[Any]] = []
        """Those that were not done when somebody waited."""
        self.discarded: list[Job[Any]] = []
        self.closed = 0
        self._clock = clock
        self._job_s = job_s

    def submit(self, job: Job[Any]) -> None:
        """See `Executor`."""
        self.submitted.append(job)
        self.queue.append(job)

    def wait(self, job: Job[Any]) -> None:
        """See `Executor`."""
        if not job.done:
            self.waited_for.append(job)
            self._run(job)

    def discard(self, job: Job[Any]) -> None:
        """See `Executor`."""
        self.discarded.append(job)
        if job in self.queue:
            self.queue.remove(job)

    def close(self) -> None:
        """See `Executor`."""
        self.closed += 1

    def run_next(self) -> None:
        """Do the most urgent job; among equals the one submitted first."""
        self._run(min(self.queue, key=lambda job: job.urgency))

    def run_all(self) -> None:
        """Do everything that was submitted."""
        while self.queue:
            self.run_next()

    def run_some(self, chance: random.Random) -> None:
        """Do a random number of jobs, in random order: workers of any speed."""
        for job in chance.sample(self.queue, chance.randint(0, len(self.queue))):
            self._run(job)

    def _run(self, job: Job[Any]) -> None:
        self.queue.remove(job)
        if self._clock is not None:
            self._clock.advance(self._job_s)
        job.run()
        self.done.append(job)


def directed(
    optimizer: SecondOrderOptimizer,
    executor: Executor,
    clock: Callable[[], float] | None = None,
) -> SecondOrderOptimizer:
    """Give a new optimizer another executor, and clock."""
    times = {} if clock is None else {"clock": clock}
    optimizer._engine = Engine(optimizer._runtime, executor=executor, **times)
    return optimizer


def versions(optimizer: torch.optim.Optimizer) -> list[list[int]]:
    """Of every parameter with bases, the versions of its tiles."""
    return [
        [int(version) for version in entries["version"].tolist()]
        for entries in optimizer.state.values()
        if "version" in entries
    ]
