"""Tensor parallelism, both at once, dtypes and options: still the bits of one process."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from asteria.distributed.sharded_layout import ShardLayout
from asteria.errors import ConfigError
from tests.distributed.fans import Arrays, Parts, build, differing
from tests.support.processes import gather

STEPS = 9
SHAPES = {
    "rows": (24, 16),
    "columns": (16, 24),
    "both": (18, 21),
    "twice": (22, 16),
    "row parallel": (15, 20),
    "copied": (12, 12),
    "vector": (6,),
    "strided": (16, 12),
}
PLACED: dict[str, tuple[Any, Any]] = {
    "rows": (Replicate(), Shard(0)),
    "columns": (Shard(0), Replicate()),
    "both": (Shard(0), Shard(1)),
    "twice": (Shard(0), Shard(0)),
    "row parallel": (Shard(1), Shard(0)),
    "copied": (Replicate(), Replicate()),
    "vector": (Shard(0), Replicate()),
}
GROUPS: list[tuple[dict[str, Any], Sequence[str]]] = [
    ({}, ["rows", "columns", "vector"]),
    ({"maximize": True, "weight_decay": 0.0}, ["both", "strided"]),
    ({"normalize_grads": True}, ["twice"]),
    ({"large_dims": "blocks", "max_precond_dim": 8}, ["row parallel", "copied"]),
]
DTYPES = [("SOAP", torch.float32), ("KLSOAP", torch.bfloat16), ("KLShampoo", torch.float64)]


def weight(name: str, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(len(name))
    return torch.randn(SHAPES[name], generator=generator, dtype=torch.float64).to(dtype)


def gradient(name: str, step: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(step * 100 + len(name))
    return torch.randint(-8, 9, SHAPES[name], generator=generator).to(dtype)


def train(
    kind: str,
    params: dict[str, Any],
    give: Callable[[str, Tensor], Any],
    dtype: torch.dtype,
    **options: Any,
) -> None:
    groups = [{**o, "params": [(n, params[n]) for n in names]} for o, names in GROUPS]
    optimizer = build(kind, groups, {}, **options)
    for step in range(STEPS):
        for name, parameter in params.items():
            parameter.grad = give(name, gradient(name, step, dtype))
        optimizer.step()


def whole(kind: str, dtype: torch.dtype) -> Arrays:
    params = {name: nn.Parameter(weight(name, dtype)) for name in SHAPES}
    train(kind, params, lambda _, given: given, dtype)
    return {name: p.detach().float().numpy() for name, p in params.items()}


def tensor_parallel_and_sharded(mesh: DeviceMesh, dtype: torch.dtype) -> nn.Parameter:
    """A weight that fully_shard cuts within the pieces of tensor parallelism."""
    model = nn.Sequential(nn.Linear(12, 16, bias=False), nn.Linear(16, 12, bias=False)).to(dtype)
    with torch.no_grad():
        model[0].weight.copy_(weight("strided", dtype))
    plan = {"0": ColwiseParallel(), "1": RowwiseParallel()}
    parallelize_module(model, mesh["tensor"], plan)
    fully_shard(model, mesh=mesh["data"])
    found: nn.Parameter = model.get_parameter("0.weight")
    return found


def sharded(mesh: DeviceMesh, kind: str, dtype: torch.dtype, **options: Any) -> Parts:
    params: dict[str, Any] = {
        name: nn.Parameter(distribute_tensor(weight(name, dtype), mesh, placements))
        for name, placements in PLACED.items()
    }
    params["strided"] = tensor_parallel_and_sharded(mesh, dtype)
    params = {name: params[name] for name in SHAPES}

    def give(name: str, given: Tensor) -> DTensor:
        parameter = params[name]
        layout = ShardLayout.of(name, parameter)
        if name == "copied":  # as the backward pass leaves it after sequence parallelism
            halves = [Replicate(), Partial()]
            return DTensor.from_local(given / 2, mesh, halves, run_check=False)
        part = given[layout.boxes[layout.here]].contiguous()
        found = layout.show(part, layout.shape)
        assert isinstance(found, DTensor)
        return found

    train(kind, params, give, dtype, **options)
    found: Parts = {}
    for name, parameter in params.items():
        layout = ShardLayout.of(name, parameter)
        local = parameter.to_local().detach().float().numpy().copy()
        found[name] = layout.boxes[layout.here], local
    return found


def placements(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    found: dict[str, Any] = {kind: sharded(mesh, kind, dtype) for kind, dtype in DTYPES}
    found["rounded"] = sharded(mesh, "KLSOAP", torch.bfloat16, stochastic_rounding=True)
    partial = DTensor.from_local(torch.ones(4, 4), mesh, [Replicate(), Partial()])
    try:
        build("SOAP", [("odd", nn.Parameter(partial))], {})
    except ConfigError as error:
        found["refused"] = str(error)
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    store: Path = tmp_path_factory.mktemp("placements") / "store"
    return list(gather(4, store, placements))


@pytest.mark.parametrize(("kind", "dtype"), DTYPES)
def test_bits_are_those_of_one_process(
    kind: str, dtype: torch.dtype, results: list[dict[str, Any]]
) -> None:
    wanted = whole(kind, dtype)
    for found in results:
        assert not differing(found[kind], wanted)


def test_replicas_round_alike(results: list[dict[str, Any]]) -> None:
    """Stochastically: ranks with the same region have the same noise."""
    seen: dict[str, bytes] = {}
    for found in results:
        for name, (box, values) in found["rounded"].items():
            assert seen.setdefault(f"{name} {box}", values.tobytes()) == values.tobytes()
            nearest = found["KLSOAP"][name][1]
            assert np.allclose(values, nearest, rtol=0.1, atol=0.1)
    rounded = results[0]["rounded"]["rows"][1]
    assert not np.array_equal(rounded, results[0]["KLSOAP"]["rows"][1])


def test_a_partial_parameter_is_refused(results: list[dict[str, Any]]) -> None:
    for found in results:
        assert found["refused"].startswith("odd: placements (Replicate(), Partial(sum))")
        assert "Redistribute the parameter" in found["refused"]
