"""The one door: what is where at which time, and that nothing is lost on the way."""

import math
from typing import Any

import pytest

from asteria.errors import StoreCorruptError, StoreFullError
from asteria.store.cell import Home
from asteria.store.door import acquire_all
from tests.store.doors import CELL_BYTES, Place, near_of, value_of
from tests.support.tiers import CheckedLane, FaultyTier


def on_host() -> Place:
    return Place()


def on_device() -> Place:
    return Place(lane=CheckedLane())


def on_both() -> Place:
    return Place(unified=True)


over_ways = pytest.mark.parametrize(
    ("make", "home"),
    [
        (on_host, Home.NVME),
        (on_device, Home.PINNED),
        (on_device, Home.NVME),
        (on_both, Home.NVME),
    ],
    ids=["host-nvme", "device-pinned", "device-nvme", "unified-nvme"],
)


# Acquire and release


@over_ways
def test_values_come_back_and_take_no_memory_meanwhile(make: Any, home: Home) -> None:
    place = make()
    cells = [place.cell(home, value) for value in (1.0, 2.0, 3.0)]
    place.near.trim()
    assert place.near.used_bytes == 0
    assert all(cell.near is None for cell in cells)
    assert [place.look(cell) for cell in cells] == [1.0, 2.0, 3.0]


@over_ways
def test_a_new_cell_holds_zeros_and_costs_nothing(make: Any, home: Home) -> None:
    place = make()
    cell = place.cell(home)
    assert cell.is_blank
    assert place.read(cell) == 0.0
    assert place.look(cell) == 0.0
    assert cell.is_blank
    assert (place.tier.puts, place.tier.used_bytes, place.host.used_bytes) == (0, 0, 0)


@over_ways
def test_only_what_has_changed_is_written(make: Any, home: Home) -> None:
    place = make()
    cell = place.cell(home, 1.0)
    before = place.traffic.written_bytes + place.traffic.downloaded_bytes
    assert place.look(cell) == 1.0
    place.door.flush()
    assert place.traffic.written_bytes + place.traffic.downloaded_bytes == before
    place.fill(cell, 2.0)
    place.door.flush()
    assert place.traffic.written_bytes + place.traffic.downloaded_bytes > before
    assert place.look(cell) == 2.0


@over_ways
def test_writing_is_not_waited_for(make: Any, home: Home) -> None:
    place = make()
    cell = place.cell(home, 1.0)
    place.fill(cell, 2.0)
    assert cell.near is not None, "it is still under way"
    place.door.flush()
    assert cell.near is None


@over_ways
def test_what_is_under_way_can_be_had_again_at_once(make: Any, home: Home) -> None:
    place = make()
    cell = place.cell(home, 1.0)
    place.fill(cell, 2.0)
    assert place.look(cell) == 2.0
    place.fill(cell, 3.0)
    place.fill(cell, 4.0)
    place.door.flush()
    assert place.look(cell) == 4.0


@over_ways
def test_the_last_of_several_users_sends_it_home(make: Any, home: Home) -> None:
    place = make()
    cell = place.cell(home, 1.0)
    place.door.acquire(cell)
    place.door.acquire(cell)
    near_of(cell).fill_(5.0)
    place.door.release(cell, dirty=True)
    assert value_of(near_of(cell)) == 5.0
    place.door.release(cell, dirty=False)
    place.door.flush()
    assert place.look(cell) == 5.0


def test_a_cell_at_home_on_the_device_stays_there() -> None:
    place = Place(0)
    cell = place.cell(Home.DEVICE, 1.0)
    memory = cell.near
    assert place.look(cell) == 1.0
    assert cell.near is memory
    assert place.traffic.read_bytes == place.traffic.written_bytes == 0


def test_all_or_none_are_acquired() -> None:
    place = Place(tier=FaultyTier("read", 1))
    cells = [place.cell(value=1.0), place.cell(value=2.0), place.cell(value=3.0)]
    with pytest.raises(StoreCorruptError):
        acquire_all(place.door, cells)
    assert [cell.users for cell in cells] == [0, 0, 0]
    acquire_all(place.door, cells)
    assert [value_of(near_of(cell)) for cell in cells] == [1.0, 2.0, 3.0]


# Room


@over_ways
def test_windows_keep_within_the_budget(make: Any, home: Home) -> None:
    place = make()
    cells = [place.cell(home, float(value)) for value in range(8)]
    place.near.trim()
    place.near.budget_bytes = 3 * CELL_BYTES
    place.near.peak_bytes = 0
    for _ in range(3):
        place.door.prefetch(cells)
        for value, cell in enumerate(cells):
            place.door.acquire(cell)
            assert value_of(near_of(cell)) == value
            place.door.release(cell, dirty=value % 2 == 0)
    assert place.near.peak_bytes == 3 * CELL_BYTES


@over_ways
def test_what_a_step_needs_at_once_is_there_whatever_the_budget(make: Any, home: Home) -> None:
    place = make()
    cells = [place.cell(home, 1.0), place.cell(home, 2.0)]
    place.near.trim()
    place.near.budget_bytes = 0
    acquire_all(place.door, cells)
    assert [value_of(near_of(cell)) for cell in cells] == [1.0, 2.0]
    for cell in cells:
        place.door.release(cell, dirty=True)
    place.door.flush()
    assert place.near.used_bytes == 0


# Prefetch


