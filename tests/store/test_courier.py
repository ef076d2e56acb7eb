"""The way of one cell: what may be used when, and that no memory is left behind."""

import math

import pytest
import torch

from asteria.errors import StoreFullError
from asteria.store.cell import Cell, Home
from asteria.store.courier import DeviceCourier, HostCourier
from asteria.store.tier import Tier
from asteria.telemetry.counters import Traffic
from tests.store.doors import CELL_BYTES, Place, near_of, value_of
from tests.support.tiers import CheckedLane, CheckedTier, MisuseError


def brought(place: Place, cell: Cell) -> None:
    """Begin to bring a cell near, as the door does."""
    cell.occupy(torch.zeros(CELL_BYTES, dtype=torch.uint8))
    courier_of(place).fetch(cell)


def courier_of(place: Place) -> HostCourier | DeviceCourier:
    courier = place.door._courier
    assert isinstance(courier, HostCourier | DeviceCourier)
    return courier


def apart() -> Place:
    return Place(lane=CheckedLane())


def check(place: Place) -> None:
    assert place.lane is not None
    place.lane.check()


@pytest.mark.parametrize(
    ("place", "home"), [(Place(), Home.NVME), (apart(), Home.PINNED), (apart(), Home.NVME)]
)
def test_nothing_is_there_before_it_has_arrived(place: Place, home: Home) -> None:
    cell = place.cell(home, 1.0)
    brought(place, cell)
    assert value_of(near_of(cell)) != 1.0
    courier_of(place).arrive(cell)
    assert value_of(near_of(cell)) == 1.0
    courier_of(place).arrive(cell)


@pytest.mark.parametrize(
    ("place", "home"), [(Place(), Home.NVME), (apart(), Home.PINNED), (apart(), Home.NVME)]
)
def test_whoever_writes_to_what_is_under_way_is_found_out(place: Place, home: Home) -> None:
    cell = place.cell(home)
    place.fill(cell, 1.0)
    assert cell.near is not None
    cell.near.fill_(0)
    with pytest.raises(MisuseError) as raised:
        courier_of(place).sent(cell, wait=True)
    near_of(cell).fill_(1.0)  # the slot goes with the error, and looks again
    del raised


def test_sending_needs_polls_or_a_wait() -> None:
    place = apart()
    cell = place.cell()
    place.door.acquire(cell)
    near_of(cell).fill_(1.0)
    courier = courier_of(place)
    courier.send(cell)
    polls = 1
    while not courier.sent(cell, wait=False):
        polls += 1
    assert polls > 2, "the link and the disk take their time"
    assert cell.lease is not None
    assert (cell.moving, cell.writing, cell.far) == (None, None, None)


def test_an_upload_keeps_its_host_memory_until_the_device_has_it() -> None:
    place = apart()
    cells = [place.cell(value=1.0), place.cell(value=2.0)]
    place.host.trim()
    for cell in cells:
        brought(place, cell)
    for cell in cells:
        courier_of(place).arrive(cell)
    assert [cell.far for cell in cells] == [None, None]
    assert place.host.used_bytes == 2 * CELL_BYTES, "both are parked"
    for _ in range(4):
        assert place.look(place.cell(value=3.0)) == 3.0
        check(place)
    assert place.host.used_bytes <= 3 * CELL_BYTES


def test_host_memory_that_is_short_is_waited_for() -> None:
    place = Place(lane=CheckedLane(), host_bytes=CELL_BYTES)
    cells = [place.cell(value=float(value)) for value in range(4)]
    for _ in range(2):
        assert [place.look(cell) for cell in cells] == [0.0, 1.0, 2.0, 3.0]
        check(place)
    assert place.host.peak_bytes <= 2 * CELL_BYTES


def test_a_cell_that_leaves_host_memory_lets_its_upload_end() -> None:
    place = apart()
    other = place.cell(Home.NVME, 7.0)
    place.host.trim()
    cell = place.cell(Home.PINNED, 1.0)
    place.door.move(cell, Home.DEVICE)
    place.door.flush()
    assert place.look(other) == 7.0
    check(place)


def test_a_cell_at_home_in_host_memory_keeps_its_place_there() -> None:
    place = apart()
    cell = place.cell(Home.PINNED, 1.0)
    far = cell.far
    place.fill(cell, 2.0)
    place.door.flush()
    assert cell.far is far
    assert place.tier.puts == 0
    check(place)


def test_what_the_host_computes_with_goes_to_the_disk_without_a_copy() -> None:
    place = Place()
    cell = place.cell(value=1.0)
    place.fill(cell, 2.0)
    assert cell.writing is not None
    assert cell.near is not None
    assert cell.writing.slot._source is cell.near  # type: ignore[attr-defined]
    assert place.host.used_bytes == 0


def test_a_disk_is_opened_when_it_is_needed() -> None:
    def missing() -> Tier:
        raise StoreFullError("there is no such tier")

    courier = HostCourier(missing, Traffic())
    cell = Place().cell()
    cell.occupy(torch.zeros(CELL_BYTES, dtype=torch.uint8))
    with pytest.raises(StoreFullError, match="no such tier"):
        courier.send(cell)
    assert cell.writing is None


def test_the_stand_in_shows_what_is_read_too_early() -> None:
    """Else nothing of the above says anything."""
    source = torch.ones(4).view(torch.uint8)
    target = torch.zeros(16, dtype=torch.uint8)
    upload = CheckedLane().upload(source, target)
    assert math.isnan(float(target.view(torch.float32)[0]))
    upload.wait()
    assert value_of(target.view(torch.float32)) == 1.0
    tier = CheckedTier()
    slot = tier.put(source)
    read = tier.get(slot, target)
    assert math.isnan(float(target.view(torch.float32)[0]))
    read.wait()
    source.fill_(0)
    with pytest.raises(MisuseError):
        upload.synchronize()
