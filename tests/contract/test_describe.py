"""describe(): the routing as a table whose bytes are those of the state."""

from typing import Any

import pytest
import torch

from tests.support.arms import Arm, over_arms
from tests.support.training import COUNTERS, MIXED, Shape, parameters, train

SHAPES: list[Shape] = [*MIXED, (7, 3), (3, 33, 32), (0, 3)]
OPTIONS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "one-sided": {"max_precond_dim": 5},
    "blocks": {"max_precond_dim": 3, "large_dims": "blocks"},
    "diagonal": {"max_precond_dim": 1},
    "merged": {"merge_dims": True, "max_precond_dim": 12},
    "vectors": {"precondition_1d": True},
}
SOAP_ONLY = {"merged", "vectors"}


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", OPTIONS)
@over_arms
def test_bytes_and_factors_are_those_of_the_state(arm: Arm, kind: str, dtype: torch.dtype) -> None:
    if kind in SOAP_ONLY and arm.optimizer.__name__ != "SOAP":
        return
    params = parameters(SHAPES, dtype)
    named = [(f"layer.{index}", p) for index, p in enumerate(params)]
    optimizer = arm(named, **OPTIONS[kind])
    before = optimizer.describe()
    train(optimizer, range(3))
    description = optimizer.describe()
    assert description == before
    total = 0
    for row, (name, p) in zip(description.rows, named, strict=True):
        held = {key: t for key, t in optimizer.state[p].items() if key not in COUNTERS}
        tensors = {key: t for key, t in held.items() if not key.startswith("shadow")}
        size = sum(t.numel() * t.element_size() for t in tensors.values())
        assert row.state_bytes == size
        assert (row.name, row.shape, row.dtype) == (name, p.shape, str(dtype)[6:])
        squares = sum(t.numel() for key, t in tensors.items() if key.startswith("factor"))
        expected = sum(
            count * sum(n * n for n in sizes)
            for (count, _), sizes in zip(row.blocks, row.factors, strict=True)
        )
        assert squares == expected
        assert (row.rule == "adamw") == (not row.factors)
        if row.rule != "adamw":
            covered = sum(count * torch.Size(dims).numel() for count, dims in row.blocks)
            assert covered == p.numel()
        total += size
    assert description.state_bytes == total


@over_arms
def test_state_bytes_are_all_that_the_state_takes(arm: Arm) -> None:
    """Views of cells: together they cover each cell once, but for gaps between fields."""
    optimizer = arm(parameters(SHAPES))
    train(optimizer, range(2))
    storages, shown, views = {}, 0, 0
    for entries in optimizer.state.values():
        for key, t in entries.items():
            if key not in COUNTERS and not key.startswith("shadow") and t.numel():
                storage = t.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
                shown, views = shown + t.nbytes, views + 1
    assert shown == optimizer.describe().state_bytes
    assert shown <= sum(storages.values()) < shown + 64 * views


@over_arms
def test_table_is_for_people(arm: Arm) -> None:
    stack_of_three, scalar = parameters([(3, 33, 32), ()])
    named = [("stack", stack_of_three), ("scale", scalar)]
    optimizer = arm([{"params": named, "batch_dims": None}])
    head, stack, scale, total = str(optimizer.describe()).splitlines()
    assert head.split() == ["parameter", "shape", "dtype", "rule", "blocks", "factors", "state"]
    assert "3x33x32" in stack
    assert "3 x 33x32" in stack
    assert "33, 32" in stack
    assert "scalar" in scale
    assert "adamw" in scale
    assert total.startswith("total")
    assert total.endswith("KiB")


@over_arms
def test_options_of_the_group_decide(arm: Arm) -> None:
    a, b = parameters([(6, 4), (6, 4)])
    groups = [{"params": [a]}, {"params": [b], "max_precond_dim": 4, "large_dims": "blocks"}]
    rows = arm(groups).describe().rows
    assert rows[0].blocks == ((1, (6, 4)),)
    assert rows[1].blocks == ((2, (3, 4)),)
    assert [row.name for row in rows] == ["parameter 0 of group 0", "parameter 0 of group 1"]
