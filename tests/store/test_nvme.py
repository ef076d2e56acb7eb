"""The tier on a disk: order, faults, room."""

import errno
import gc
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch

from asteria import StoreCorruptError, StoreError, StoreFullError
from asteria.store import array_files, room
from asteria.store.array_files import ArrayFiles, page_aligned
from asteria.store.nvme import NvmeTier
from asteria.store.tier import Bytes
from tests.store.places import PAGE, HeldTier, file_of, mounted, noise, read


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[NvmeTier]:
    with_files = NvmeTier(tmp_path, budget_bytes=None)
    yield with_files
    with_files.close()


@pytest.fixture
def held(tmp_path: Path) -> Iterator[HeldTier]:
    tier = HeldTier(tmp_path, budget_bytes=2 * PAGE)
    yield tier
    tier.let_go()
    tier.close()


class FailingFiles(ArrayFiles):
    """Files of a disk that fails in one way."""

    number = errno.EIO
    operations = ("write",)

    def _fail(self, operation: str) -> None:
        if operation in self.operations:
            raise OSError(self.number, os.strerror(self.number))

    def write(self, number: int, source: Bytes) -> None:
        super().write(number, source)
        self._fail("write")

    def read(self, number: int, target: Bytes) -> None:
        self._fail("read")
        super().read(number, target)

    def remove(self, number: int) -> None:
        self._fail("remove")
        super().remove(number)


def failing(tmp_path: Path, error: int, *operations: str) -> NvmeTier:
    class Files(FailingFiles):
        pass

    Files.number, Files.operations = error, operations

    class Tier(NvmeTier):
        def _open_files(self) -> ArrayFiles:
            return Files(self.path, 1)

    return Tier(tmp_path, budget_bytes=None)


# In which order.


def test_put_does_not_wait_for_the_disk_and_a_read_waits_for_its_write(held: HeldTier) -> None:
    slot = held.put(noise(PAGE))
    target = torch.zeros(PAGE, dtype=torch.uint8)
    transfer = held.get(slot, target)
    assert held.files.writing.wait(20)
    assert not slot.done
    assert not transfer.done
    assert not held.files.reading.is_set()
    held.let_go()
    transfer.wait()
    assert slot.done
    assert transfer.done
    assert torch.equal(target, noise(PAGE))


def test_what_is_dropped_in_the_middle_of_its_write_is_removed_after_it(held: HeldTier) -> None:
    slot = held.put(noise(PAGE))
    assert held.files.writing.wait(20)
    held.drop(slot)
    assert held.used_bytes == 0
    held.let_go()
    slot.wait()
    held.reserve(2 * PAGE)  # waits for what is leaving
    assert not file_of(held, slot).exists()


def test_what_is_dropped_in_the_middle_of_a_read_is_removed_after_it(held: HeldTier) -> None:
    held.files.may_write.set()
    slot = held.put(noise(PAGE))
    target = torch.zeros(PAGE, dtype=torch.uint8)
    transfer = held.get(slot, target)
    assert held.files.reading.wait(20)
    held.drop(slot)
    assert file_of(held, slot).exists()
    held.let_go()
    transfer.wait()
    assert torch.equal(target, noise(PAGE))
    held.reserve(2 * PAGE)
    assert not file_of(held, slot).exists()


def test_a_write_that_needs_the_room_of_a_dropped_slot_comes_after_it(held: HeldTier) -> None:
    held.files.may_write.set()
    first, second = held.put(noise(PAGE)), held.put(noise(PAGE, 1))
    transfer = held.get(first, torch.zeros(PAGE, dtype=torch.uint8))
    assert held.files.reading.wait(20)
    held.drop(first)
    third = held.put(noise(PAGE, 2))
    second.wait()
    assert len(list(held.path.glob("[0-9]"))) == 2
    assert not third.done
    held.let_go()
    transfer.wait()
    assert torch.equal(read(held, third), noise(PAGE, 2))
    assert len(list(held.path.glob("[0-9]"))) == 2


def test_closing_waits_for_what_is_under_way(held: HeldTier) -> None:
    slot = held.put(noise(PAGE))
    closing = threading.Thread(target=held.close)
    closing.start()
    held.let_go()
    closing.join()
    slot.wait()
    assert not held.path.exists()


# What comes back is what was written, or an error.


def flip(file: Path) -> None:
    with file.open("r+b") as content:
        byte = content.read(1)[0]
        content.seek(0)
        content.write(bytes([byte ^ 4]))


