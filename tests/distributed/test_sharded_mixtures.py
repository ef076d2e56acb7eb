"""Parameters of several kinds in one optimizer, and local shards at another world size."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import asteria
from tests.distributed.fans import OPTIMIZERS, Fan, Run, build, differing
from tests.support.processes import gather

STEPS = 8
LOCAL = ("layers.0", "layers.1")
EXACT = ("table", "layers.3")
PLAIN = ("norm.weight", "norm.bias", "layers.2.weight", "layers.2.bias", "experts")
"""Replicated: every rank steps them, and their factors have an owner among the ranks."""
CLIP = 1e9
"""The norm is what is looked at: a real clip rounds differently on every number of ranks."""


class Mixed(Run):
    """One parameter is no shard's, and the layers are in a group of their own."""

    def __init__(self, *, sharded: bool = True) -> None:
        self.model = Fan()
        self.mesh = None
        own: dict[str, Any] = {}
        if sharded:
            self.mesh = init_device_mesh("cpu", (2,))
            for name in LOCAL + EXACT:
                fully_shard(self.model.get_submodule(name), mesh=self.mesh)
            own = {"shards": "local"}
        named = list(self.model.named_parameters())
        local = [(n, p) for n, p in named if n.startswith(LOCAL)]
        others = [(n, p) for n, p in named if not n.startswith(LOCAL)]
        groups = [{"params": others}, {"params": local, **own}]
        # Asynchronous refreshes of all blocks take turns, and local blocks are other ones.
        self.optimizer = build("SOAP", groups, {"refresh": "sync"})

    def backward(self, step: int) -> None:
        """Clipped, too."""
        super().backward(step)
        for plain in (self.model.get_parameter(name).grad for name in PLAIN):
            if self.mesh is not None and plain is not None:
                dist.all_reduce(plain)
                plain /= 2
        # torch does not clip plain and sharded gradients together.
        clipped = [p for n, p in self.model.named_parameters() if n not in PLAIN]
        self.norm = nn.utils.clip_grad_norm_(clipped, CLIP)


