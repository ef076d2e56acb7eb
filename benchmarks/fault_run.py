"""One run of the fault table, in a process of its own so that its end is tested too.

    python -m benchmarks.fault_run '{"row": "slow worker", "optimizer": "soap", "steps": 200}' FILE

Prints the number of steps done now and then, last of all ``end``, and leaves with refreshes in
flight and the optimizer open.
"""

from __future__ import annotations

import io
import json
import math
import random
import signal
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import asteria
from asteria.config.runtime import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.refresh.pool import WorkerPool
from asteria.refresh.threads import free_cores
from asteria.runtime.engine import Engine
from benchmarks.fault_injection import DIES, DIES_TWICE, FaultyPool, Injector, WorkerFault
from benchmarks.fault_rows import (
    CLOSE,
    FORK,
    GRADIENT,
    LOOP_RAISES,
    RELOAD,
    ROWS,
    counted,
    differences,
)
from benchmarks.measurement import write_json
from examples import train_gpt as example

PERIOD = 10
POINTS = 20  # of the validation curve
GLANCE = 64  # windows behind a point of it
FORKED_BATCHES = 5  # that a forked DataLoader delivers
REPORT_EVERY = 10  # steps
WORKERS = "refresh worker"  # how the names of their threads begin


class LoopFault(Exception):
    """What somebody's training loop raises between backward() and step()."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A byte-level GPT that is as small as shows learning; the data are the example's."""

    context: int = 32
    width: int = 32
    layers: int = 2
    heads: int = 2
    batch: int = 8


