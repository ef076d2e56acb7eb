"""An accelerator that computes in host memory: the disk has its turn when the device is done."""

import gc

import pytest
import torch
from torch import Tensor

from asteria.errors import StoreError
from asteria.store import unified
from asteria.store.buffers import Buffers, host_memory
from asteria.store.cell import Home
from asteria.store.unified import UnifiedCourier, host_face, shared_way
from asteria.telemetry.counters import Traffic
from tests.store.doors import CELL_BYTES, Place, near_of, value_of
from tests.support.tiers import CheckedLane, CheckedMark, FaultyTier


def courier_of(place: Place) -> UnifiedCourier:
    courier = place.door._courier
    assert isinstance(courier, UnifiedCourier)
    return courier


def test_nothing_is_copied_but_from_and_to_the_disk() -> None:
    place = Place(unified=True)
    cell = place.cell(Home.NVME, 1.0)
    place.fill(cell, 2.0)
    place.door.flush()
    assert place.look(cell) == 2.0
    assert (place.traffic.uploaded_bytes, place.traffic.downloaded_bytes) == (0, 0)
    assert place.traffic.read_bytes == 2 * CELL_BYTES
    assert place.host.used_bytes == 0


def test_the_disk_waits_for_what_the_device_had_there_before() -> None:
    place = Place(unified=True)
    cell = place.cell(Home.NVME, 1.0)
    gets = place.tier.gets
    cell.occupy(torch.zeros(CELL_BYTES, dtype=torch.uint8))
    courier = courier_of(place)
    courier.fetch(cell)
    courier.proceed(cell)
    assert place.tier.gets == gets
    assert isinstance(cell.moving, CheckedMark)
    assert not cell.moving.passed
    courier.proceed(cell)
    assert place.tier.gets == gets + 1
    courier.proceed(cell)
    assert place.tier.gets == gets + 1, "once"
    courier.arrive(cell)
    assert value_of(near_of(cell)) == 1.0


def test_the_disk_is_given_what_the_device_has_computed() -> None:
    place = Place(unified=True)
    cell = place.cell(Home.NVME, 1.0)
    puts = place.tier.puts
    place.fill(cell, 2.0)
    assert place.tier.puts == puts, "the device may not have come to it"
    polls = 0
    while place.tier.puts == puts:
        place.door.tidy()
        polls += 1
    assert polls > 0
    place.door.flush()
    assert place.read(cell) == 2.0


@pytest.mark.parametrize("fault", ["full", "write"])
def test_what_cannot_be_written_stays(fault: str) -> None:
    place = Place(unified=True, tier=FaultyTier(fault, 1))
    cell = place.cell(Home.NVME, 1.0)
    place.fill(cell, 2.0)
    place.door.flush()
    assert isinstance(place.door.failure, StoreError)
    assert place.read(cell) == 2.0
    place.door.flush()
    assert place.look(cell) == 2.0


def test_without_a_disk_the_memory_is_the_devices_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(device: torch.device) -> CheckedLane:
        raise AssertionError("nothing has to be ordered")

    buffers, courier = shared_way(torch.device("cpu"), refuse, None, Traffic())
    assert buffers.take(100).numel() == 100
    assert isinstance(courier, UnifiedCourier)


class Asked:
    """Stands for torch where it takes memory that CUDA can address."""

    def __init__(self) -> None:
        self.given: list[object] = []
        self.waits = 0

    def as_tensor(self, made: object, device: torch.device) -> Tensor:
        self.given.append(made)
        described = made.__cuda_array_interface__  # type: ignore[attr-defined]
        assert described["typestr"] == "|u1"
        (nbytes,) = described["shape"]
        return host_face(torch.as_tensor([]).new_empty(0)) if not nbytes else made._host  # type: ignore[attr-defined]

    def synchronize(self, device: torch.device) -> None:
        self.waits += 1


def test_memory_for_both_ends_after_the_device_has(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = Asked()
    monkeypatch.setattr(unified, "pinned_memory", host_memory)
    monkeypatch.setattr(torch, "as_tensor", asked.as_tensor)
    monkeypatch.setattr(torch.accelerator, "synchronize", asked.synchronize)
    buffers = Buffers(unified.unified_memory(torch.device("cpu")))
    memory = buffers.take(5000)
    assert buffers.used_bytes == memory.numel() == 5000
    face = host_face(memory)
    face.fill_(7)
    assert bool((memory == 7).all()), "the same bytes"
    assert face.data_ptr() == memory.data_ptr()
    assert asked.waits == 0
    asked.given.clear()
    gc.collect()
    assert asked.waits == 1
    assert buffers.take(0).numel() == 0
