"""New parameters that one rank has no room for change nothing on any."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import asteria
from asteria import RuntimeConfig, StoreFullError
from asteria.distributed.topology import Topology
from asteria.errors import CoherenceError
from tests.support.asynchronous import GROWN
from tests.support.processes import gather
from tests.support.ranks import Ranks
from tests.support.training import Shape, assert_same_bits

SHAPES: list[Shape] = [(6, 4), (5,), (7, 5)]


def test_replicas_are_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StoreFullError("no room")

    ranks = Ranks("SOAP", Topology.even(3, 3), shapes=SHAPES)
    with monkeypatch.context() as patched:
        patched.setattr(ranks.optimizers[2]._engine._residence, "check", full)
        errors = ranks.train([0])
    assert isinstance(errors[2], StoreFullError)
    for error in errors[:2]:
        assert isinstance(error, CoherenceError)
        assert "rank 2 could not make room for the state of new parameters" in str(error)
    assert not any(optimizer.state for optimizer in ranks.optimizers)
    assert ranks.train(range(GROWN)) == [None] * 3
    bits = ranks.bits()
    for other in bits[1:]:
        assert_same_bits(other, bits[0])


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
