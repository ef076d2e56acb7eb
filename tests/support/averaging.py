"""Training on several processes whose own gradients are averaged by hand, with slow workers."""

import math
import random
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.job import Job
from asteria.refresh.pool import WorkerPool
from asteria.runtime.engine import Engine
from tests.support.asynchronous import build
from tests.support.training import Shape, gradient

SHAPES: list[Shape] = [(12, 12), (5,), (6, 6), (8, 8), (4, 4)]
"""Refreshes of the first one cost more than those of all others: owners have unequal loads.

Squares, whose first factors are regular: no basis is the eigensolver's choice."""


class LatePool(WorkerPool):
    """Workers that begin a job some steps late, as chance has it, or when somebody waits for it."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(1)
        self._chance = chance
        self._held: list[Job[Any]] = []

    def begin_step(self) -> None:
        """Let the workers begin some of what they have not."""
        for job in self._chance.sample(self._held, self._chance.randint(0, len(self._held))):
            self._hand_over(job)

    def _hand_over(self, job: Job[Any]) -> None:
        self._held.remove(job)
        super().submit(job)

    def submit(self, job: Job[Any]) -> None:
        """See `Executor`."""
        self._held.append(job)

    def wait(self, job: Job[Any]) -> None:
        """See `Executor`."""
        if job in self._held:
            self._hand_over(job)
        super().wait(job)

    def discard(self, job: Job[Any]) -> None:
        """See `Executor`."""
        if job in self._held:
            self._held.remove(job)
        super().discard(job)


class LateRun:
    """An optimizer with late workers."""

    def __init__(self, name: str, runtime: RuntimeConfig) -> None:
        self.optimizer: SecondOrderOptimizer = build(name, runtime, SHAPES)
        self.params: list[Tensor] = self.optimizer.param_groups[0]["params"]
        self._pool = LatePool(random.Random(dist.get_rank() if dist.is_initialized() else -1))
        self.optimizer._engine = Engine(runtime, executor=self._pool)

    def step(self, gradients: Iterable[Tensor]) -> None:
        """One step with these gradients."""
        for p, given in zip(self.params, gradients, strict=True):
            p.grad = given.clone()
        self._pool.begin_step()
        self.optimizer.step()

    def digest(self) -> bytes:
        """All weights, bit by bit."""
        return b"".join(p.detach().numpy().tobytes() for p in self.params)


def train(runs: Iterable[LateRun], steps: int, *, ranks: int = 0, whole: bool = False) -> None:
    """So many steps of all runs with the mean of the gradients of all ranks; their workers end.

    Or in one process with that of so many ``ranks``. Gradients of ``whole`` numbers have sums that
    are exact in any order.
    """
    runs = list(runs)
    for step in range(steps):
        if ranks:
            total = torch.stack([_part(step, rank, whole) for rank in range(ranks)]).sum(0)
        else:
            total = _part(step, dist.get_rank(), whole)
            dist.all_reduce(total)
        mean = total / (ranks or dist.get_world_size())
        flat = mean.split([math.prod(shape) for shape in SHAPES])
        for run in runs:
            run.step(part.view(shape) for part, shape in zip(flat, SHAPES, strict=True))
    for run in runs:
        run.optimizer.close()


def _part(step: int, rank: int, whole: bool) -> Tensor:
    """One rank's own gradients, one after the other."""
    part = gradient((sum(map(math.prod, SHAPES)),), torch.float32, step, rank)
    return (8 * part).round() if whole else part
