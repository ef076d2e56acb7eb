"""Factors that turn, of sharded parameters: their owner has them, and files go to either form."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.distributed.fans import Arrays, Run, differing
from tests.distributed.test_sharded_checkpoints import full, load, save
from tests.support.processes import gather

SAVED, STEPS = 10, 13
ROTATED = {"factors": "rotated"}


def sharing(rank: int, folder: Path) -> dict[str, Any]:
    """A run that is saved and goes on, and what one with full factors makes of the file."""
    run = Run("SOAP", (2,), runtime=ROTATED, precondition_frequency=1)
    run.train(range(SAVED))
    save(run, folder)
    found = {"rotated": full(run)}
    run.train(range(SAVED, STEPS))
    other = Run("SOAP", (2,), runtime={"refresh_method": "ldlr"})
    load(other, folder)
    return found | {"weights": run.parts(), "full": full(other)}


def factors(state: Arrays, *, in_bases: bool) -> Arrays:
    """Those of a full state, in the parameter's coordinates."""
    found = {}
    for key, factor in state.items():
        if ".factor_" in key:
            basis = state[key.replace(".factor_", ".basis_")]
            found[key] = basis @ factor @ basis.swapaxes(-1, -2) if in_bases else factor
    return found


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")
def test_owners_have_them_as_one_process_has_and_convert_what_they_load(tmp_path: Path) -> None:
    alone = Run("SOAP", runtime=ROTATED, precondition_frequency=1)
    alone.train(range(STEPS))
    first, second = gather(2, tmp_path / "store", sharing, tmp_path / "saved")
    for found in (first, second):
        assert not differing(found["weights"], alone.arrays())
    wanted = factors(first["rotated"], in_bases=True)
    converted = factors(first["full"], in_bases=False)
    assert converted.keys() == wanted.keys()
    assert len(wanted) > 8
    for key, factor in wanted.items():
        assert np.abs(converted[key] - factor).max() < 1e-5 * np.abs(factor).max(), key
