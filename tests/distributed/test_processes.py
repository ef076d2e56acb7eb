"""Real processes on gloo: the same bits on all of them, and those that one process computes."""

from pathlib import Path
from typing import Any

import pytest
import torch

from asteria import RuntimeConfig
from tests.support.arms import OPTIMIZERS
from tests.support.averaging import LateRun, train
from tests.support.processes import gather
from tests.support.training import Bits, assert_same_bits, weights

pytestmark = pytest.mark.slow

MANY, FEW = 200, 40
INSTALLS = {"scheduled": RuntimeConfig(node_size=2), "ready": RuntimeConfig(install="ready")}
BOUND = 3e-5
"""Of what a weight has moved. Sums of 4 gradients in another order differ by 1e-7 of them, and
eigenbases turn by such a difference over the gap of two eigenvalues: in one process, which sums up
in either order, weights are at most 3e-6 apart after 20, 40 and 80 steps."""


def replicas(rank: int) -> dict[str, Any]:
    """Weights after many steps, under each optimizer and each way to install."""
    runs = {(name, way): LateRun(name, INSTALLS[way]) for name in OPTIMIZERS for way in INSTALLS}
    train(runs.values(), MANY)
    found: dict[str, Any] = {f"{name} {way}": run.digest() for (name, way), run in runs.items()}
    return found | {way: runs["SOAP", way].optimizer.stats().network for way in INSTALLS}


def few(*, whole: bool, ranks: int = 0, steps: int = FEW) -> dict[str, Bits]:
    """Weights after few steps under each optimizer."""
    runs = {name: LateRun(name, RuntimeConfig()) for name in OPTIMIZERS}
    train(runs.values(), steps, ranks=ranks, whole=whole)
    return {name: weights(run.params) for name, run in runs.items()}


def on_four(rank: int) -> dict[str, Any]:
    return replicas(rank) | {"whole": few(whole=True), "real": few(whole=False)}


def check_replicas(found: list[dict[str, Any]]) -> None:
    for name in OPTIMIZERS:
        for install in INSTALLS:
            assert len({mine[f"{name} {install}"] for mine in found}) == 1, (name, install)
    scheduled = {found[0][f"{name} scheduled"] for name in OPTIMIZERS}
    assert len(scheduled) == len(OPTIMIZERS)


def test_two_ranks_are_replicas(tmp_path: Path) -> None:
    check_replicas(list(gather(2, tmp_path / "store", replicas)))


def test_four_ranks_are_replicas_of_one_process(tmp_path: Path) -> None:
    found = list(gather(4, tmp_path / "store", on_four))
    check_replicas(found)
    start, whole = few(whole=False, steps=0), few(whole=True, ranks=4)
    for name, real in few(whole=False, ranks=4).items():
        assert_same_bits(found[0]["whole"][name], whole[name])
        for key, wanted in real.items():
            moved = (wanted - start[name][key]).abs().max()
            error = (found[0]["real"][name][key] - wanted).abs().max()
            assert error <= BOUND * moved, (name, key, float(error / moved))
    for rank, mine in enumerate(found):
        for install, links in (("scheduled", {"intra", "inter"}), ("ready", {"intra"})):
            network = mine[install]
            assert (network.rank, network.ranks, network.owned_units) == (rank, 4, 1)
            used = {link for link, counted in network.links.items() if counted.received_messages}
            assert used == links
    assert not torch.distributed.is_initialized()
