"""DistributedDataParallel and torch.distributed.checkpoint where ranks share factors."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.nn.parallel import DistributedDataParallel

from asteria import SOAP
from tests.support.processes import gather
from tests.support.training import Bits, assert_same_bits, weights

pytestmark = pytest.mark.slow

SAVED, STEPS, SAMPLES = 21, 30, 8
"""Steps before the checkpoint and in all; samples of a global batch."""


class Network(nn.Module):
    """Two layers without a bias: all of it has factors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(8, 8, bias=False)
        self.second = nn.Linear(8, 4, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(b, 8) -> (b, 4)."""
        y: torch.Tensor = self.second(torch.tanh(self.first(x)))
        return y


class Run:
    """A model in DistributedDataParallel, whose ranks have their parts of every batch."""

    def __init__(self) -> None:
        self.model = DistributedDataParallel(Network())
        options = {"lr": 2.0**-6, "shampoo_beta": 0.5, "precondition_frequency": 3}
        self.optimizer = SOAP(self.model.parameters(), **options)

    def train(self, first: int, last: int) -> None:
        rank, size = dist.get_rank(), dist.get_world_size()
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            batch = torch.randn(SAMPLES, 8, generator=generator)
            mine = batch[rank * SAMPLES // size : (rank + 1) * SAMPLES // size]
            self.optimizer.zero_grad()
            self.model(mine).square().mean().backward()
            self.optimizer.step()

    def weights(self) -> Bits:
        return weights(self.model.parameters())


def save(rank: int, folder: Path) -> Bits:
    """Train, save through torch.distributed.checkpoint, go on."""
    run = Run()
    run.train(0, SAVED)
    model, optimizer = get_state_dict(run.model, run.optimizer)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
    run.train(SAVED, STEPS)
    return run.weights()


def load(rank: int, folder: Path) -> tuple[Bits, int]:
    """Load into a new run of any number of ranks, and go on; and the factor bytes of this rank."""
    run = Run()
    model, optimizer = get_state_dict(run.model, run.optimizer)
    state = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
    )
    run.train(SAVED, STEPS)
    return run.weights(), run.optimizer.stats().factor_bytes


def test_ddp_saves_and_resumes_with_any_number_of_ranks(tmp_path: Path) -> None:
    """The same bits with as many ranks; else the gradient is summed up in another order."""
    folder = tmp_path / "checkpoint"
    first, second = gather(2, tmp_path / "saving", save, folder)
    assert_same_bits(second, first)
    for size in (1, 2, 4):
        found = gather(size, tmp_path / f"loading {size}", load, folder)
        for bits, _ in found:
            assert_same_bits(bits, found[0][0])
        if size == 2:
            assert_same_bits(found[0][0], first)
        for key, wanted in first.items():
            torch.testing.assert_close(found[0][0][key], wanted, rtol=1e-4, atol=1e-5)
        whole = sum(nbytes for _, nbytes in found)
        assert whole == 4 * (3 * 8**2 + 4**2)


def recipe(rank: int, path: Path) -> dict[str, Any]:
    """What most programs do: rank 0 saves, all load, a copy is kept in memory."""
    run = Run()
    run.train(0, SAVED)
    if rank == 0:
        torch.save(run.optimizer.state_dict(), path)
    kept = copy.deepcopy(run.model.state_dict())
    dist.barrier()
    run.train(SAVED, STEPS)
    wanted = run.weights()
    run.model.load_state_dict(kept)
    run.optimizer.load_state_dict(torch.load(path, weights_only=True))
    run.train(SAVED, STEPS)
    return {"wanted": wanted, "found": run.weights(), "network": run.optimizer.stats().network}


def test_rank_0_saves_and_all_load(tmp_path: Path) -> None:
    for found in gather(2, tmp_path / "store", recipe, tmp_path / "optimizer.pt"):
        assert_same_bits(found["found"], found["wanted"])
        assert found["network"].ranks == 2
        assert found["network"].owned_units == 1
