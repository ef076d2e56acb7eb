"""Shards that are stepped on their own: an optimizer on each rank's shards, by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from tests.distributed.fans import OPTIMIZERS, Fan, Parts, Run, batch, build
from tests.distributed.test_sharded_checkpoints import load, save
from tests.support.processes import gather

SAVED, STEPS = 7, 10


def local(rank: int, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in OPTIMIZERS:
        runtime = OPTIMIZERS[name] | {"shards": "local"}
        run = Run(name, (4,), runtime=runtime)
        run.train(range(SAVED))
        resumed = Run(name, (4,), runtime=runtime)
        if name == "KLSOAP":
            save(run, folder / name, flat=True)
            load(resumed, folder / name, flat=True)
        else:
            resumed.model.load_state_dict(run.model.state_dict())
            resumed.optimizer.load_state_dict(run.optimizer.state_dict())
        run.train(range(SAVED, STEPS))
        found[name] = run.parts()
        resumed.train(range(SAVED, STEPS))
        found[name, "resumed"] = resumed.parts()
    row = run.optimizer.describe().rows[0]
    found["row"] = row.shards, row.owner
    shown = run.optimizer.state[run.model.get_parameter("layers.0.weight")]
    found["shown"] = {key: type(value) is DTensor for key, value in shown.items()}
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    folder = tmp_path_factory.mktemp("local")
    return list(gather(4, folder / "store", local, folder))


def gradients(step: int) -> dict[str, Tensor]:
    """Of the whole; they do not depend on the weights."""
    model = Fan()
    (model(*batch(step)) / 4).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def by_hand(name: str, parts: Parts) -> Parts:
    """The same regions of the weights, stepped as parameters of their own."""
    start = dict(Fan().named_parameters())
    pieces = {n: nn.Parameter(start[n][box].detach().clone()) for n, (box, _) in parts.items()}
    optimizer = build(name, pieces.items(), OPTIMIZERS[name])
    for step in range(STEPS):
        found = gradients(step)
        for n, (box, _) in parts.items():
            pieces[n].grad = found[n][box].clone()
        optimizer.step()
    return {n: (box, pieces[n].detach().numpy()) for n, (box, _) in parts.items()}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_bits_of_optimizers_on_the_shards(name: str, results: list[dict[Any, Any]]) -> None:
    for found in results:
        wanted = by_hand(name, found[name])
        for n, (_, values) in found[name].items():
            assert np.array_equal(values, wanted[n][1]), n


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_resumed_at_the_same_world_size_to_the_same_bits(
    name: str, results: list[dict[Any, Any]]
) -> None:
    for found in results:
        for n, (_, values) in found[name, "resumed"].items():
            assert np.array_equal(values, found[name][n][1]), n


def test_what_cannot_be_cut_anew_names_its_shard(results: list[dict[Any, Any]]) -> None:
    for rank, found in enumerate(results):
        assert found["row"] == ("local", None)
        tagged = {key for key in found["shown"] if key.endswith(f"@{rank}of4")}
        assert {"step", "exp_avg", "exp_avg_sq"} == found["shown"].keys() - tagged
        assert {f"factor_0@{rank}of4", f"basis_1@{rank}of4"} <= tagged
        assert {key for key, sharded in found["shown"].items() if sharded} == {
            "exp_avg",
            "exp_avg_sq",
        }
