"""Runs in several processes at once, of one thread each."""

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy import ndarray

from benchmarks.runs import Lab, Record, Run, Task

POLL_S = 0.5


@dataclass(slots=True)
class _Counter:
    """What a lab takes for its bar in a process of its own: counts into shared memory."""

    shared: Any
    n: int = 0
    total: int = 0

    def update(self, steps: int = 1) -> None:
        self.n += steps
        with self.shared.get_lock():
            self.shared.value += steps

    def set_description(self, text: str) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool) -> None: ...


# The lab of a process in the pool, made once by its initializer.
_labs: list[Lab] = []


def _begin(task: Task, corpus: Sequence[ndarray], folder: Path, steps: Any) -> None:
    torch.set_num_threads(1)
    training, validation = map(torch.from_numpy, corpus)
    _labs.append(Lab(task, (training, validation), folder, _Counter(steps)))


def _execute(run: Run) -> Record:
    return _labs[0](run)


def execute_missing(lab: Lab, runs: Sequence[Run], jobs: int) -> None:
    """Execute those of ``runs`` that ``lab`` does not have, ``jobs`` at a time.

    Each process has one thread of torch, so ``lab.task`` must say so. Ends with the first error;
    what was finished until then is stored.
    """
    if lab.task.threads != 1:
        raise ValueError(f"parallel runs have one thread each, the task has {lab.task.threads}")
    missing = [run for run in dict.fromkeys(runs) if not lab.path(run).exists()]
    # Forking a process that has used OpenMP threads hangs.
    context = multiprocessing.get_context("spawn")
    steps = context.Value("q", 0)
    corpus = [part.numpy() for part in lab.corpus]
    start = lab.bar.n
    lab.bar.set_description(f"{len(missing)} runs, {jobs} at a time")
    with ProcessPoolExecutor(jobs, context, _begin, (lab.task, corpus, lab.folder, steps)) as pool:
        futures = {pool.submit(_execute, run): run for run in missing}
        waiting = set(futures)
        try:
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_S)
                lab.bar.update(start + steps.value - lab.bar.n)
                for future in done:
                    lab.records[futures[future]] = future.result()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
