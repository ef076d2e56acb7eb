"""The tier on a local disk."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeGuard

from torch import Tensor

from asteria.errors import StoreCorruptError, StoreError
from asteria.store.array_files import ArrayFiles, padded_bytes
from asteria.store.checksum import checksum
from asteria.store.folder import RunFolder
from asteria.store.room import Claim, Room
from asteria.store.tier import Bytes, Slot, as_bytes

__all__ = ["NvmeSlot", "NvmeTier"]

_DEPTH = 4
"""Files written, and files read, at a time; more made no measured disk faster."""
_SPOILT = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO)
"""Errors of a read that say that the file is not what was written."""


class _Move:
    """A worker's task, as a transfer. Any thread."""

    _task: Future[None]

    def start(self, workers: ThreadPoolExecutor, work: Callable[..., None], *given: Any) -> None:
        """Called once, by the tier."""
        self._task = workers.submit(work, *given)

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._task.done()

    def wait(self) -> None:
        """Return when it is complete, or raise StoreError."""
        self._task.result()


class NvmeSlot(_Move):
    """A file of the tier that made it, and what it must contain."""

    def __init__(self, folder: Path, number: int, nbytes: int, claim: Claim) -> None:
        self.folder = folder
        self.number = number
        self.nbytes = nbytes
        self.claim = claim
        self.digest = b""
        """Of its content; there once it is written."""
        # The tier's lock guards the rest.
        self.users = 1
        """The write, and reads that have not ended."""
        self.dropped = False


