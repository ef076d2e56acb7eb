"""Faults of refreshes, done from outside to the worker that computes one.

`Injector.installed` replaces five functions that a refresh goes through. The replacements ask which
job the calling thread does and whether that job is to suffer, else they do what they stand for, so
refreshes inside the step are left alone. `FaultyPool` draws the faults when jobs are submitted.
"""

from __future__ import annotations

import contextlib
import functools
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from asteria.linalg import eigenbasis, ldlr
from asteria.refresh.job import Job
from asteria.refresh.pool import Executor
from asteria.runtime import host_refresh

# What can happen to a job.
NONFINITE_FACTOR = "inf or nan in the factor"
LAPACK_FLOAT32 = "LAPACK fails in float32"
LAPACK_ALWAYS = "LAPACK fails in float64 too"
BAD_RESULT = "result not orthogonal"
RAISES = "worker raises"
DIES = "worker dies"
DIES_TWICE = "two workers die of a refresh"
SLOW = "slow worker"
INTERRUPT = "Ctrl-C while step() waits"

LATEST_S = 0.008
"""A slow worker is late by at most so much, which is longer than a step."""
INTERRUPT_AFTER_S = 0.002


class WorkerFault(Exception):
    """What nobody expects of a worker."""


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to a job, drawn when it is submitted."""

    kind: str
    mode: int
    """At the first or at the second factor of its unit."""
    size: float
    """0 to 1: how slow, or which of two variants."""


class Injector:
    """Draws faults of jobs, does them, and remembers which job suffered what.

    Drawing is for the training thread, and depends on the order of submissions only.
    """

    def __init__(self, rates: Mapping[str, float], seed: int) -> None:
        """``rates``: for each kind the share of jobs that it happens to."""
        self._rates = rates
        self._random = random.Random(seed)
        self._of_thread = threading.local()
        self.suffered: dict[Job[Any], Counter[str]] = {}
        """By kind; blocks of a stack count one by one, as optimizer.stats() counts them."""

    def draw(self) -> Fault | None:
        """The fault of the next job, mostly none."""
        point = self._random.random()
        mode, size = self._random.randrange(2), self._random.random()
        for kind, rate in self._rates.items():
            if point < rate:
                return Fault(kind, mode, size)
            point -= rate
        return None

    def happened(self, job: Job[Any], kind: str, count: int = 1) -> None:
        """Remember it."""
        self.suffered.setdefault(job, Counter())[kind] += count

    def total(self) -> Counter[str]:
        """What all jobs have suffered."""
        return sum(self.suffered.values(), Counter())

    def faulty(self, job: Job[Any], fault: Fault) -> Callable[[], None]:
        """Stands for ``job.run``."""
        return functools.partial(self._run, job, fault, job.run)

    def _run(self, job: Job[Any], fault: Fault, run: Callable[[], None]) -> None:
        here = self._of_thread
        here.job, here.fault, here.modes = job, fault, 0
        try:
            run()
        finally:
            here.fault = None

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Within it, workers suffer what was drawn."""
        with contextlib.ExitStack() as stack:
            for owner, name, stand_in in (
                (host_refresh, "verified_refresh", self._verified_refresh),
                (eigenbasis, "_orthonormalized", self._orthonormalized),
                (ldlr, "orthonormalized", self._orthonormalized),
                (torch.linalg, "eigh", self._eigh),
            ):
                bound = functools.partial(stand_in, getattr(owner, name))
                stack.enter_context(mock.patch.object(owner, name, bound))
            yield

    def _verified_refresh(
        self, real: Callable[..., Any], factor: Tensor, basis: Tensor, **options: Any
    ) -> Any:
        """One factor of a job: where everything but numerics goes wrong."""
        here = self._of_thread
        fault: Fault | None = getattr(here, "fault", None)
        if fault is None:
            return real(factor, basis, **options)
        here.modes += 1
        if here.modes - 1 != fault.mode:
            return real(factor, basis, **options)
        if fault.kind == DIES and here.job.attempts > 1:
            return real(factor, basis, **options)
        in_blocks = fault.kind in (LAPACK_FLOAT32, LAPACK_ALWAYS, BAD_RESULT)
        self.happened(here.job, fault.kind, len(factor) if in_blocks else 1)
        if fault.kind == RAISES:
            raise WorkerFault("injected: a worker raises what nobody expects")
        if fault.kind in (DIES, DIES_TWICE):
            raise SystemExit("injected: the worker ends in the middle of a job")
        if fault.kind == SLOW:
            time.sleep(LATEST_S * fault.size)
        if fault.kind == NONFINITE_FACTOR:
            factor = factor.clone()
            factor[0, 0, -1] = float("inf" if fault.size < 0.5 else "nan")
        here.numerics = fault
        try:
            return real(factor, basis, **options)
        finally:
            here.numerics = None

    def _numerics(self) -> Fault | None:
        return getattr(self._of_thread, "numerics", None)

    def _orthonormalized(self, real: Callable[..., Tensor], *given: Tensor) -> Tensor:
        """The factorization of a refresh: raises, or returns what is no basis."""
        fault = self._numerics()
        if fault is None:
            return real(*given)
        single = given[0].dtype == torch.float32
        if fault.kind == LAPACK_ALWAYS or (fault.kind == LAPACK_FLOAT32 and single):
            raise torch.linalg.LinAlgError("injected: a factorization failed")
        basis = real(*given)
        if fault.kind == BAD_RESULT and single:
            # A basis that is finite but misses a direction, or one with nan.
            basis[..., 0] = 0.0 if fault.size < 0.5 else float("nan")
        return basis

    def _eigh(self, real: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """The last resort of a refresh, in float64."""
        fault = self._numerics()
        if fault is not None and fault.kind == LAPACK_ALWAYS:
            raise torch.linalg.LinAlgError("injected: eigh did not converge")
        return real(*arguments, **options)


class FaultyPool:
    """An `Executor` in front of another one: some of the jobs suffer a fault.

    An interrupt comes as it comes from a keyboard: the job is withheld until the training thread
    waits for it, a signal ends the wait, and only then the job goes to the workers.
    """

    def __init__(self, pool: Executor, injector: Injector) -> None:
        self._pool = pool
        self._injector = injector
        self._withheld: list[Job[Any]] = []
        self.discarded: set[Job[Any]] = set()
        """Jobs that nobody wanted any more, and whose faults nobody counts."""
        self.interrupts = 0

    @property
    def size(self) -> int:
        """See `Executor`."""
        return self._pool.size

    @property
    def deaths(self) -> int:
        """See `Executor`."""
        return self._pool.deaths

    def submit(self, job: Job[Any]) -> None:
        """See `Executor`; here the job's fault is drawn."""
        fault = self._injector.draw()
        if fault is not None and fault.kind == INTERRUPT:
            self._withheld.append(job)
            return
        if fault is not None:
            job.run = self._injector.faulty(job, fault)  # type: ignore[method-assign]
        self._pool.submit(job)

    def wait(self, job: Job[Any]) -> None:
        """See `Executor`."""
        if job in self._withheld:
            try:
                main = threading.main_thread().ident
                press = functools.partial(signal.pthread_kill, main, signal.SIGINT)
                threading.Timer(INTERRUPT_AFTER_S, press).start()
                self._pool.wait(job)  # nobody does the job: only the signal ends this wait
            finally:
                self._withheld.remove(job)
                self._pool.submit(job)
                self._injector.happened(job, INTERRUPT)
                self.interrupts += 1
        self._pool.wait(job)

    def release(self) -> None:
        """Give the workers all that was withheld, without an interrupt."""
        withheld, self._withheld = self._withheld, []
        for job in withheld:
            self._pool.submit(job)

    def discard(self, job: Job[Any]) -> None:
        """See `Executor`."""
        if job in self._withheld:
            self._withheld.remove(job)
        self.discarded.add(job)
        self._pool.discard(job)

    def close(self) -> None:
        """See `Executor`."""
        self._pool.close()