def floating(rank: int | None, steps: int = STEPS) -> dict[str, Any]:
    """Weights of a small network with gradients of all kinds of numbers."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Tanh(), nn.Linear(8, 8, bias=False))
    x, y = torch.randn(2, 64, 8)
    mine = slice(None)
    if rank is not None:
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
        mine = slice(32 * rank, 32 * rank + 32)
    optimizer = build("SOAP", model.parameters(), {})
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x[mine]) - y[mine]).square().mean().backward()
        optimizer.step()
    weights = {n: p.detach() for n, p in model.named_parameters()}
    return {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).numpy() for n, p in weights.items()
    }


def mixed(rank: int) -> dict[str, Any]:
    run = Mixed()
    run.train(range(STEPS))
    norm = run.norm
    return {
        "floating": floating(rank),
        "from AdamW": from_adamw((2,)).parts(),
        "from AdamW, local": from_adamw((2,), shards="local").parts(),
        "norm": float(norm.full_tensor() if isinstance(norm, DTensor) else norm),
        "rows": {row.name: (row.shards, row.owner) for row in run.optimizer.describe().rows},
        "table": str(run.optimizer.describe()).splitlines()[0],
        "plain": {n: run.model.get_parameter(n).detach().numpy().copy() for n in PLAIN},
        "table.weight": run.model.table.weight.full_tensor().detach().numpy(),  # type: ignore[operator]
        "keys": list(run.optimizer.state_dict()["state"]),
    }


def from_adamw(mesh_shape: tuple[int, ...], **runtime: Any) -> Run:
    """A run that begins with AdamW."""
    first, then = Run("SOAP", mesh_shape), Run("SOAP", mesh_shape, runtime=runtime)
    first.optimizer = torch.optim.AdamW(first.model.named_parameters(), lr=2.0**-6)
    first.train(range(3))
    then.model.load_state_dict(first.model.state_dict())
    then.optimizer.load_state_dict(first.optimizer.state_dict())
    then.train(range(3, STEPS))
    return then


def slimmed(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name in OPTIMIZERS:
        run = Run(name, (2,), runtime={"shards": "local"})
        run.train(range(STEPS))
        state = asteria.slim(get_optimizer_state_dict(run.model, run.optimizer))
        dcp.save({"optimizer": state}, checkpoint_id=folder / name)
        found[name] = {
            fqn: entries["exp_avg"].full_tensor().numpy() for fqn, entries in state["state"].items()
        }
    return found


def resumed(rank: int, folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in OPTIMIZERS:
        run = Run(name, (4,), runtime={"shards": "local"})
        state = {"optimizer": asteria.slim(get_optimizer_state_dict(run.model, run.optimizer))}
        # A shard of one row is a vector to KL-Shampoo: other ranks, other rules.
        planner = dcp.DefaultLoadPlanner(allow_partial_load=True)
        dcp.load(state, checkpoint_id=folder / name, planner=planner)
        set_optimizer_state_dict(run.model, run.optimizer, state["optimizer"])
        again = asteria.slim(get_optimizer_state_dict(run.model, run.optimizer))["state"]
        found[name] = {
            fqn: entries["exp_avg"].full_tensor().numpy() for fqn, entries in again.items()
        }
        run.train(range(STEPS, STEPS + 3))
        found[name, "steps"] = int(again["layers.0.weight"]["step"])
        parts = run.parts()
        found[name, "finite"] = all(np.isfinite(values).all() for _, values in parts.values())
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store: Path = tmp_path_factory.mktemp("mixed") / "store"
    return list(gather(2, store, mixed))


def test_plain_exact_and_local_parameters(results: list[dict[str, Any]]) -> None:
    run = Mixed(sharded=False)
    run.train(range(STEPS))
    for found in results:
        assert found["norm"] == pytest.approx(float(run.norm), rel=1e-6)
        wanted = run.model.get_parameter("table.weight").detach().numpy()
        assert np.array_equal(found["table.weight"], wanted)
        # In the other run it is in a vector with others, and their lengths decide the last bits.
        for name, values in found["plain"].items():
            wanted = run.model.get_parameter(name).detach().numpy()
            assert np.allclose(values, wanted, atol=1e-5, rtol=0), name
            assert np.array_equal(values, results[0]["plain"][name]), "replicas do not drift"


def test_sums_of_gradients_in_another_order(results: list[dict[str, Any]]) -> None:
    """Their last bits differ, 6e-8 of a gradient; after 8 steps weights do by 2e-5 of their way."""
    whole, start = floating(None), floating(None, steps=0)
    moved = max(np.abs(whole[name] - start[name]).max() for name in whole)
    for found in results:
        for name, values in whole.items():
            assert np.abs(found["floating"][name] - values).max() <= 1e-3 * moved


def test_going_on_from_adamw(results: list[dict[str, Any]]) -> None:
    wanted = from_adamw(()).arrays()
    for found in results:
        assert not differing(found["from AdamW"], wanted)
        assert all(np.isfinite(part).all() for _, part in found["from AdamW, local"].values())


def test_the_table_tells_who_steps_what(results: list[dict[str, Any]]) -> None:
    for found in results:
        rows = found["rows"]
        assert rows == results[0]["rows"]
        assert {rows[name] for name in PLAIN} == {("", None)}
        assert rows["layers.0.weight"] == ("local", None)
        assert rows["table.weight"][0] == "exact"
        assert {rows["table.weight"][1], rows["layers.3.weight"][1]} == {0, 1}
        assert found["table"].split()[-2:] == ["shards", "owner"]


def test_slim_local_states_are_cut_anew(tmp_path: Path) -> None:
    saved = gather(2, tmp_path / "a", slimmed, tmp_path)
    for found in gather(4, tmp_path / "b", resumed, tmp_path):
        for name in OPTIMIZERS:
            for fqn, moment in saved[0][name].items():
                assert np.array_equal(found[name][fqn], moment), (name, fqn)
            assert found[name, "steps"] == STEPS - 1, "the first gradient makes the bases"
            assert found[name, "finite"]
