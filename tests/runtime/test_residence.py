"""What the devices of one optimizer get of its budgets, and who closes its tiers."""

import threading
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import asteria
from asteria import RuntimeConfig, StoreFullError
from asteria.algorithms.algorithm import BlockShape
from asteria.algorithms.soap import SOAP
from asteria.runtime import residence as module
from asteria.runtime.extents import Extent, ExtentKey, layouts
from asteria.runtime.residence import Residence
from asteria.runtime.show import show
from asteria.store.cell import Cell, Home
from tests.support.tiers import Arrangement, CheckedLane, CheckedTier, arranged, cells
from tests.support.training import parameters, train

BLOCK = BlockShape((64, 64), (True, True))
PLAIN, OTHER = torch.device("cpu"), torch.device("cpu", 0)


class Places:
    """A residence, and extents of one block on each of two devices."""

    def __init__(self, *, hosts: tuple[torch.device, ...] = (), **budgets: Any) -> None:
        self.tier = CheckedTier()
        self.residence = Residence(
            RuntimeConfig(refresh="sync", **budgets),
            is_host=lambda device: device in hosts,
            lane=lambda device: CheckedLane(),
            nvme=lambda path, budget: self.tier,
        )
        self.extents = [self._extent(device) for device in (PLAIN, OTHER)]
        self.state_bytes = sum(cell.nbytes for cell in self.extents[0].cells.values())

    def _extent(self, device: torch.device) -> Extent:
        key = ExtentKey(SOAP(), BLOCK, torch.float32, device)
        held = layouts(key.rule, key.shape, 1, key.dtype)
        extent = Extent(
            key,
            [SimpleNamespace(stop=1, kept=True)],  # type: ignore[list-item]
            self.residence.door(device),
            {life: Cell(layout) for life, layout in held.items()},
        )
        return extent

    def homes(self) -> list[set[Home]]:
        places = self.residence._places(self.extents)
        return [{home for _, home in places[extent]} for extent in self.extents]


@pytest.fixture(autouse=True)
def period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Extent, "period", 10)


def one_state() -> int:
    return Places(device_budget=0).state_bytes


def test_two_devices_share_the_host() -> None:
    both = Places(device_budget=0, host_budget=2 * one_state())
    assert both.homes() == [{Home.PINNED}, {Home.PINNED}]
    assert both.residence._pinned.budget_bytes == 2 * both.state_bytes
    with pytest.raises(StoreFullError):
        Places(device_budget=0, host_budget=2 * one_state() - 1).homes()


def test_a_device_takes_what_the_processor_has_left_of_the_host() -> None:
    budget = 2 * one_state()
    assert Places(hosts=(PLAIN,), device_budget=0, host_budget=budget).homes() == [
        {Home.DEVICE},
        {Home.PINNED},
    ]
    with pytest.raises(StoreFullError):
        Places(hosts=(PLAIN,), device_budget=0, host_budget=budget - 1).homes()


def test_two_devices_share_the_disk() -> None:
    size = one_state()
    rewritten = 4 * max(cell.nbytes for cell in Places(device_budget=0).extents[0].cells.values())
    fits = 2 * size + rewritten
    given: dict[str, Any] = {"device_budget": 0, "host_budget": 0, "nvme_path": "never made"}
    assert Places(**given, nvme_budget=fits).homes() == [{Home.NVME}, {Home.NVME}]
    with pytest.raises(StoreFullError):
        Places(**given, nvme_budget=fits - 1).homes()


def test_whoever_sets_nothing_is_never_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "host_free_bytes", lambda: 0)
    places = Places(hosts=(PLAIN, OTHER))
    assert places.homes() == [{Home.DEVICE}, {Home.DEVICE}]
    assert places.residence._near[PLAIN].budget_bytes is None


def test_with_a_disk_what_is_free_is_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "host_free_bytes", lambda: 10**9)
    monkeypatch.setattr(module, "reserve_bytes", lambda *_: 10**9 - 1000)
    places = Places(hosts=(PLAIN, OTHER), nvme_path="never made")
    assert Home.NVME in places.homes()[0]


def test_what_is_moved_down_leaves_room_to_read_ahead() -> None:
    optimizer = asteria.SOAP(parameters([(12, 4), (8, 6)]), shampoo_beta=0.5)
    residence = arranged(optimizer, Arrangement({})).residence
    train(optimizer, range(12))
    extents = optimizer._engine._all()
    door = residence.door(PLAIN)
    near = residence._near[PLAIN]
    near.budget_bytes = near.used_bytes + 10**6
    residence._demote(PLAIN, extents, Home.DEVICE, Home.NVME, 10**6)
    show(extents)
    assert {cell.home for cell in cells(optimizer)} == {Home.NVME}
    assert near.used_bytes == 0, "nothing is kept for later"
    largest = max(sum(cell.nbytes for cell in extent.cells.values()) for extent in extents)
    assert near.budget_bytes == 3 * largest
    door.prefetch(extents[0].cells.values())
    assert all(cell.near is not None for cell in extents[0].cells.values())


def test_abandoned_it_closes_its_tier_without_waiting() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow(CheckedTier):
        def close(self) -> None:
            begun.set()
            go_on.wait(10)
            super().close()

    tier = Slow()
    runtime = RuntimeConfig(nvme_path="never made")
    residence = Residence(runtime, nvme=lambda path, budget: tier)
    tier.put(torch.zeros(4, dtype=torch.uint8))
    residence.abandon()
    assert begun.wait(10)
    assert tier.slots, "it is still at it"
    go_on.set()
    for thread in threading.enumerate():
        if thread.name == "asteria close":
            thread.join()
    assert not tier.slots
