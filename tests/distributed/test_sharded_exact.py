"""Sharded parameters that are stepped as wholes: the bits of a process that has everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fans import OPTIMIZERS, Parts, Run, differing, whole
from tests.support.processes import gather

STEPS = 10


ARMS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in OPTIMIZERS},
    "packed": {"name": "SOAP", "runtime": {"factors": "packed"}},
}


def runs(rank: int, mesh_shapes: Sequence[Sequence[int]]) -> dict[Any, Parts]:
    found = {}
    for mesh_shape in mesh_shapes:
        for arm, options in ARMS.items():
            run = Run(mesh_shape=mesh_shape, **options)
            run.train(range(STEPS))
            found[arm, tuple(mesh_shape)] = run.parts()
    return found


@pytest.mark.parametrize("mesh_shapes", [[(2,)], [(4,), (2, 2)]], ids=["2 ranks", "4 ranks"])
def test_bits_are_those_of_one_process(mesh_shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    world = 2 if len(mesh_shapes) == 1 else 4
    wanted = {arm: whole(steps=STEPS, **options) for arm, options in ARMS.items()}
    for found in gather(world, tmp_path / "store", runs, mesh_shapes):
        for (arm, mesh_shape), parts in found.items():
            assert not differing(parts, wanted[arm]), (arm, mesh_shape)
