"""A run that is killed at any moment, also while it saves, resumes to the same bits."""

import itertools
import multiprocessing
import random
import signal
from pathlib import Path

import pytest
import torch

from tests.support.arms import OPTIMIZERS
from tests.support.asynchronous import GROWN
from tests.support.killed_run import SAVE_EVERY, Moment, in_child, resume, run
from tests.support.training import assert_same_bits, everything

NAMES = list(OPTIMIZERS)
"""They take turns in one process, for processes take longest to begin."""
STEPS = GROWN + 10
EXACT = [
    Moment("step 1", 0),
    Moment("writing", 3),
    Moment("written", 2),
    Moment("synced", 1),
    Moment("replaced", 2),
    Moment(f"stepped {GROWN - 1}", 1),
    Moment("writing", 60),
]
"""They follow on one another."""
CHANCE = random.Random(0)
RANDOM = [Moment("", CHANCE.randrange(1500), waits=False) for _ in range(6)]
"""After some report or other, wherever the process is when the signal arrives."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes() -> "multiprocessing.context.ForkServerContext":
    """Children of a server that has imported everything once and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.killed_run", "torch._dynamo"])
    return context


def saved_steps(folder: Path) -> list[int]:
    """Of every optimizer's last checkpoint."""
    paths = [folder / name for name in NAMES]
    return [torch.load(p, weights_only=True)["steps"] if p.exists() else 0 for p in paths]


def test_a_killed_run_resumes(
    tmp_path: Path, processes: "multiprocessing.context.ForkServerContext"
) -> None:
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    killed.mkdir()
    undisturbed.mkdir()
    done = [saved_steps(killed)]
    for moment in [*EXACT, *RANDOM, None]:
        mine, theirs = processes.Pipe()
        arguments = (killed, NAMES, STEPS, moment, theirs)
        child = processes.Process(target=in_child, args=arguments, daemon=True)
        child.start()
        theirs.close()
        told = mine.recv()
        if moment is None:
            assert told == "done"
        else:
            assert told.startswith(moment.text) or not moment.waits
            child.kill()
        child.join()
        assert child.exitcode in ((0, -signal.SIGKILL) if told == "done" else (-signal.SIGKILL,))
        done.append(saved_steps(killed))
    for before, after in itertools.pairwise(done):
        assert all(a <= b for a, b in zip(before, after, strict=True)), "no checkpoint is lost"
    assert done[-1] == [STEPS] * len(NAMES)
    assert len({steps for each in done for steps in each}) > STEPS // SAVE_EVERY // 2
    run(undisturbed, NAMES, STEPS, lambda _: None)
    for name in NAMES:
        ours, theirs_ = (resume(folder / name, name)[0] for folder in (killed, undisturbed))
        assert_same_bits(everything(ours), everything(theirs_))
        for index, entries in theirs_.state_dict()["state"].items():
            assert_same_bits(ours.state_dict()["state"][index], entries)
