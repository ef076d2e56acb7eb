"""``factors="rotated"`` through torch.distributed.checkpoint, also to and from full factors."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from tests.integrations.test_distributed_checkpoint import (
    SAVED,
    STEPS,
    Run,
    over_formats,
    read,
)
from tests.support.training import assert_same_bits


@pytest.fixture(autouse=True, scope="module")
def alone() -> Iterator[None]:
    """A group of one process."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


@over_formats
@pytest.mark.parametrize("first", ["full", "rotated"])
@pytest.mark.parametrize("then", ["full", "rotated"])
def test_however_factors_are_kept(first: str, then: str, flat: bool, tmp_path: Path) -> None:
    """The same way to the same bits, the other way to the same factors but for rounding."""
    whole = Run("SOAP", factors=first, flatten_optimizer_state_dict=flat)
    resumed = Run("SOAP", factors=then, flatten_optimizer_state_dict=flat)
    whole.train(0, SAVED)
    dcp.save({"optimizer": whole.state()}, checkpoint_id=tmp_path)
    resumed.load(whole, read(tmp_path, resumed))
    if first == then:
        for run in (whole, resumed):
            run.train(SAVED, STEPS)
        assert_same_bits(resumed.bits(), whole.bits())
        return
    for entries, others in zip(
        resumed.optimizer.state.values(), whole.optimizer.state.values(), strict=True
    ):
        for key in (key for key in entries if key.startswith("factor")):
            basis, given = entries[key.replace("factor", "basis")], others[key]
            sides = (basis.mT, basis) if then == "rotated" else (basis, basis.mT)
            torch.testing.assert_close(entries[key], sides[0] @ given @ sides[1])