class NvmeTier:
    """Slots as files in a folder of this process, moved by a few threads of its own.

    Room is found before it is needed: `reserve` takes disk space with a file of no content, which
    shrinks before a slot is written and grows when one is dropped. Beyond the reservation `put`
    looks at the free space of the disk, less what is still to be written.

    Whatever is read is checked against a checksum of the source. Files are written once, under
    numbers that do not come again. Sources and targets in page-aligned memory move fastest.

    Any thread. A forked child can drop and close, without effect, and nothing else.
    """

    def __init__(
        self, path: str | os.PathLike[str], *, budget_bytes: int | None, label: str = "rank0"
    ) -> None:
        """The folder is made in ``path``, which is made if missing; ``label`` names it.

        Raises:
            ConfigError: ``path`` is not a folder that can be written to.
            StoreError: the disk refuses a file there.
        """
        self.name = "nvme"
        self._folder = RunFolder(path, label)
        self._room = Room(self._folder.path, budget_bytes)
        self._files = self._open_files()
        self._pid = os.getpid()
        self._numbers = itertools.count()
        # Apart, so that reads do not queue behind writes. A read waits for the write of its slot;
        # no write ever waits for a read.
        self._writers = ThreadPoolExecutor(_DEPTH, "asteria nvme write")
        self._readers = ThreadPoolExecutor(_DEPTH, "asteria nvme read")
        # A file system that discards takes as long to remove a file as to write it.
        self._remover = ThreadPoolExecutor(1, "asteria nvme remove")
        self._lock = threading.Lock()
        """Guards what follows, and the users of slots. Nobody waits for the disk with it."""
        self._closed = False
        self._given_up: deque[Slot] = deque()

    @property
    def path(self) -> Path:
        """The folder of this tier, absolute."""
        return self._folder.path

    @property
    def used_bytes(self) -> int:
        """Files in whole pages, written or about to be; without what is only reserved."""
        self._drop_given_up()
        return self._room.used_bytes

    @property
    def budget_bytes(self) -> int | None:
        """The most that slots and reservation may take; None: what the disk has."""
        return self._room.budget_bytes

    @property
    def reserved_bytes(self) -> int:
        """What can be put without finding the disk full."""
        return self._room.reserved_bytes

    def reserve(self, nbytes: int) -> None:
        """Make sure that slots of ``nbytes`` in all, each in whole pages, can be put later.

        `put` takes from the reservation and `drop` gives back to it. Waits for the disk. Where the
        file system cannot allocate, only looks whether there is room now.

        Raises:
            StoreFullError: the budget or the disk does not have them; nothing has changed.
            StoreError: the disk refuses for another reason, or the tier is closed.
        """
        self._drop_given_up()
        with self._usable():
            pass
        self._room.reserve(padded_bytes(nbytes))

    def put(self, source: Tensor) -> NvmeSlot:
        """Start to write ``source``; see `Tier.put`. Never waits for the disk."""
        data = as_bytes(source)
        self._drop_given_up()
        with self._usable():
            claim = self._room.claim(padded_bytes(len(data)))
            slot = NvmeSlot(self.path, next(self._numbers), len(data), claim)
            slot.start(self._writers, self._write, slot, data)
        return slot

    def get(self, slot: Slot, target: Tensor) -> _Move:
        """Start to read ``slot`` into ``target``; see `Tier.get`."""
        data, transfer = as_bytes(target, slot.nbytes), _Move()
        with self._usable():
            if not self._holds(slot) or slot.dropped:
                raise StoreError(
                    f"asked to read a slot of {slot.nbytes} bytes from {self.path}, found that it "
                    "was dropped or is of another tier: keep slots until their last read began"
                )
            slot.users += 1
            transfer.start(self._readers, self._read, slot, data)
        return transfer

    def drop(self, slot: Slot) -> None:
        """Forget ``slot``; its file goes when what is under way with it has ended.

        Its room can be used at once: a write that needs it waits until the file is gone.
        """
        if self._pid != os.getpid() or not self._holds(slot):
            return
        with self._lock:
            if slot.dropped or self._closed:
                return
            slot.dropped = True
            self._room.leave(slot.claim)
            if not slot.users:
                self._remover.submit(self._discard, slot)

    def give_up(self, slot: Slot) -> None:
        """Drop ``slot`` with the next put; takes no lock."""
        self._given_up.append(slot)

    def _drop_given_up(self) -> None:
        while self._given_up:
            with contextlib.suppress(IndexError):  # another thread took it
                self.drop(self._given_up.popleft())

    def close(self) -> None:
        """Wait for what is under way and remove the folder; does nothing in a forked child."""
        if self._pid != os.getpid():
            return
        with self._lock:
            self._closed = True
        self._writers.shutdown()
        self._readers.shutdown()
        self._remover.shutdown(cancel_futures=True)  # the folder goes as a whole
        self._room.close()
        self._folder.remove()

    def _open_files(self) -> ArrayFiles:
        """What reads and writes; tests put one there that fails."""
        return ArrayFiles(self.path, _DEPTH)

    @contextlib.contextmanager
    def _usable(self) -> Iterator[None]:
        """With the lock held, and only if there are workers to do what is asked."""
        if self._pid != os.getpid():
            raise StoreError(
                f"{self.path} belongs to process {self._pid}, of which this one is a fork: "
                "open a tier in each process"
            )
        with self._lock:
            if self._closed:
                raise StoreError(f"{self.path} is closed: nothing can be moved there any more")
            yield

    def _holds(self, slot: Slot) -> TypeGuard[NvmeSlot]:
        return isinstance(slot, NvmeSlot) and slot.folder == self.path

    def _write(self, slot: NvmeSlot, data: Bytes) -> None:
        """Body of a writer's task."""
        try:
            slot.digest = checksum(data)
            self._room.begin(slot.claim)
            if slot.nbytes:
                self._write_twice(slot, data)
            self._room.written(slot.claim)
        except OSError as error:
            failure = self._room.explain(error, f"to write {slot.nbytes} bytes", slot.claim.nbytes)
            self._discard(slot)
            raise failure from error
        finally:
            self._leave(slot)

    def _read(self, slot: NvmeSlot, data: Bytes) -> None:
        """Body of a reader's task."""
        try:
            slot.wait()
            if not self._matches(slot, data):
                raise self._spoilt(slot, "other bytes than were written: the checksum differs")
        except OSError as error:
            if error.errno in _SPOILT:
                raise self._spoilt(slot, str(error)) from error
            raise self._room.explain(error, f"to read slot {slot.number}", 0) from error
        finally:
            self._leave(slot)

    def _write_twice(self, slot: NvmeSlot, data: Bytes) -> None:
        """A fault that passes is not worth the state that it would lock into memory."""
        try:
            self._files.write(slot.number, data)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise
            self._files.remove(slot.number)
            self._files.write(slot.number, data)

    def _matches(self, slot: NvmeSlot, data: Bytes) -> bool:
        """Whether the second try at the latest brings what was written.

        A fork in the middle of a direct read, by a data loader say, may lead a part of it astray.
        """
        try:
            if slot.nbytes:
                self._files.read(slot.number, data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
        else:
            if checksum(data) == slot.digest:
                return True
        if slot.nbytes:
            self._files.read(slot.number, data)
        return checksum(data) == slot.digest

    def _leave(self, slot: NvmeSlot) -> None:
        """A write or read has ended; the last one takes a dropped slot's file away."""
        with self._lock:
            slot.users -= 1
            last = slot.dropped and not slot.users
        if last:
            self._discard(slot)

    def _discard(self, slot: NvmeSlot) -> None:
        """Remove the file and give up its room; a file that stays goes on to count."""
        try:
            self._files.remove(slot.number)
        except OSError:
            self._room.stay(slot.claim)
        else:
            self._room.free(slot.claim)

    def _spoilt(self, slot: NvmeSlot, found: str) -> StoreCorruptError:
        return StoreCorruptError(
            f"asked to read {slot.nbytes} bytes from {self._files.path(slot.number)}, "
            f"found: {found}. What was there is lost: check the disk, and that no other program "
            "changes this folder, then resume from the last checkpoint"
        )
