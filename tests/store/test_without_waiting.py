"""Where the order of the device's own work suffices, the host waits for no copy."""

from typing import Any

import pytest

from asteria.store.cell import Cell, Home
from tests.store.doors import CELL_BYTES, Place, near_of, value_of
from tests.support.tiers import CheckedDownload, CheckedLane, FaultyTier


def tight(windows: int = 1) -> Place:
    """A device with room for so many cells."""
    return Place(windows * CELL_BYTES, lane=CheckedLane())


@pytest.fixture
def host_waits(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Downloads that the host has waited for."""
    waited: list[Any] = []
    wait = CheckedDownload.synchronize

    def watched(download: CheckedDownload) -> None:
        waited.append(download)
        wait(download)

    monkeypatch.setattr(CheckedDownload, "synchronize", watched)
    return waited


def ways(place: Place) -> int:
    assert place.lane is not None
    return place.lane.ways


def uploads(place: Place) -> int:
    assert place.lane is not None
    return place.lane.uploads


def test_room_is_made_by_the_order_of_copies(host_waits: list[Any]) -> None:
    place = tight()
    cells = [place.cell(Home.PINNED, float(value)) for value in range(4)]
    host_waits.clear()
    for turn in range(3):
        for cell in cells:
            place.door.acquire(cell)
            near_of(cell).add_(1.0)
            place.door.release(cell, dirty=True)
        assert host_waits == [], turn
    assert place.near.peak_bytes == CELL_BYTES
    assert ways(place) >= 11
    place.door.flush()
    assert [place.look(cell) for cell in cells] == [3.0, 4.0, 5.0, 6.0]


def test_what_is_on_its_way_is_had_again_without_a_wait(host_waits: list[Any]) -> None:
    place = tight(2)
    cell = place.cell(Home.PINNED, 1.0)
    host_waits.clear()
    place.fill(cell, 2.0)
    before = uploads(place)
    place.door.acquire(cell)
    assert uploads(place) == before, "it was still there"
    near_of(cell).add_(1.0)
    place.door.release(cell, dirty=True)
    assert host_waits == []
    place.door.flush()
    assert place.read(cell) == 3.0
    assert place.look(cell) == 3.0


def test_the_host_looks_at_a_copy_once_it_is_there(host_waits: list[Any]) -> None:
    place = tight()
    cell, other = place.cell(Home.PINNED, 1.0), place.cell(Home.PINNED, 2.0)
    place.fill(cell, 3.0)
    assert place.look(other) == 2.0
    assert cell.near is None
    host_waits.clear()
    assert place.read(cell) == 3.0
    assert len(host_waits) == 1


def test_memory_of_a_copy_is_nobody_elses_before_it_is_there() -> None:
    """A cell that is given up while its copy home is under way."""
    place = tight()
    cell, other = place.cell(Home.PINNED, 1.0), place.cell(Home.PINNED, 2.0)
    place.fill(cell, 3.0)
    assert place.look(other) == 2.0
    far = cell.far
    assert far is not None
    place.door.discard(cell)
    assert all(free is not far for free in place.host._free)
    new = place.cell(Home.PINNED, 4.0)
    assert place.look(new) == 4.0
    assert place.read(new) == 4.0


def test_a_cell_goes_on_to_the_disk_once_its_copy_is_there() -> None:
    place = tight()
    cell, other = place.cell(Home.PINNED, 1.0), place.cell(Home.PINNED, 2.0)
    place.fill(cell, 3.0)
    assert place.look(other) == 2.0
    place.door.move(cell, Home.NVME)
    place.door.flush()
    assert place.read(cell) == 3.0
    assert place.look(cell) == 3.0


def test_the_disk_is_the_hosts_business(host_waits: list[Any]) -> None:
    """What has to be written there must have arrived."""
    place = tight()
    cells = [place.cell(Home.NVME, float(value)) for value in range(3)]
    for cell in cells:
        place.fill(cell, 5.0)
    place.door.flush()
    assert ways(place) == 0
    assert [place.look(cell) for cell in cells] == [5.0] * 3


def prefetched(place: Place, *cells: Cell) -> None:
    """Let other cells come and go, as steps do, until the disk is done."""
    other = place.cell(Home.PINNED, 9.0)
    place.door.prefetch(cells)
    for _ in range(4):
        assert place.look(other) == 9.0


def test_what_the_disk_has_brought_goes_on_before_it_is_asked_for() -> None:
    place = tight(4)
    cell = place.cell(Home.NVME, 1.0)
    prefetched(place, cell)
    before = uploads(place)
    place.door.acquire(cell)
    assert uploads(place) == before, "it was under way"
    assert value_of(near_of(cell)) == 1.0


def test_a_read_that_fails_on_the_way_is_told_by_the_acquire_only() -> None:
    tier = FaultyTier("read", 0)
    place = Place(4 * CELL_BYTES, lane=CheckedLane(), tier=tier)
    cell = place.cell(Home.NVME, 1.0)
    prefetched(place, cell)
    assert tier.failed == 1
    assert cell.near is None
    assert place.look(cell) == 1.0