def zero(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "a flipped bit": flip,
    "zeros": zero,
    "a page less": lambda file: os.truncate(file, file.stat().st_size - PAGE),
    "an end in the middle of a page": lambda file: os.truncate(file, 100),
    "nothing": lambda file: os.truncate(file, 0),
    "a page more": lambda file: os.truncate(file, file.stat().st_size + PAGE),
    "no file": Path.unlink,
    "no folder": lambda file: shutil.rmtree(file.parent),
    "a folder in its place": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize("nbytes", [1, 3 * PAGE, 3 * PAGE + 5])
def test_damage_is_found(tier: NvmeTier, damage: Callable[[Path], object], nbytes: int) -> None:
    slot = tier.put(noise(nbytes))
    slot.wait()
    file = file_of(tier, slot)
    damage(file)
    transfer = tier.get(slot, torch.zeros(nbytes, dtype=torch.uint8))
    for _ in range(2):
        with pytest.raises(StoreCorruptError, match=f"{file}.*found: .*checkpoint"):
            transfer.wait()


def test_the_file_of_another_slot_is_damage(tier: NvmeTier) -> None:
    mine, other = tier.put(noise(PAGE)), tier.put(noise(PAGE, 1))
    mine.wait()
    other.wait()
    shutil.copyfile(file_of(tier, other), file_of(tier, mine))
    with pytest.raises(StoreCorruptError, match="checksum"):
        read(tier, mine)


@pytest.mark.parametrize("aligned", [True, False])
def test_a_vanished_folder_is_not_made_again(tier: NvmeTier, aligned: bool) -> None:
    tier.put(noise(PAGE)).wait()
    shutil.rmtree(tier.path)
    source = page_aligned(PAGE + 1)[:PAGE] if aligned else noise(PAGE + 1)[1:]
    with pytest.raises(StoreError, match=f"{tier.path}"):
        tier.put(source).wait()
    assert not tier.path.exists()


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.EIO])
def test_a_failed_write_loses_nothing(tmp_path: Path, error: int) -> None:
    tier = failing(tmp_path, error, "write")
    slot = tier.put(noise(PAGE))
    for _ in range(2):
        with pytest.raises(StoreError, match=rf"{tier.path}.*{os.strerror(error)}.*nvme_path"):
            slot.wait()
    with pytest.raises(StoreError, match="to write"):
        tier.get(slot, noise(PAGE)).wait()
    assert tier.used_bytes == 0
    assert not file_of(tier, slot).exists()
    tier.drop(slot)
    assert tier.used_bytes == 0
    tier.close()


def test_a_read_that_the_system_refuses_is_no_damage(tmp_path: Path) -> None:
    tier = failing(tmp_path, errno.EMFILE, "read")
    slot = tier.put(noise(PAGE))
    with pytest.raises(StoreError, match="open files") as caught:
        read(tier, slot)
    assert type(caught.value) is StoreError
    tier.close()


def test_a_file_that_stays_goes_on_to_count(tmp_path: Path) -> None:
    tier = failing(tmp_path, errno.EROFS, "remove")
    slot = tier.put(noise(PAGE))
    slot.wait()
    tier.drop(slot)
    tier.reserve(PAGE)  # waits for the removal
    assert tier.used_bytes == PAGE
    tier.close()


