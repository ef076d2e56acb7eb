"""Free memory runs short in the middle of a run: state moves down, and no bit changes."""

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from asteria import StoreFullError
from asteria.optim.optimizer import SecondOrderOptimizer
from asteria.store import pressure
from asteria.store.cell import Home
from tests.contract.test_state_on_tiers import CASES, EXTENT_BYTES, all_of, on_the_device
from tests.support.arms import over_optimizers
from tests.support.tiers import (
    WORKING_BYTES,
    Arrangement,
    CheckedTier,
    arranged,
    homes,
    limit_extents,
)
from tests.support.training import assert_same_bits, everything

TOTAL_BYTES = 2 * 1024**3
PLENTY = TOTAL_BYTES // 2
CASE = CASES["defaults"]
ROOM = 64 * 1024


class Machine:
    """A host whose free memory is what a test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.available_bytes = PLENTY
        monkeypatch.setattr(psutil, "virtual_memory", self._memory)
        monkeypatch.setattr(pressure, "_CGROUP", Path("/nowhere"))

    def _memory(self) -> SimpleNamespace:
        return SimpleNamespace(total=TOTAL_BYTES, available=self.available_bytes)

    def lacks(self, nbytes: int) -> None:
        """From now on so much of the reserve is taken."""
        self.available_bytes = int(TOTAL_BYTES * 0.05) - nbytes


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    limit_extents(monkeypatch, EXTENT_BYTES)
    return Machine(monkeypatch)


PLACES = {
    "host": Arrangement({"host_budget": WORKING_BYTES + ROOM}),
    "host, no budget": Arrangement({}),
    "device": Arrangement({"device_budget": ROOM, "host_budget": ROOM}, apart=True),
    "pinned": Arrangement({"device_budget": 0, "host_budget": ROOM}, apart=True),
}


@pytest.mark.parametrize(
    "place",
    list(PLACES),
)
@over_optimizers
def test_state_moves_down_and_no_bit_changes(name: str, place: str, machine: Machine) -> None:
    optimizer = CASE.build(name)
    stores = arranged(optimizer, PLACES[place])
    for step in range(50):
        if step == 18:
            assert Home.NVME not in homes(optimizer)
        if step in (18, 23, 24, 30):
            machine.lacks(2000)
        CASE.train(optimizer, range(step, step + 1))
        machine.available_bytes = PLENTY
    assert Home.NVME in homes(optimizer)
    assert stores.residence.traffic.demoted_bytes >= 7000
    assert_same_bits(all_of(optimizer), on_the_device(CASE, name))


def test_moving_down_gives_memory_back(machine: Machine) -> None:
    optimizer = CASE.build("SOAP")
    residence = arranged(optimizer, PLACES["host"]).residence
    CASE.train(optimizer, range(20))
    before = residence.bytes_at["device"]
    machine.lacks(3000)
    CASE.train(optimizer, range(20, 21))
    machine.available_bytes = PLENTY
    CASE.train(optimizer, range(21, 24))
    assert residence.bytes_at["device"] <= before - 3000 + 2048, "but for what flows through"


def test_without_a_lower_tier_nothing_moves(machine: Machine) -> None:
    optimizer = CASE.build("SOAP")
    arranged(optimizer, Arrangement({}, disk=False))
    CASE.train(optimizer, range(3))
    machine.lacks(10**6)
    CASE.train(optimizer, range(3, 6))
    assert homes(optimizer) == {Home.DEVICE}


def crowded(machine: Machine, room_bytes: int) -> tuple[SecondOrderOptimizer, CheckedTier]:
    """One whose disk takes so much and then no more, after some steps; memory is short."""
    optimizer, tier = CASE.build("SOAP"), CheckedTier(room_bytes)
    arranged(optimizer, PLACES["host"], tier)
    CASE.train(optimizer, range(20))
    machine.lacks(4000)
    return optimizer, tier


@pytest.mark.parametrize("room_bytes", [0, 1500])
def test_no_tier_left_is_one_clear_error(room_bytes: int, machine: Machine) -> None:
    optimizer, _ = crowded(machine, room_bytes)
    before = all_of(optimizer)
    with pytest.raises(StoreFullError, match=r"4000 bytes below .* device to nvme.*host_budget"):
        CASE.train(optimizer, range(20, 21))
    assert_same_bits(all_of(optimizer), before)


@pytest.mark.parametrize(
    "room_bytes",
    [0, 1500],
)
def test_training_goes_on_when_there_is_memory_again(room_bytes: int, machine: Machine) -> None:
    optimizer, tier = crowded(machine, room_bytes)
    with pytest.raises(StoreFullError):
        CASE.train(optimizer, range(20, 21))
    machine.available_bytes = PLENTY
    tier.budget_bytes = None
    CASE.train(optimizer, range(20, 40))
    assert_same_bits(all_of(optimizer), on_the_device(CASE, "SOAP", 40))


def test_a_disk_that_has_room_again_takes_the_state(machine: Machine) -> None:
    optimizer, tier = crowded(machine, 0)
    with pytest.raises(StoreFullError):
        CASE.train(optimizer, range(20, 21))
    tier.budget_bytes = None
    CASE.train(optimizer, range(20, 21))
    machine.available_bytes = PLENTY
    assert Home.NVME in homes(optimizer)
    CASE.train(optimizer, range(21, 40))
    assert_same_bits(everything(optimizer), everything_on_the_device(40))


def everything_on_the_device(steps: int) -> dict[str, object]:
    return {k: v for k, v in on_the_device(CASE, "SOAP", steps).items() if "saved" not in k}


def test_what_is_used_least_goes_first(machine: Machine) -> None:
    optimizer = CASE.build("SOAP")
    residence = arranged(optimizer, PLACES["host"]).residence
    CASE.train(optimizer, range(20))
    machine.lacks(1)
    CASE.train(optimizer, range(20, 21))
    extents = optimizer._engine._all()
    claims = [
        (item.moved_bytes / item.nbytes, cell.home)
        for extent in extents
        for item, cell in zip(residence._items(extent), extent.cells.values(), strict=True)
    ]
    moved = [claim for claim, home in claims if home is Home.NVME]
    stayed = [claim for claim, home in claims if home is Home.DEVICE]
    assert moved
    assert stayed
    assert max(moved) <= min(stayed)
