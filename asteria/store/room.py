"""How much of a disk a tier has, may have and can have."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Literal

from asteria.errors import StoreError, StoreFullError
from asteria.store.ballast import Ballast

__all__ = ["Claim", "Room"]

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_NO_ALLOCATION = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENODEV)


class Claim:
    """Bytes of a `Room` that belong to somebody; the room's lock guards it."""

    def __init__(self, nbytes: int, reserved_bytes: int) -> None:
        self.nbytes = nbytes
        """0 once it was given up."""
        self.reserved_bytes = reserved_bytes
        """How much of that came out of the reservation, and goes back to it."""
        self.unwritten_bytes = nbytes - reserved_bytes
        """What may not be missing in the free space yet."""
        self.after: frozenset[Claim] = frozenset()
        """Leaving claims whose room it counts on: its write waits until they are gone."""


class Room:
    """Counts bytes on the disk of ``folder`` against a budget, a reservation and the free space.

    A claim goes through `claim`, `begin` (its write starts), `written`, `leave` (nobody wants it
    now, and its room can be claimed) and `free` (it is off the disk). Only `claim` and `leave` are
    sure not to wait for the disk. Any thread; ``_changed`` guards the numbers.

    Nobody waits in a ring: a claim waits for older ones only.
    """

    def __init__(self, folder: Path, budget_bytes: int | None) -> None:
        """``folder`` exists and gets the file of the reservation; None: no budget but the disk.

        Raises:
            StoreError: the file cannot be made.
        """
        self.budget_bytes = budget_bytes
        self._folder = folder
        self._changed = threading.Condition()
        self._used_bytes = 0
        self._unwritten_bytes = 0
        self._leaving: set[Claim] = set()
        try:
            self._ballast = Ballast(folder / "ballast")
        except OSError as error:
            raise self.explain(error, "to make a reservation", 0) from error

    @property
    def used_bytes(self) -> int:
        """All claims that are not leaving."""
        return self._used_bytes

    @property
    def reserved_bytes(self) -> int:
        """What can be claimed and written without finding the disk full."""
        return self._ballast.held_bytes

    def reserve(self, nbytes: int) -> None:
        """Have at least ``nbytes`` reserved.

        Where the file system cannot allocate, only looks whether there is room now.

        Raises:
            StoreFullError: the budget or the disk does not have them; nothing has changed.
            StoreError: the disk does not do what is asked for another reason.
        """
        asked = f"to reserve {nbytes} bytes"
        with self._changed:
            self._await(frozenset(self._leaving))
            more_bytes = nbytes - self._ballast.held_bytes
            self._check(more_bytes, asked)
        try:
            self._ballast.grow(more_bytes)
        except OSError as error:
            if error.errno not in _NO_ALLOCATION:
                raise self.explain(error, asked, more_bytes) from error

    def claim(self, nbytes: int) -> Claim:
        """Take ``nbytes``, out of the reservation as far as it goes.

        Raises:
            StoreFullError: there is no room for the rest; nothing has changed.
        """
        with self._changed:
            more_bytes = nbytes - self._ballast.held_bytes
            scarce = self._lacks(more_bytes, leaving_bytes=0) is not None
            if scarce:
                self._check(more_bytes, f"to write {nbytes} bytes")
            claim = Claim(nbytes, self._ballast.take(nbytes))
            claim.after = frozenset(self._leaving if scarce else ())
            self._used_bytes += claim.nbytes
            self._unwritten_bytes += claim.unwritten_bytes
        return claim

    def begin(self, claim: Claim) -> None:
        """Make room for the write that comes now, or raise OSError. Waits for older claims."""
        if claim.after:
            with self._changed:
                self._await(claim.after)
                # What they gave back to the reservation is what this one counted on.
                missing_bytes = claim.nbytes - claim.reserved_bytes
                claim.reserved_bytes += self._ballast.take(missing_bytes)
            claim.after = frozenset()  # or each would keep all its ancestors
        self._ballast.release(claim.reserved_bytes)

    def written(self, claim: Claim) -> None:
        """The write has ended: the free space tells of it."""
        with self._changed:
            self._unwritten_bytes -= claim.unwritten_bytes
            claim.unwritten_bytes = 0

    def leave(self, claim: Claim) -> None:
        """What is claimed will be off the disk as soon as possible."""
        with self._changed:
            self._leaving.add(claim)
            self._used_bytes -= claim.nbytes

    def free(self, claim: Claim) -> None:
        """Give up a claim whose bytes are off the disk. Doing it twice changes nothing.

        What came out of the reservation goes back to it, unless others have filled the disk.
        """
        self.written(claim)
        with contextlib.suppress(OSError):  # then a later claim looks at the free space
            self._ballast.grow(claim.reserved_bytes)
        with self._changed:
            if claim not in self._leaving:
                self._used_bytes -= claim.nbytes
            claim.nbytes = claim.reserved_bytes = 0
            self._leaving.discard(claim)
            self._changed.notify_all()

    def stay(self, claim: Claim) -> None:
        """What is claimed cannot be removed from the disk; a claim that left comes back."""
        with self._changed:
            if claim in self._leaving:
                self._leaving.remove(claim)
                self._used_bytes += claim.nbytes
                self._changed.notify_all()

    def explain(self, error: OSError, asked: str, nbytes: int) -> StoreError:
        """What an error of the disk means for those who asked."""
        if error.errno in _NO_ROOM:
            return self._full(asked, nbytes)
        return StoreError(
            f"NVMe tier: asked {asked} in {self._folder}, found: {error}; "
            "check the disk, the folder and its permissions, or name another nvme_path"
        )

    def close(self) -> None:
        """End the reservation."""
        self._ballast.close()

    def _await(self, claims: frozenset[Claim]) -> None:
        """Wait until none of ``claims`` is leaving any more; with the lock held."""
        self._changed.wait_for(lambda: self._leaving.isdisjoint(claims))

    def _check(self, more_bytes: int, asked: str) -> None:
        """Refuse what there is no room for, reservation aside; with the lock held."""
        lacking = self._lacks(more_bytes, leaving_bytes=self._leaving_bytes())
        if lacking == "budget":
            raise StoreFullError(
                f"NVMe tier: asked {asked} in {self._folder}, found {self._used_bytes} bytes in "
                f"use and {self._ballast.held_bytes} reserved of a budget of {self.budget_bytes}; "
                "raise nvme_budget"
            )
        if lacking == "disk":
            raise self._full(asked, more_bytes)

    def _lacks(self, more_bytes: int, *, leaving_bytes: int) -> Literal["budget", "disk"] | None:
        """What is too small for ``more_bytes`` once ``leaving_bytes`` are gone."""
        if more_bytes <= 0:
            return None
        if self.budget_bytes is not None:
            taken_bytes = self._used_bytes + self._leaving_bytes() + self._ballast.held_bytes
            if taken_bytes - leaving_bytes + more_bytes > self.budget_bytes:
                return "budget"
        if self._free_bytes() + leaving_bytes - self._unwritten_bytes < more_bytes:
            return "disk"
        return None

    def _leaving_bytes(self) -> int:
        return sum(claim.nbytes for claim in self._leaving)

    def _full(self, asked: str, nbytes: int) -> StoreFullError:
        return StoreFullError(
            f"NVMe tier: asked {asked} in {self._folder}, found no room for {nbytes} of them: "
            f"{self._free_bytes()} bytes free on the disk, of which {self._unwritten_bytes} are "
            "about to be written; free disk space, name another nvme_path or lower nvme_budget"
        )

    def _free_bytes(self) -> int:
        try:
            disk = os.statvfs(self._folder)
        except OSError:
            return 0  # vanished: there is no room there
        return disk.f_bavail * disk.f_frsize