def test_where_direct_io_is_not_possible_tensorstore_writes(
    tier: NvmeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = page_aligned(3 * PAGE + 5).copy_(noise(3 * PAGE + 5))
    direct = tier.put(source)
    assert torch.equal(read(tier, direct), source)
    monkeypatch.setattr(array_files, "_write_directly", lambda path, source: False)
    buffered = tier.put(source)
    assert torch.equal(read(tier, buffered), source)
    assert file_of(tier, direct).read_bytes() == file_of(tier, buffered).read_bytes()


# Room.


def test_a_full_disk(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 64 << 20) as disk:
        tier = NvmeTier(disk, budget_bytes=None)
        slots = [tier.put(noise(16 << 20, seed)) for seed in range(3)]
        with pytest.raises(StoreFullError, match=r"found no room for 20971520 .*nvme_path"):
            tier.put(noise(20 << 20))
        tier.reserve(8 << 20)
        with pytest.raises(StoreFullError, match="asked to reserve 41943040 bytes"):
            tier.reserve(40 << 20)
        assert tier.reserved_bytes == 8 << 20
        for seed, slot in enumerate(slots):
            assert torch.equal(read(tier, slot), noise(16 << 20, seed))
        tier.close()
        assert not list(disk.iterdir())


def test_a_disk_that_others_fill(tmp_path: Path) -> None:
    with mounted(tmp_path / "disk", 16 << 20) as disk:
        tier = NvmeTier(disk, budget_bytes=None)
        tier.put(noise(PAGE)).wait()
        tier.reserve(8 << 20)
        other = disk / "other"
        with pytest.raises(OSError, match="No space"):
            other.write_bytes(bytes(16 << 20))
        slots = [tier.put(noise(2 << 20, seed)) for seed in range(4)]
        for seed, slot in enumerate(slots):
            assert torch.equal(read(tier, slot), noise(2 << 20, seed))
        assert tier.reserved_bytes == 0
        with pytest.raises(StoreFullError):
            tier.put(noise(1 << 20))
        # What is dropped is reserved again, and can be claimed before it is gone.
        for turn in range(8):
            tier.drop(slots.pop(0))
            slots.append(tier.put(noise(2 << 20, 10 + turn)))
        for turn, slot in enumerate(slots):
            assert torch.equal(read(tier, slot), noise(2 << 20, 14 + turn))
        tier.close()


def test_a_disk_that_fills_during_a_write(tmp_path: Path) -> None:
    tier = failing(tmp_path, errno.ENOSPC, "write")
    tier.reserve(3 * PAGE)
    with pytest.raises(StoreFullError, match="bytes free on the disk"):
        tier.put(noise(PAGE)).wait()
    assert tier.used_bytes == 0
    assert tier.reserved_bytes == 3 * PAGE
    tier.close()


def test_a_reservation_is_taken_and_given_back(tier: NvmeTier) -> None:
    ballast = tier.path / "ballast"
    tier.reserve(5 * PAGE - 3)
    tier.reserve(PAGE)
    assert tier.reserved_bytes == 5 * PAGE
    assert ballast.stat().st_blocks * 512 == 5 * PAGE
    slot = tier.put(noise(PAGE + 1))
    slot.wait()
    assert (tier.reserved_bytes, ballast.stat().st_size) == (3 * PAGE, 3 * PAGE)
    large = tier.put(noise(4 * PAGE))
    large.wait()
    assert (tier.reserved_bytes, ballast.stat().st_size) == (0, 0)
    for dropped in (slot, large):
        tier.drop(dropped)
    tier.reserve(5 * PAGE)
    assert tier.reserved_bytes == 5 * PAGE, "and not what came from the free disk"
    assert ballast.stat().st_size == 5 * PAGE


def test_a_reservation_counts_what_was_given_up_as_free(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, budget_bytes=4 * PAGE)
    slot = tier.put(noise(3 * PAGE))
    slot.wait()
    tier.give_up(slot)
    tier.reserve(4 * PAGE)
    assert tier.reserved_bytes == 4 * PAGE
    tier.close()


def test_a_reservation_counts_in_the_budget(tmp_path: Path) -> None:
    tier = NvmeTier(tmp_path, budget_bytes=4 * PAGE)
    slot = tier.put(noise(PAGE))
    with pytest.raises(StoreFullError, match="raise nvme_budget"):
        tier.reserve(4 * PAGE)
    tier.reserve(3 * PAGE)
    slots = [tier.put(noise(PAGE)) for _ in range(3)]
    with pytest.raises(StoreFullError, match="raise nvme_budget"):
        tier.put(noise(1))
    assert torch.equal(read(tier, slot), noise(PAGE))
    assert all(torch.equal(read(tier, slot), noise(PAGE)) for slot in slots)
    tier.close()


def test_where_the_file_system_cannot_allocate_reserving_looks(
    tier: NvmeTier, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unsupported(file: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    tier.reserve(PAGE)
    assert tier.reserved_bytes == 0
    with pytest.raises(StoreFullError):
        tier.reserve(1 << 60)
    assert torch.equal(read(tier, tier.put(noise(PAGE))), noise(PAGE))


def test_a_disk_without_room_for_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(room, "Ballast", full)
    with pytest.raises(StoreFullError, match="nvme_path"):
        NvmeTier(tmp_path, budget_bytes=None)
    assert not list(tmp_path.iterdir())


# What stays flat.


def test_threads_descriptors_and_memory_stay_flat(tier: NvmeTier) -> None:
    process = psutil.Process()
    source, target = page_aligned(1 << 18), page_aligned(1 << 18).zero_()
    source.copy_(noise(1 << 18))

    def rounds(count: int) -> tuple[int, int, int]:
        for _ in range(count):
            slot = tier.put(source)
            tier.get(slot, target).wait()
            tier.drop(slot)
        tier.reserve(0)
        gc.collect()
        return threading.active_count(), process.num_fds(), process.memory_info().rss

    before = rounds(200)
    threads = process.num_threads()
    after = rounds(1000)
    assert after[1] == before[1]
    assert after[0] <= before[0] + 8, "those of the tier start as they are needed"
    assert process.num_threads() < threads + 8, "TensorStore's own come as they are needed"
    assert after[2] - before[2] < 4 << 20
    assert sorted(file.name for file in tier.path.iterdir()) == ["asteria.lock", "ballast"]
