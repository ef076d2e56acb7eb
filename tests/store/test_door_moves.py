"""What leaves the door's cells: discarded, moved to another home, read beside everything else."""

import pytest
import torch

from asteria.store.cell import Cell, Home
from asteria.store.courier import DeviceCourier
from tests.store.doors import CELL_BYTES, HOMES, Place, near_of, value_of
from tests.support.tiers import CheckedLane, FaultyTier

# Discard and move


STATES = ["blank", "at home", "prefetched", "announced", "under way", "not written"]


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("home", HOMES)
def test_what_is_discarded_takes_nothing_anywhere(home: Home, state: str) -> None:
    place = Place(lane=CheckedLane())
    if state == "not written":
        place.tier = FaultyTier("write", 1)
    cell = place.cell(home, None if state == "blank" else 1.0)
    if state == "prefetched":
        place.door.prefetch([cell])
    elif state == "announced":
        place.near.budget_bytes = 0
        place.door.prefetch([cell])
    elif state in ("under way", "not written"):
        place.fill(cell, 2.0)
    if state == "not written":
        place.door.flush()
    place.door.discard(cell)
    place.near.budget_bytes = None
    for _ in range(3):
        other = place.cell(home, 3.0)
        place.door.prefetch([other])
        assert place.look(other) == 3.0
        place.door.discard(other)
    place.near.trim()
    place.host.trim()
    assert (place.near.used_bytes, place.tier.used_bytes) == (0, 0)
    assert cell.is_blank


@pytest.mark.parametrize("start", HOMES)
@pytest.mark.parametrize("end", HOMES)
def test_a_move_keeps_the_values(start: Home, end: Home) -> None:
    place = Place(lane=CheckedLane())
    cell, blank = place.cell(start, 5.0), place.cell(start)
    place.door.move(cell, end)
    place.door.move(blank, end)
    assert (cell.home, blank.home, blank.is_blank) == (end, end, True)
    place.door.flush()
    assert place.read(cell) == 5.0
    assert place.look(cell) == 5.0
    place.fill(cell, 6.0)
    place.door.flush()
    place.near.trim()
    place.host.trim()
    assert place.near.used_bytes == (CELL_BYTES if end is Home.DEVICE else 0)
    assert place.tier.used_bytes == (CELL_BYTES if end is Home.NVME else 0)
    courier = place.door._courier
    assert isinstance(courier, DeviceCourier)
    parked = CELL_BYTES * len(courier._parked)  # free when others need it
    assert place.host.used_bytes - parked == (CELL_BYTES if end is Home.PINNED else 0)


def test_a_cell_moves_while_it_is_written() -> None:
    place = Place(lane=CheckedLane())
    for start in HOMES[1:]:
        for end in HOMES:
            cell = place.cell(start, 1.0)
            place.fill(cell, 2.0)
            place.door.move(cell, end)
            assert place.look(cell) == 2.0


# Reading beside it


@pytest.mark.parametrize("state", [state for state in STATES if state != "blank"])
@pytest.mark.parametrize("home", HOMES)
def test_reading_gives_a_copy_of_what_is_there(home: Home, state: str) -> None:
    place = Place(lane=CheckedLane())
    if state == "not written":
        place.tier = FaultyTier("write", 1)
    cell = place.cell(home, 1.0)
    expected = 2.0 if state in ("under way", "not written") else 1.0
    if state == "prefetched":
        place.door.prefetch([cell])
    elif state == "announced":
        place.near.budget_bytes = 0
        place.door.prefetch([cell])
    elif expected == 2.0:
        place.fill(cell, 2.0)
    if state == "not written":
        place.door.flush()
    copy = place.door.read(cell)["x"]
    assert value_of(copy) == expected
    copy.fill_(9.0)
    assert place.look(cell) == expected
    assert place.read(cell) == expected


def test_reading_in_the_middle_of_a_use_disturbs_nothing() -> None:
    place = Place()
    cell = place.cell(value=1.0)
    place.door.acquire(cell)
    near_of(cell).fill_(2.0)
    assert place.read(cell) == 2.0
    near_of(cell).fill_(3.0)
    place.door.release(cell, dirty=True)
    assert place.read(cell) == 3.0
    place.door.flush()
    assert place.read(cell) == 3.0


def test_what_was_prefetched_and_read_still_gives_way() -> None:
    place = Place(CELL_BYTES)
    cell, other = place.cell(value=1.0), place.cell(value=2.0)
    place.near.trim()
    place.near.peak_bytes = 0
    place.door.prefetch([cell])
    assert place.read(cell) == 1.0
    assert place.look(other) == 2.0
    assert place.near.peak_bytes == CELL_BYTES


def test_a_lease_stays_readable_after_later_writes() -> None:
    place = Place()
    cell = place.cell(value=1.0)
    first = place.door.lease(cell)
    place.fill(cell, 2.0)
    second = place.door.lease(cell)
    place.fill(cell, 3.0)
    place.door.flush()
    third = place.door.lease(cell)
    for lease, value in ((first, 1.0), (second, 2.0), (third, 3.0)):
        assert lease is not None
        target = torch.empty(CELL_BYTES, dtype=torch.uint8)
        lease.tier.get(lease.slot, target).wait()
        assert value_of(target.view(torch.float32)) == value
    assert place.tier.used_bytes == 3 * CELL_BYTES
    del lease, first, second, third
    assert place.tier.used_bytes == CELL_BYTES


def test_what_is_not_on_the_disk_has_no_lease() -> None:
    place = Place(tier=FaultyTier("full", 1))
    cell = place.cell()
    assert place.door.lease(cell) is None
    place.fill(cell, 1.0)
    assert place.door.lease(cell) is not None
    place.fill(cell, 2.0)
    assert place.door.lease(cell) is None, "what is there is not what it holds"


def test_traffic_is_counted_in_bytes() -> None:
    place = Place(lane=CheckedLane())
    cell = place.cell(Home.NVME, 1.0)
    place.look(cell)
    moved = place.traffic
    found = (moved.read_bytes, moved.written_bytes, moved.uploaded_bytes, moved.downloaded_bytes)
    assert found == (CELL_BYTES,) * 4
    assert moved.waits == 2


def test_a_cell_that_was_not_acquired_has_no_fields() -> None:
    cell: Cell = Place().cell(value=1.0)
    with pytest.raises(RuntimeError, match="not been acquired"):
        cell.window(0, 1)
