"""New parameters that one rank has no room for change nothing on any."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import asteria
from asteria import RuntimeConfig, StoreFullError
from asteria.errors import CoherenceError
from asteria.runtime.consent import unanimously
from tests.support.processes import gather


@pytest.mark.parametrize("failing", [None, 1])
def test_all_learn_of_one_that_fails(failing: int | None) -> None:
    votes: list[bool] = []

    def vote(failed: bool) -> list[int]:
        votes.append(failed)
        return [] if failing is None else [failing]

    if failing is None:
        unanimously(lambda: None, vote, "make room")
    else:
        with pytest.raises(CoherenceError, match="rank 1 could not make room, and says why"):
            unanimously(lambda: None, vote, "make room")
    assert votes == [False]


def test_one_that_fails_tells_the_others() -> None:
    votes: list[bool] = []

    def vote(failed: bool) -> list[int]:
        votes.append(failed)
        raise CoherenceError("a rank is gone")

    def full() -> None:
        raise StoreFullError("no room")

    with pytest.raises(StoreFullError, match="no room"):
        unanimously(full, vote, "make room")
    assert votes == [True]


class Layers(nn.Module):
    """Small parameters, and large ones that come late."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        shapes = [(8, 6), (6, 4), (12, 5), (64, 64), (64, 60), (60, 60), (60, 64)]
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(s)) for s in shapes])


STEPS, LATE = 8, 4


def trained(rank: int, *, attempt: bool) -> tuple[str, list[Tensor]]:
    """What the attempt has raised, and the small parameters; with room for these only."""
    model = Layers()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    runtime = RuntimeConfig(device_budget=45_000, host_budget=0, workers=1)
    optimizer = asteria.SOAP(model.parameters(), precondition_frequency=3, runtime=runtime)
    params, told = list(model.parameters()), ""
    for step in range(STEPS):
        late = attempt and step == LATE
        torch.manual_seed(step)
        for p in params[: None if late else 3]:
            p.grad = torch.distributed.tensor.distribute_tensor(
                torch.randn(p.shape), p.device_mesh, p.placements
            )
        if late:
            try:
                optimizer.step()
            except (StoreFullError, CoherenceError) as error:
                told = f"{type(error).__name__}: {error}"
            for p in params[3:]:
                p.grad = None
        optimizer.step()
    optimizer.close()
    return told, [p.full_tensor().detach() for p in params[:3]]


def both(rank: int) -> dict[bool, tuple[str, list[Tensor]]]:
    return {attempt: trained(rank, attempt=attempt) for attempt in (False, True)}


@pytest.mark.slow
def test_shards_go_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    found = gather(2, tmp_path / "store", both)
    for mine in found:
        assert "StoreFullError" in mine[True][0] or "could not make room" in mine[True][0]
        for value, wanted in zip(mine[True][1], mine[False][1], strict=True):
            assert torch.equal(value, wanted)
