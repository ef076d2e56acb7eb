"""State of sharded parameters through torch.distributed.checkpoint, also at other world sizes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    get_state_dict,
    set_optimizer_state_dict,
    set_state_dict,
)
from torch.distributed.tensor import DTensor

import asteria
from tests.distributed.fans import OPTIMIZERS, Arrays, Parts, Run, differing, whole
from tests.support.processes import gather

SAVED, STEPS = 10, 14
"""Refreshes are in flight when it is saved."""
FLAT = {"SOAP": True, "KLShampoo": False, "KLSOAP": True}
MESHES = {"SOAP": (4,), "KLShampoo": (2, 2), "KLSOAP": (4,)}


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


def full(run: Run, **options: bool) -> Arrays:
    """The whole state as arrays, on rank 0, without what is in flight: each owner has its own."""
    options = {"full_state_dict": True, "flatten_optimizer_state_dict": True} | options
    state = get_optimizer_state_dict(run.model, run.optimizer, options=StateDictOptions(**options))
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)}
    return {k: v.numpy().copy() for k, v in tensors.items() if ".shadow_" not in k}


def saving(rank: int, folder: Path) -> dict[Any, Any]:
    found: dict[Any, Any] = {}
    for name in OPTIMIZERS:
        run = Run(name, (2,))
        run.train(range(SAVED))
        save(run, folder / name, flat=FLAT[name])
        found[name, "in flight"] = run.optimizer.stats().in_flight
        found[name, "full"] = full(run)
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
        state = get_optimizer_state_dict(
            run.model, run.optimizer, options=StateDictOptions(full_state_dict=True)
        )
        fresh = Run(name, (2,))
        set_optimizer_state_dict(fresh.model, fresh.optimizer, state, options=options)
        found[name, "broadcast"] = full(fresh)
        slim = asteria.slim(get_optimizer_state_dict(run.model, run.optimizer))
        found[name, "slim"] = {
            (fqn, key): value.full_tensor().numpy() if isinstance(value, DTensor) else value.numpy()
            for fqn, entries in slim["state"].items()
            for key, value in entries.items()
        }
        run.train(range(SAVED, STEPS))
        found[name, "weights"] = run.parts()
    return found


def loading(rank: int, folder: Path) -> dict[Any, Parts]:
    found = {}
    for name, mesh_shape in MESHES.items():
        run = Run(name, mesh_shape)
        load(run, folder / name, flat=FLAT[name])
        run.train(range(SAVED, STEPS))
        found[name, mesh_shape] = run.parts()
    return found


def check_whole_states(saved: Sequence[dict[Any, Any]]) -> None:
    """Gathered on rank 0, also after a way back, and slimmed: as of one process."""
    for name in OPTIMIZERS:
        run = Run(name)
        run.train(range(SAVED))
        wanted = full(run)
        for way in ("full", "broadcast"):
            found = saved[0][name, way]
            assert found.keys() == wanted.keys()
            assert not [key for key in wanted if not np.array_equal(found[key], wanted[key])], way
        slim = asteria.slim(get_optimizer_state_dict(run.model, run.optimizer))["state"]
        for found in saved:
            assert len(found[name, "slim"]) == sum(map(len, slim.values()))
            for (fqn, key), value in found[name, "slim"].items():
                assert np.array_equal(value, slim[fqn][key].numpy()), (fqn, key)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_saved_by_2_ranks_and_loaded_by_4_and_1(tmp_path: Path) -> None:
    """All go on to the bits of a process that has everything and was never interrupted."""
    wanted = {name: whole(name, STEPS) for name in OPTIMIZERS}
    saved = gather(2, tmp_path / "a", saving, tmp_path)
    check_whole_states(saved)
    for name in ("KLShampoo", "KLSOAP"):
        assert sum(found[name, "in flight"] for found in saved) > 1
    for found in saved:
        for name in OPTIMIZERS:
            assert not differing(found[name, "weights"], wanted[name]), "saving changes nothing"
    for found in gather(4, tmp_path / "b", loading, tmp_path):
        for name, mesh_shape in found:
            assert not differing(found[name, mesh_shape], wanted[name]), (name, mesh_shape)
    for name in OPTIMIZERS:
        run = Run(name)
        load(run, tmp_path / name, flat=FLAT[name])
        run.train(range(SAVED, STEPS))
        arrays = run.arrays()
        assert all(arrays[key].tobytes() == wanted[name][key].tobytes() for key in wanted[name])
