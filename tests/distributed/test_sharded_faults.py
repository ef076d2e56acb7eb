"""A rank that is gone or stuck becomes an error on the others, within the group's timeout."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from asteria.errors import CoherenceError
from tests.distributed.fans import build
from tests.support.processes import Crew

TIMEOUT_S = 4.0


def leave(rank: int) -> None:
    os._exit(1)


def stop(rank: int) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def until_one_is_lost(rank: int, lose: Callable[[int], None], size: int = 2) -> str:
    """What the other ranks are told."""
    mesh = init_device_mesh("cpu", (size,))
    parameter = nn.Parameter(DTensor.from_local(torch.ones(3, 4), mesh, [Shard(0)]))
    optimizer = build("SOAP", [("weight", parameter)], {})
    for step in range(3):
        gradient = torch.full((3, 4), float(step + 1))
        parameter.grad = DTensor.from_local(gradient, mesh, [Shard(0)])
        if rank == size - 1 and step == 2:
            lose(rank)
        try:
            optimizer.step()
        except CoherenceError as error:
            return f"{error} <- {type(error.__cause__).__name__}"
    return ""


@pytest.mark.parametrize(("lose", "why"), [(leave, "is gone"), (stop, "does not answer")])
def test_the_others_raise_and_name_it(
    lose: Callable[[int], None], why: str, tmp_path: Path
) -> None:
    crew = Crew(2, tmp_path / "store", until_one_is_lost, lose, group_timeout_s=TIMEOUT_S)
    try:
        told = crew.result(0)
    finally:
        crew.close()
    assert told.startswith("a decision on this step's gradients could not be done together")
    assert f"by ranks 0, 1, which share parameters: rank 1 {why}" in told
    assert "restart all of them from a checkpoint" in told
    assert told.endswith(("<- RuntimeError", "<- DistBackendError", "<- DistNetworkError"))


def until_all_are_told(rank: int, store: Path) -> str:
    """The same of three ranks, of which the two that are left live until both know."""
    told = until_one_is_lost(rank, leave, size=3)
    meeting = torch.distributed.FileStore(str(store), 2)
    meeting.set(f"rank {rank}", "told")
    meeting.wait(["rank 0", "rank 1"])
    return told


def test_who_lives_is_not_blamed(tmp_path: Path) -> None:
    crew = Crew(3, tmp_path / "store", until_all_are_told, tmp_path / "meeting")
    try:
        for rank in range(2):
            told = crew.result(rank)
            assert "which share parameters: rank 2 is gone" in told
            assert "rank 0 " not in told
            assert "rank 1 " not in told
    finally:
        crew.close()
