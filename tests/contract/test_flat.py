"""Long runs take no more memory, files, threads or descriptors than short ones."""

import os
import threading
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import torch

from asteria import SOAP, RuntimeConfig
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.runtime.engine import Engine
from asteria.runtime.residence import Residence
from asteria.store.cell import Home
from tests.contract.test_state_on_tiers import EXTENT_BYTES
from tests.support.links import CheckedLink
from tests.support.memory import live_objects
from tests.support.tiers import CheckedLane, homes, limit_extents
from tests.support.training import Shape, parameters, train

SHAPES: list[Shape] = [(12, 4), (5,), (12, 4), (4, 8)]
PERIOD = 10
LENGTH = 500
MOST_THREADS = 10
"""Four that read, four that write, one that removes files, one that refreshes."""


class Taken(NamedTuple):
    """What a run takes at a moment at which nothing is under way."""

    device_bytes: int
    pinned_bytes: int
    disk_bytes: int
    files: int
    tensors: int


def taken(optimizer: SecondOrderOptimizer, folder: Path) -> Taken:
    optimizer.state_dict()  # waits for the workers
    residence = optimizer._engine._residence
    for door in residence._doors.values():
        door.flush()
    for buffers in (*residence._near.values(), residence._pinned):
        buffers.trim()
    tier = residence._nvme
    assert tier is not None
    tier._remover.submit(int).result()  # type: ignore[attr-defined]
    at = residence.bytes_at
    files = sum(len(names) for _, _, names in os.walk(folder))
    return Taken(at["device"], at["pinned"], at["nvme"], files, live_objects()[1])


@pytest.mark.parametrize("apart", [False, True], ids=["host", "device"])
def test_a_long_run_takes_what_a_short_one_takes(
    apart: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit_extents(monkeypatch, EXTENT_BYTES)
    threads = threading.active_count()
    budgets = {"device_budget": 0, "host_budget": 5120} if apart else {"host_budget": 0}
    runtime = RuntimeConfig(nvme_path=tmp_path, workers=1, **budgets)
    optimizer = SOAP(parameters(SHAPES), shampoo_beta=0.5, runtime=runtime)
    if apart:
        residence = Residence(
            runtime, lane=lambda device: CheckedLane(), is_host=lambda device: False
        )
        engine = optimizer._engine = Engine(runtime, residence=residence)
        assert engine._background is not None
        engine._background._stager._links[torch.device("cpu")] = CheckedLink()
    process = psutil.Process()
    train(optimizer, range(6 * PERIOD))
    assert Home.NVME in homes(optimizer)
    first = taken(optimizer, tmp_path)
    descriptors = process.num_fds()
    peak_bytes = dict(optimizer._engine._residence.peak_bytes_at)
    train(optimizer, range(6 * PERIOD, LENGTH))
    last = taken(optimizer, tmp_path)
    assert last._replace(files=first.files) == first
    assert last.files <= first.files + 2, "some may be on their way out"
    assert threading.active_count() <= threads + MOST_THREADS
    assert process.num_fds() <= descriptors
    peaks = optimizer._engine._residence.peak_bytes_at
    assert {tier: peaks[tier] for tier in ("device", "pinned")} == {
        tier: peak_bytes[tier] for tier in ("device", "pinned")
    }
    optimizer.close()
