"""State of local shards in files of one rank."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed.fans import Run
from tests.support.processes import gather

pytestmark = pytest.mark.slow

SAVED, STEPS = 7, 12
LOCAL: dict[str, Any] = {"shards": "local"}


def resumed(rank: int) -> None:
    """Each rank's own file, and a copy in memory, go on with the bits of the run."""
    run = Run("SOAP", (2,), runtime=LOCAL)
    run.train(range(SAVED))
    file = io.BytesIO()
    torch.save(run.optimizer.state_dict(), file)
    file.seek(0)
    weights = copy.deepcopy(run.model.state_dict())
    kept = copy.deepcopy(run.optimizer.state_dict())
    run.train(range(SAVED, STEPS))
    wanted = run.parts()
    for state in (torch.load(file, weights_only=False), kept):
        twin = Run("SOAP", (2,), runtime=LOCAL)
        twin.model.load_state_dict(weights)
        twin.optimizer.load_state_dict(state)
        twin.train(range(SAVED, STEPS))
        for name, (_, value) in twin.parts().items():
            assert (value == wanted[name][1]).all(), name


def test_a_file_and_a_copy_resume_to_the_same_bits(tmp_path: Path) -> None:
    gather(2, tmp_path / "store", resumed)
