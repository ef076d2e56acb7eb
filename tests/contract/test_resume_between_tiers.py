"""A checkpoint does not tell where the state was: from any tier to any tier, bit for bit."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from asteria import RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from tests.support.arms import OPTIMIZERS, PERIOD, over_optimizers
from tests.support.asynchronous import BETA, GROWN
from tests.support.training import Bits, assert_same_bits, everything, parameters, train

SHAPES = [(6, 4), (5,), (4, 4), (3, 2, 4)]
SAVED = GROWN + 4
STEPS = SAVED + 2 * PERIOD + 3


class Model(nn.Module):
    """Parameters with names, which torch.distributed.checkpoint asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList(parameters(SHAPES))


@pytest.fixture(autouse=True, scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


class Run:
    """A model and its optimizer, all in memory or all on disk."""

    def __init__(self, name: str, place: str, folder: Path) -> None:
        self.model = Model()
        tiers: dict[str, Any] = {}
        if place == "nvme":
            folder.mkdir()
            tiers = {"host_budget": 0, "nvme_path": folder}
        self.optimizer: SecondOrderOptimizer = OPTIMIZERS[name](
            self.model.parameters(),
            precondition_frequency=PERIOD,
            shampoo_beta=BETA,
            runtime=RuntimeConfig(**tiers),
        )

    def bits(self) -> Bits:
        """Everything, with what is in flight."""
        state = self.optimizer.state_dict()["state"]
        flat = {f"{i}.{key}": t.clone() for i, e in state.items() for key, t in e.items()}
        return everything(self.optimizer) | flat


def through_a_file(source: Run, target: Run, folder: Path) -> None:
    file = io.BytesIO()
    torch.save(source.optimizer.state_dict(), file)
    file.seek(0)
    target.optimizer.load_state_dict(torch.load(file, weights_only=True))


def through_dcp(source: Run, target: Run, folder: Path, *, flat: bool) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    saved = get_optimizer_state_dict(source.model, source.optimizer, options=options)
    dcp.save({"optimizer": saved}, checkpoint_id=folder)
    state = {"optimizer": get_optimizer_state_dict(target.model, target.optimizer, options=options)}
    dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(target.model, target.optimizer, state["optimizer"], options=options)


WAYS: dict[str, Callable[[Run, Run, Path], None]] = {
    "torch.save": through_a_file,
    "dcp": lambda *given: through_dcp(*given, flat=False),
    "dcp-flat": lambda *given: through_dcp(*given, flat=True),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("saving", "loading"),
    [("memory", "nvme"), ("nvme", "memory"), ("nvme", "nvme")],
    ids=lambda place: place,
)
@over_optimizers
def test_state_goes_on_elsewhere(
    name: str, saving: str, loading: str, way: str, tmp_path: Path
) -> None:
    source, target = Run(name, saving, tmp_path / "a"), Run(name, loading, tmp_path / "b")
    try:
        train(source.optimizer, range(SAVED))
        assert source.optimizer.stats().in_flight > 0
        before = source.bits()
        WAYS[way](source, target, tmp_path / "checkpoint")
        target.model.load_state_dict(source.model.state_dict())
        assert_same_bits(target.bits(), before)
        for run, place in ((source, saving), (target, loading)):
            assert (run.optimizer.stats().tier_bytes["nvme"] > 0) == (place == "nvme")
            train(run.optimizer, range(SAVED, STEPS))
        assert_same_bits(target.bits(), source.bits())
    finally:
        for run in (source, target):
            run.optimizer.close()


@over_optimizers
def test_state_that_a_framework_moves_comes_back_from_disk(name: str, tmp_path: Path) -> None:
    """What is read when it is asked for is read before its place is given up."""
    run, undisturbed = (Run(name, place, tmp_path / place) for place in ("nvme", "memory"))
    train(run.optimizer, range(SAVED))
    for entries in run.optimizer.state.values():
        for key, value in entries.items():
            if key != "step":
                entries[key] = value.clone()
    train(run.optimizer, range(SAVED, STEPS))
    train(undisturbed.optimizer, range(STEPS))
    assert_same_bits(run.bits(), undisturbed.bits())
    run.optimizer.close()
