"""A run that is killed at any moment, also while it saves, resumes to the same bits."""

import multiprocessing
import signal
from pathlib import Path

import pytest
import torch

from tests.support.asynchronous import GROWN
from tests.support.killed_run import in_child, resume, run
from tests.support.training import assert_same_bits, everything

NAME = "SOAP"
STEPS = GROWN + 10
MOMENTS = [
    ("step 1", 0),
    ("writing", 3),
    ("written", 1),
    ("synced", 0),
    ("replaced", 1),
    (f"stepped {GROWN - 1}", 0),
    ("writing", 30),
    (f"step {GROWN + 3}", 0),
    ("written", 0),
    ("replaced", 0),
    (f"stepped {STEPS - 1}", 0),
]
"""(report, how many alike to let pass) of each process' end; they follow on one another."""

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def processes() -> "multiprocessing.context.ForkServerContext":
    """Children of a server that has imported everything once and runs no thread."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.killed_run"])
    return context


def test_a_killed_run_resumes(
    tmp_path: Path, processes: "multiprocessing.context.ForkServerContext"
) -> None:
    path = tmp_path / "checkpoint"
    done = []
    for stop, skip in [*MOMENTS, ("never", 0)]:
        mine, theirs = processes.Pipe()
        arguments = (path, NAME, STEPS, stop, skip, theirs)
        child = processes.Process(target=in_child, args=arguments, daemon=True)
        child.start()
        theirs.close()
        assert mine.recv() == ("done" if stop == "never" else stop)
        if stop != "never":
            child.kill()
        child.join()
        assert child.exitcode == (0 if stop == "never" else -signal.SIGKILL)
        if path.exists():
            done.append(torch.load(path, weights_only=True)["steps"])
    assert done == sorted(done), "no checkpoint is lost"
    assert len(set(done)) > 3
    run(tmp_path / "undisturbed", NAME, STEPS, lambda _: None)
    killed, undisturbed = (resume(each, NAME)[0] for each in (path, tmp_path / "undisturbed"))
    assert_same_bits(everything(killed), everything(undisturbed))
    for index, entries in undisturbed.state_dict()["state"].items():
        assert_same_bits(killed.state_dict()["state"][index], entries)