@over_ways
def test_what_is_announced_is_brought_in_that_order_as_far_as_there_is_room(
    make: Any, home: Home
) -> None:
    place = make()
    cells = [place.cell(home, float(value)) for value in range(4)]
    place.near.budget_bytes = 2 * CELL_BYTES
    order = [cells[2], cells[0], cells[3], cells[1]]
    place.door.prefetch(order)
    assert [cell.near is not None for cell in order] == [True, True, False, False]
    assert place.look(cells[2]) == 2.0
    assert [cell.near is not None for cell in order] == [False, True, True, False]


def test_nobody_waits_for_what_is_prefetched() -> None:
    place = Place()
    cell = place.cell(value=1.0)
    place.door.prefetch([cell])
    assert math.isnan(value_of(near_of(cell))), "the read is under way"
    gets = place.tier.gets
    assert place.look(cell) == 1.0
    assert place.tier.gets == gets, "it is read once"


@over_ways
def test_prefetched_state_gives_way_to_what_is_needed_now(make: Any, home: Home) -> None:
    place = make()
    cells = [place.cell(home, float(value)) for value in range(4)]
    place.near.budget_bytes = 2 * CELL_BYTES
    place.door.prefetch(cells[:2])
    place.door.acquire(cells[2])
    assert cells[0].near is not None
    assert cells[1].near is None, "the one that is needed last has gone"
    assert place.near.used_bytes <= 2 * CELL_BYTES
    place.door.release(cells[2], dirty=False)
    assert cells[1].near is not None, "and comes back when there is room"
    assert [place.look(cell) for cell in cells] == [0.0, 1.0, 2.0, 3.0]


def test_a_new_announcement_replaces_the_one_before() -> None:
    place = Place(0)
    cells = [place.cell(value=1.0), place.cell(value=2.0)]
    place.door.prefetch(cells[:1])
    place.door.prefetch(cells[1:])
    place.near.budget_bytes = None
    place.door.prefetch(cells[1:])
    assert [cell.near is not None for cell in cells] == [False, True]


def test_a_failed_prefetch_is_told_by_the_acquire_only() -> None:
    place = Place(tier=FaultyTier("read", 0))
    cell = place.cell(value=1.0)
    place.door.prefetch([cell])
    with pytest.raises(StoreCorruptError):
        place.door.acquire(cell)
    assert cell.users == 0
    assert place.look(cell) == 1.0


def test_flush_brings_everything_home() -> None:
    place = Place()
    cells = [place.cell(value=float(value)) for value in range(3)]
    place.door.prefetch(cells[:2])
    place.fill(cells[2], 7.0)
    place.door.flush()
    assert all(cell.near is None for cell in cells)
    place.near.trim()
    assert place.near.used_bytes == 0
    assert place.look(cells[2]) == 7.0


# Faults


@over_ways
def test_a_failed_read_leaves_the_cell_as_it_was(make: Any, home: Home) -> None:
    if home is Home.PINNED:
        pytest.skip("nothing is read")
    place = make()
    place.tier = FaultyTier("read", 0)
    cell = place.cell(home, 1.0)
    place.near.trim()
    with pytest.raises(StoreCorruptError, match="gave back something else"):
        place.door.acquire(cell)
    place.near.trim()
    place.host.trim()
    assert (cell.users, cell.near, cell.far) == (0, None, None)
    assert (place.near.used_bytes, place.host.used_bytes) == (0, 0)
    assert place.look(cell) == 1.0


@pytest.mark.parametrize("fault", ["write", "full"])
@over_ways
def test_a_failed_write_keeps_the_state_in_memory_and_is_tried_again(
    make: Any, home: Home, fault: str
) -> None:
    if home is Home.PINNED:
        pytest.skip("nothing is written")
    place = make()
    # Where it cannot even begin, `flush` is another try.
    failures = 4 if fault == "full" and make is on_host else 2
    place.tier = FaultyTier(fault, 1, failures)
    cell = place.cell(home, 1.0)
    for value in (2.0, 3.0):
        place.fill(cell, value)
        place.door.flush()
        assert cell.near is not None
        assert place.read(cell) == value
    assert place.traffic.failed_writes == failures
    assert place.look(cell) == 3.0, "without a change it is written as well"
    place.door.flush()
    assert cell.near is None
    assert place.look(cell) == 3.0


def test_state_that_cannot_be_written_ends_in_one_clear_error() -> None:
    place = Place(2 * CELL_BYTES, tier=FaultyTier("full", 3, 100))
    cells = [place.cell(value=float(value)) for value in range(3)]
    for cell in cells[:2]:
        place.fill(cell, 8.0)
    with pytest.raises(StoreFullError, match=r"64 bytes .* 128 of 128 .* full disk") as raised:
        place.door.acquire(cells[2])
    assert isinstance(raised.value.__cause__, StoreFullError)
    assert cells[2].users == 0
    assert [place.read(cell) for cell in cells] == [8.0, 8.0, 2.0]


def test_a_disk_that_recovers_lets_everything_go_on() -> None:
    place = Place(2 * CELL_BYTES, tier=FaultyTier("full", 3, 2))
    cells = [place.cell(value=float(value)) for value in range(3)]
    for cell in cells[:2]:
        place.fill(cell, 8.0)
    assert place.look(cells[2]) == 2.0


def test_a_failure_that_is_over_does_not_count() -> None:
    place = Place(0, tier=FaultyTier("full", 1))
    cell, other = place.cell(), place.cell()
    place.fill(cell, 1.0)
    place.fill(cell, 2.0)
    place.fill(cell, 3.0)
    place.door.flush()
    assert cell.near is None
    assert place.look(other) == 0.0
