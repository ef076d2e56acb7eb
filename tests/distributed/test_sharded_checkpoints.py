"""State of sharded parameters through torch.distributed.checkpoint, also at other world sizes."""

from pathlib import Path
from typing import Any

import pytest
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

from tests.distributed.fans import OPTIMIZERS, Parts, Run, differing, whole
from tests.support.processes import gather

SAVED, STEPS = 10, 15
"""Refreshes are in flight when it is saved."""
MESHES = ((4,), (2, 2), (4,))


def save(run: Run, path: Path, *, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=path)


def load(run: Run, path: Path, *, flat: bool = False) -> None:
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, optimizer = get_state_dict(run.model, run.optimizer, options=options)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        run.model,
        run.optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optimizer"],
        options=options,
    )


def saving(rank: int, folder: Path) -> dict[str, Any]:
    found = {}
    for name in OPTIMIZERS:
        run = Run(name, (2,))
        run.train(range(SAVED))
        for flat in (False, True):
            save(run, folder / f"{name}-{flat}", flat=flat)
        shown = run.optimizer.state_dict()["state"][0]
        found[name] = {
            key: (type(value) is DTensor, tuple(value.shape)) for key, value in shown.items()
        }
        run.train(range(SAVED, STEPS))
        found[name, "weights"] = run.parts()
    return found


def loading(rank: int, folder: Path) -> dict[Any, Parts]:
    found = {}
    for name, flat, mesh_shape in zip(OPTIMIZERS, (True, False, False), MESHES, strict=True):
        run = Run(name, mesh_shape)
        load(run, folder / f"{name}-{flat}", flat=flat)
        run.train(range(SAVED, STEPS))
        found[name, mesh_shape] = run.parts()
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_saved_by_2_ranks_and_loaded_by_4_and_1(tmp_path: Path) -> None:
    """All go on to the bits of a process that has everything and was never interrupted."""
    wanted = {name: whole(name, STEPS) for name in OPTIMIZERS}
    for found in gather(2, tmp_path / "a", saving, tmp_path):
        for name in OPTIMIZERS:
            assert not differing(found[name, "weights"], wanted[name]), "saving changes nothing"
    for found in gather(4, tmp_path / "b", loading, tmp_path):
        for name, mesh_shape in found:
            assert not differing(found[name, mesh_shape], wanted[name]), (name, mesh_shape)
    for name in OPTIMIZERS:
        run = Run(name)
        load(run, tmp_path / f"{name}-True", flat=True)
        run.train(range(SAVED, STEPS))
        arrays = run.arrays()
        assert all(arrays[key].tobytes() == wanted[name][key].tobytes() for key in wanted[name])
