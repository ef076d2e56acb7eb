"""A training run in a process of its own, which is killed where a test says."""

import os
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch

from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.asynchronous import build
from tests.support.training import set_gradients

SAVE_EVERY = 3
"""Steps."""
Report = Callable[[str], None]


class ReportingFile:
    """A file of which every write is announced before it is done."""

    def __init__(self, file: IO[bytes], report: Report) -> None:
        self._file = file
        self._report = report

    def write(self, content: Any) -> int:
        """Half of it before the report, so that a kill leaves half a write."""
        view = memoryview(content).cast("B")
        half = len(view) // 2
        self._file.write(view[:half])
        self._file.flush()
        self._report("writing")
        self._file.write(view[half:])
        return len(view)

    def flush(self) -> None:
        """See `io.IOBase`."""
        self._file.flush()


def save(state: dict[str, Any], path: Path, report: Report) -> None:
    """The recipe of the README, with a report wherever a kill could matter."""
    with open(f"{path}.tmp", "wb") as file:
        torch.save(state, ReportingFile(file, report))
        file.flush()
        report("written")
        os.fsync(file.fileno())
    report("synced")
    os.replace(f"{path}.tmp", path)
    report("replaced")


def resume(path: Path, name: str) -> tuple[SecondOrderOptimizer, list[torch.nn.Parameter], int]:
    """Optimizer, parameters and steps done, from the last checkpoint or from the beginning."""
    optimizer = build(name)
    params: list[torch.nn.Parameter] = optimizer.param_groups[0]["params"]
    if not path.exists():
        return optimizer, params, 0
    saved = torch.load(path, weights_only=True)
    optimizer.load_state_dict(saved["optimizer"])
    with torch.no_grad():
        for p, value in zip(params, saved["params"], strict=True):
            p.copy_(value)
    return optimizer, params, saved["steps"]


def run(folder: Path, names: Sequence[str], steps: int, report: Report) -> None:
    """Train one of each up to ``steps``, in turns, from the last checkpoints; save on the way."""
    runs = {name: resume(folder / name, name) for name in names}
    for step in range(min(done for _, _, done in runs.values()), steps):
        for name, (optimizer, params, done) in runs.items():
            if step < done:
                continue
            set_gradients(params, step)
            report(f"step {step}")
            optimizer.step()
            report(f"stepped {step}")
            if (step + 1) % SAVE_EVERY == 0 or step + 1 == steps:
                values = [p.detach() for p in params]
                state = {"optimizer": optimizer.state_dict(), "params": values, "steps": step + 1}
                save(state, folder / name, report)
    for optimizer, _, _ in runs.values():
        optimizer.close()


class Moment(NamedTuple):
    """When a process ends: after ``skip`` reports that begin with ``text``."""

    text: str
    skip: int
    waits: bool = True
    """Whether exactly there; else it goes on until the signal arrives."""


def in_child(
    folder: Path, names: Sequence[str], steps: int, moment: Moment | None, link: Connection
) -> None:
    """Run; at the moment tell so, and wait for the end or go on."""
    left = moment.skip if moment else 0

    def report(text: str) -> None:
        nonlocal left
        if moment is not None and text.startswith(moment.text):
            left -= 1
            if left == -1:
                link.send(text)
                if moment.waits:
                    link.recv()  # nobody answers

    run(folder, names, steps, report)
    link.send("done")
