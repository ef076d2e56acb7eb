"""Sharded parameters that are stepped as wholes: the bits of a process that has everything."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.fans import OPTIMIZERS, Parts, Run, differing, whole
from tests.support.processes import gather

STEPS = 10


def runs(rank: int, mesh_shapes: Sequence[Sequence[int]]) -> dict[Any, Parts]:
    found = {}
    for mesh_shape in mesh_shapes:
        for name in OPTIMIZERS:
            run = Run(name, mesh_shape)
            run.train(range(STEPS))
            found[name, tuple(mesh_shape)] = run.parts()
    return found


@pytest.mark.parametrize("mesh_shapes", [[(2,)], [(4,), (2, 2)]], ids=["2 ranks", "4 ranks"])
def test_bits_are_those_of_one_process(mesh_shapes: list[tuple[int, ...]], tmp_path: Path) -> None:
    world = 2 if len(mesh_shapes) == 1 else 4
    wanted = {name: whole(name, STEPS) for name in OPTIMIZERS}
    for found in gather(world, tmp_path / "store", runs, mesh_shapes):
        for (name, mesh_shape), parts in found.items():
            assert not differing(parts, wanted[name]), (name, mesh_shape)