TINY = Task(context=8, width=16, layers=1, batch=4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What one run depends on."""

    row: str
    optimizer: str
    steps: int
    seed: int = 0
    """Of the first weights, the batches and the faults."""
    quick: bool = False

    @property
    def task(self) -> Task:
        """The model that is trained."""
        return TINY if self.quick else Task()


class _Batches(torch.utils.data.Dataset[tuple[Tensor, Tensor]]):
    """The batches of some steps, made in the DataLoader's process."""

    def __init__(self, data: Tensor, starts: Tensor, context: int) -> None:
        self._data, self._starts, self._context = data, starts, context

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return example.windows(self._data, self._starts[index], self._context)


class Training:
    """Trains as ``plan`` says and keeps account of every fault."""

    def __init__(self, plan: Plan, corpus: tuple[Tensor, Tensor]) -> None:
        task = plan.task
        self.plan, self.row, self.corpus, self.task = plan, ROWS[plan.row], corpus, task
        torch.manual_seed(plan.seed)
        self.model = example.GPT(task.context, task.width, task.layers, task.heads)
        self.starts = example.batch_starts(
            corpus[0], plan.steps, task.batch, task.context, plan.seed
        )
        self.random = random.Random(plan.seed)
        self.schedule = {
            kind: set(self.random.sample(range(1, plan.steps), max(1, round(rate * plan.steps))))
            for kind, rate in self.row.loop.items()
        }
        self.injector = Injector(self.row.jobs, plan.seed)
        self.calls = 0
        self.injected: Counter[str] = Counter()
        """Faults of the loop."""
        self.dropped: Counter[str] = Counter()
        self.caught: Counter[str] = Counter()
        self.counted: Counter[str] = Counter()
        """By the optimizers that have been replaced or closed."""
        self.losses: list[float] = []
        self.curve: list[tuple[int, float]] = []
        self.problems: list[str] = []
        self.forked: Iterator[tuple[Tensor, Tensor]] = iter(())
        self.in_flight: list[int] = []
        """Refreshes in flight at each reload."""
        self.strangers = set(threading.enumerate())
        """Threads of other runs in the same process."""
        self.optimizer, self.pool = self._new_optimizer()

    def _new_optimizer(self) -> tuple[SecondOrderOptimizer, FaultyPool]:
        nonfinite: Any = "skip" if GRADIENT in self.row.loop else RuntimeConfig().nonfinite
        runtime = RuntimeConfig(nonfinite=nonfinite)
        optimizer: Any = example.make_optimizer(
            self.plan.optimizer,
            self.model,
            lr=example.OPTIMIZERS[self.plan.optimizer][2],
            runtime=runtime,
            precondition_frequency=PERIOD,
        )
        pool = FaultyPool(WorkerPool(free_cores(torch.get_num_threads())), self.injector)
        optimizer._engine = Engine(runtime, executor=pool)
        return optimizer, pool

    def run(self, on_steps: Callable[[int], None]) -> dict[str, Any]:
        """Train to the end; returns the record of the run."""
        every = max(1, self.plan.steps // POINTS)
        with self.injector.installed(), warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for step in range(self.plan.steps):
                self._disturb(step)
                self._train(step)
                if (step + 1) % every == 0:
                    self.curve.append((step + 1, self._validation_loss(GLANCE)))
                if (step + 1) % REPORT_EVERY == 0:
                    on_steps(REPORT_EVERY)
            waits = self.optimizer.stats().waits
            self._account(self.optimizer, self.pool)
        record = self._record([str(warning.message) for warning in seen])
        return {**record, "waits": waits, "problems": [*self.problems, *differences(record)]}

    def _record(self, seen: list[str]) -> dict[str, Any]:
        weights = all(bool(p.isfinite().all()) for p in self.model.parameters())
        final = self._validation_loss(example.WINDOWS)
        steps = self.counted.pop("steps")
        return {
            "injected": dict(self.injected + self.injector.total()),
            "dropped": dict(self.dropped),
            "counted": dict(+self.counted),
            "caught": dict(self.caught),
            "calls": self.calls,
            "steps": steps,
            "in_flight": self.in_flight,
            "warnings": sorted(set(seen)),
            "weights_finite": weights and all(map(math.isfinite, self.losses)),
            "final": final if math.isfinite(final) else None,
            "loss": [loss if math.isfinite(loss) else None for loss in self.losses],
            "validation": [[at, loss] for at, loss in self.curve if math.isfinite(loss)],
        }

    def _validation_loss(self, count: int) -> float:
        return example.evaluate(self.model, self.corpus[1], self.task.context, count)

    def _happens(self, kind: str, step: int) -> bool:
        if step in self.schedule.get(kind, ()):
            self.injected[kind] += 1
            return True
        return False

    def _disturb(self, step: int) -> None:
        """What happens between two steps."""
        if self._happens(CLOSE, step):
            self.optimizer.close()
            ours = set(threading.enumerate()) - self.strangers
            workers = [thread for thread in ours if thread.name.startswith(WORKERS)]
            for thread in workers:
                thread.join(5.0)
            if any(thread.is_alive() for thread in workers):
                self.problems.append(f"step {step}: a worker thread outlived close()")
        if self._happens(RELOAD, step):
            self._reload()
        if self._happens(FORK, step):
            starts = self.starts[step : step + FORKED_BATCHES]
            dataset = _Batches(self.corpus[0], starts, self.task.context)
            self.forked = iter(
                torch.utils.data.DataLoader(
                    dataset, batch_size=None, num_workers=1, multiprocessing_context="fork"
                )
            )

    def _train(self, step: int) -> None:
        inputs, targets = example.windows(self.corpus[0], self.starts[step], self.task.context)
        if (batch := next(self.forked, None)) is not None:
            if not (torch.equal(batch[0], inputs) and torch.equal(batch[1], targets)):
                self.problems.append(f"step {step}: the forked DataLoader gave another batch")
            inputs, targets = batch
        loss = self.model(inputs, targets)
        loss.backward()
        self.losses.append(loss.item())
        factor = example.warmup_cosine(step, self.plan.steps, max(1, self.plan.steps // 5))
        for group in self.optimizer.param_groups:
            group["lr"] = example.OPTIMIZERS[self.plan.optimizer][2] * factor
        try:
            if self._happens(LOOP_RAISES, step):
                raise LoopFault
            if self._happens(GRADIENT, step):
                self._poison()
            while not self._took_step():
                pass
        except LoopFault as error:
            self.caught[type(error).__name__] += 1
        self.optimizer.zero_grad()

    def _took_step(self) -> bool:
        """Whether step() came through; where a worker's error came out, nothing has changed."""
        self.calls += 1
        try:
            self._unchanged_if_raised(self.optimizer.step)
        except (WorkerFault, asteria.RefreshError) as error:
            self.caught[type(error).__name__] += 1
            return False
        return True

    def _poison(self) -> None:
        """Spoil one element of one gradient."""
        parameter = self.random.choice(list(self.model.parameters()))
        if parameter.grad is not None:
            flat = parameter.grad.view(-1)
            flat[self.random.randrange(len(flat))] = self.random.choice((math.inf, math.nan))

    def _unchanged_if_raised(self, call: Callable[[], Any]) -> Any:
        """``call()``; what it raises must leave weights and state alone. Again after a Ctrl-C."""
        before, interrupts = self._versions(), self.pool.interrupts
        try:
            return call()
        except BaseException as error:
            if self._versions() != before:
                self.problems.append(f"{type(error).__name__} left a change behind")
            # Ctrl-C by a person is not ours to catch.
            if not isinstance(error, KeyboardInterrupt) or self.pool.interrupts == interrupts:
                raise
        self.caught["KeyboardInterrupt"] += 1
        self.calls += call == self.optimizer.step
        return self._unchanged_if_raised(call)

    def _versions(self) -> list[int]:
        """How often each weight and each tensor of the state was written to."""
        parameters = list(self.model.parameters())
        entries = (self.optimizer.state.get(p, {}) for p in parameters)
        # To read what is in flight is to wait for it.
        state = (own[key] for own in entries for key in own if not key.startswith("shadow_"))
        return [tensor._version for tensor in (*parameters, *state)]

    def _reload(self) -> None:
        """Go on with another optimizer, which has nothing but what was saved of this one."""
        old, pool = self.optimizer, self.pool
        file = io.BytesIO()
        torch.save(self._unchanged_if_raised(old.state_dict), file)
        failed = self._account(old, pool)
        file.seek(0)
        self.optimizer, self.pool = self._new_optimizer()
        self.optimizer.load_state_dict(torch.load(file, weights_only=True))
        flights = old.stats().in_flight - failed, self.optimizer.stats().in_flight
        self.in_flight.append(flights[1])
        if flights[0] != flights[1]:
            self.problems.append(f"of {flights[0]} refreshes in flight {flights[1]} were loaded")
        old.close()

    def _account(self, optimizer: SecondOrderOptimizer, pool: FaultyPool) -> int:
        """Add up what an optimizer has counted before it goes, and what it will never count.

        Returns how many of the refreshes in flight have no result.
        """
        pool.release()
        flying = []
        background = optimizer._engine._background
        if background is not None:
            for unit in background.pipeline.units():
                flying += [flight.job for flight in background.pipeline.finished(unit)]
        suffered = self.injector.suffered
        for job in pool.discarded:
            # One that a worker has died of may have been discarded before another one tried again.
            if job.attempts and not {DIES, DIES_TWICE} & suffered.get(job, Counter()).keys():
                job.wait(5.0)
        for job in (*flying, *pool.discarded):
            self.dropped += suffered.get(job, Counter())
        stats = optimizer.stats()
        self.counted += counted(stats) + Counter(steps=stats.steps)
        return sum(not job.succeeded for job in flying)


def train(plan: Plan, on_steps: Callable[[int], None]) -> dict[str, Any]:
    """The record of one run."""
    # Without a terminal, SIGINT may be ignored from the start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        text = Path(example.__file__) if plan.quick else None
        return Training(plan, example.load_corpus(text)).run(on_steps)
    finally:
        signal.signal(signal.SIGINT, before)


def main(argv: list[str]) -> None:
    """The process of one run."""
    torch.set_num_threads(1)
    plan, path = Plan(**json.loads(argv[0])), Path(argv[1])
    write_json(path, train(plan, lambda count: print(count, flush=True)))
    print("end", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
