"""Disk space that is taken before it is needed."""

import os
import threading
from pathlib import Path

__all__ = ["Ballast"]


class Ballast:
    """A file whose only content is its size: shrunk where something else is written instead.

    The file system allocates its blocks (``posix_fallocate``), so nobody else gets them. Space
    goes through three states: *held* is promised and free to be taken, *taken* is given to
    somebody who has not written yet and still lies in the file, and what is *released* is the
    disk's again. `take` only counts, so that it never waits for the disk.

    Between a release and the write another process may be faster; a write can therefore fail, but
    no longer because of this process. File systems that write copies instead of in place (btrfs,
    ZFS) allocate, but do not promise; so do those over a network. Where allocation is not
    supported, nothing is held.

    Any thread. ``_counting`` guards the numbers, ``_resizing`` the file and, with it, ``_size``.
    """

    def __init__(self, path: Path) -> None:
        """Make the empty file, or raise OSError."""
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        self._counting = threading.Lock()
        self._resizing = threading.Lock()
        self._size_bytes = 0
        self._held_bytes = 0

    @property
    def held_bytes(self) -> int:
        """What can be taken."""
        return self._held_bytes

    def grow(self, nbytes: int) -> None:
        """Hold so many bytes more; may wait for the disk.

        Raises:
            OSError: the disk does not have them, or cannot allocate; nothing has changed.
        """
        if nbytes <= 0:
            return
        with self._resizing:
            try:
                os.posix_fallocate(self._file, self._size_bytes, nbytes)
            except OSError:
                # It may have got a part of the way.
                os.ftruncate(self._file, self._size_bytes)
                raise
            self._size_bytes += nbytes
        with self._counting:
            self._held_bytes += nbytes

    def take(self, nbytes: int) -> int:
        """How much of ``nbytes`` is held, now the caller's: to be released when it writes."""
        with self._counting:
            taken = min(nbytes, self._held_bytes)
            self._held_bytes -= taken
        return taken

    def release(self, taken_bytes: int) -> None:
        """Give back to the disk what was taken; may wait for it.

        Raises:
            OSError: the file cannot be made smaller.
        """
        if taken_bytes:
            with self._resizing:
                os.ftruncate(self._file, self._size_bytes - taken_bytes)
                self._size_bytes -= taken_bytes

    def close(self) -> None:
        """Close the file. The space is the disk's again when it is removed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
