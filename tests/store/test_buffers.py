"""Memory under a budget is counted to the byte."""

import gc
import mmap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from asteria.errors import StoreFullError
from asteria.store import buffers
from asteria.store.buffers import Buffers, device_memory, host_memory, pinned_memory


class Memory:
    """Where buffers come from; knows what was asked for."""

    def __init__(self) -> None:
        self.asked_bytes: list[int] = []

    def __call__(self, nbytes: int) -> Tensor:
        self.asked_bytes.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)


def test_what_is_taken_and_kept_counts_and_what_is_freed_does_not() -> None:
    stock = Buffers(Memory(), 100)
    small, large = stock.take(30), stock.take(50)
    assert (small.numel(), large.numel()) == (30, 50)
    assert (stock.used_bytes, stock.peak_bytes) == (80, 80)
    stock.give(large)
    assert stock.used_bytes == 80, "it is kept for the next request"
    stock.drop(small.numel())
    assert stock.used_bytes == 50
    stock.trim()
    assert (stock.used_bytes, stock.peak_bytes) == (0, 80)


def test_a_size_that_comes_again_takes_the_same_memory() -> None:
    memory = Memory()
    stock = Buffers(memory, 100)
    first = stock.take(40)
    stock.give(first)
    assert stock.take(40) is first
    assert memory.asked_bytes == [40]
    assert stock.take(40) is not first


def test_memory_that_is_kept_gives_way_to_another_size_oldest_first() -> None:
    memory = Memory()
    stock = Buffers(memory, 100)
    old, new = stock.take(30), stock.take(40)
    stock.give(old)
    stock.give(new)
    stock.take(50)
    assert stock.used_bytes == 90, "of the older one there is nothing left"
    assert stock.take(40) is new
    assert memory.asked_bytes == [30, 40, 50]
    assert stock.peak_bytes == 90


def test_room_is_what_the_budget_leaves_beside_what_is_in_use() -> None:
    stock = Buffers(Memory(), 100)
    used, kept = stock.take(60), stock.take(40)
    assert not stock.has_room(1)
    stock.give(kept)
    assert stock.has_room(40)
    assert not stock.has_room(41)
    stock.give(used)
    assert stock.has_room(100)
    assert Buffers(Memory()).has_room(10**15)


def test_a_step_gets_what_it_needs_beyond_the_budget_and_nothing_of_it_is_kept() -> None:
    stock = Buffers(Memory(), 10)
    buffer = stock.take(25)
    assert stock.used_bytes == 25
    stock.give(buffer)
    assert stock.used_bytes == 0
    assert stock.peak_bytes == 25


def test_a_lower_budget_holds_from_the_next_request_on() -> None:
    stock = Buffers(Memory(), 100)
    stock.give(stock.take(80))
    stock.budget_bytes = 50
    stock.take(10)
    assert stock.used_bytes == 10


def test_what_the_system_refuses_is_not_counted() -> None:
    def refuse(nbytes: int) -> Tensor:
        raise StoreFullError(f"{nbytes} bytes")

    stock = Buffers(refuse, 100)
    with pytest.raises(StoreFullError):
        stock.take(10)
    assert (stock.used_bytes, stock.peak_bytes) == (0, 0)


@pytest.mark.parametrize("nbytes", [0, 1, 4095, 1024**2, 1024**2 + 1])
@pytest.mark.parametrize(
    "allocate", [host_memory, pinned_memory, device_memory(torch.device("cpu"))]
)
def test_memory_is_plain_bytes_of_the_size_asked_for(
    allocate: Callable[[int], Tensor], nbytes: int
) -> None:
    memory = allocate(nbytes)
    assert (memory.shape, memory.dtype, memory.device.type) == ((nbytes,), torch.uint8, "cpu")
    memory.fill_(7)
    assert bool((memory == 7).all())


@pytest.mark.parametrize("nbytes", [1024**2, 2 * 1024**2, 5 * 1024**2 + 3])
def test_large_host_memory_is_a_mapping_of_its_own_that_huge_pages_fit(nbytes: int) -> None:
    memory = host_memory(nbytes)
    assert memory.data_ptr() % (2 * 1024**2) == 0
    assert memory.untyped_storage().nbytes() == nbytes


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="of Linux")
def test_huge_pages_are_asked_for_as_far_as_they_fill_the_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[int, ...]] = []

    class Recording(mmap.mmap):
        def madvise(self, *given: int) -> None:
            begin = torch.frombuffer(self, dtype=torch.uint8).data_ptr() + given[1]
            asked.append((given[0], begin, *given[2:]))

    monkeypatch.setattr(buffers, "_mapping", lambda nbytes: Recording(-1, nbytes))
    memory = host_memory(5 * 1024**2)
    host_memory(1024**2)  # which they do not fit
    assert asked == [(mmap.MADV_HUGEPAGE, memory.data_ptr(), 4 * 1024**2)]


def test_a_system_without_huge_pages_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    class Plain(mmap.mmap):
        def madvise(self, *_: int) -> None:
            raise OSError(22, "Invalid argument")

    monkeypatch.setattr(buffers, "_mapping", lambda nbytes: Plain(-1, nbytes))
    assert host_memory(2 * 1024**2).fill_(7).sum() == 7 * 2 * 1024**2


def test_a_host_without_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(nbytes: int) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(buffers, "_mapping", refuse)
    with pytest.raises(StoreFullError, match=r"2097152 bytes of host memory.*host_budget"):
        host_memory(2 * 1024**2)


def test_a_device_without_memory_says_what_to_change(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("out of memory")

    allocate = device_memory(torch.device("cpu"))
    monkeypatch.setattr(torch, "empty", refuse)
    with pytest.raises(StoreFullError, match=r"64 bytes .* on cpu.*device_budget"):
        allocate(64)


class Driver:
    """What the CUDA runtime does for pinned memory, and what it remembers."""

    def __init__(self) -> None:
        self.status = 0
        self.locked: dict[int, int] = {}
        self.latest_error = 0

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        self.latest_error = self.status
        if self.status == 0:
            self.locked[address] = nbytes
        return self.status

    def cudaHostUnregister(self, address: int) -> None:
        del self.locked[address]

    def launch(self, *_: object, **__: object) -> Tensor:
        """A kernel is launched, and the latest error is found."""
        error, self.latest_error = self.latest_error, 0
        if error:
            raise RuntimeError(f"CUDA error {error}")
        return torch.empty(1)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: driver)
    monkeypatch.setattr(torch, "zeros", driver.launch)
    return driver


def test_pinned_memory_is_locked_as_long_as_anybody_holds_it(driver: Driver) -> None:
    memory = pinned_memory(5000)
    assert driver.locked == {memory.data_ptr(): 5000}
    part = memory[:100]
    del memory
    gc.collect()
    assert len(driver.locked) == 1
    del part
    gc.collect()
    assert not driver.locked


def test_a_driver_that_locks_no_more_is_a_full_store_and_nothing_else(driver: Driver) -> None:
    """CUDA keeps its latest error, which would be found by whoever launches a kernel next."""
    driver.status = 2
    with pytest.raises(StoreFullError, match=r"5000 bytes of page-locked .*error 2"):
        pinned_memory(5000)
    driver.launch()
