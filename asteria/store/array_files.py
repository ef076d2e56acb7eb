"""Slots as chunks of TensorStore arrays, one file each."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import tensorstore as ts
import torch
from torch import Tensor

from asteria.store.tier import Bytes

__all__ = ["ArrayFiles", "padded_bytes", "page_aligned"]

_PAGE_BYTES = 4096
"""What direct I/O wants sizes and offsets to be a multiple of."""
_FARTHEST = 2**60
"""Elements of an array, of which only the chunks that are written take space."""
_OS_ERROR = re.compile(r"os_error_code='(\d+)'")


def padded_bytes(nbytes: int) -> int:
    """What ``nbytes`` take as a file."""
    return -(-nbytes // _PAGE_BYTES) * _PAGE_BYTES


def page_aligned(nbytes: int) -> Tensor:
    """Host memory, (nbytes,) uint8 without content, from which files are written directly."""
    block = torch.empty(nbytes + _PAGE_BYTES, dtype=torch.uint8)
    start = -block.data_ptr() % _PAGE_BYTES
    return block[start : start + nbytes]


class ArrayFiles:
    """Files in a folder, each a chunk of a zarr 3 array that has slots of one size as chunks.

    TensorStore's file store writes through the page cache, at 0.5 to 0.7 of the rate of the disk
    where that was measured, and reads into memory of its own, from which it copies. So chunks are
    moved directly, past the page cache, where the memory of source or target is aligned for it, as
    mapped and page-locked memory is, and by TensorStore otherwise. The arrays are described here,
    and not in files beside them: a disk may be too full for those.

    All methods wait for the disk, and raise OSError with the number of the cause. Any thread.
    """

    def __init__(self, folder: Path, threads: int) -> None:
        """``folder`` exists; ``threads`` is how many files are read at a time."""
        self._folder = folder
        self._context = _context(threads)

    def path(self, number: int) -> Path:
        """The file of slot ``number``."""
        return self._folder / str(number)

    def write(self, number: int, source: Bytes) -> None:
        """Write ``source``, (n,) with n > 0, to a file that does not exist."""
        path = self.path(number)
        if not _write_directly(path, source):
            os.stat(self._folder)  # if it vanished, TensorStore would make it again
            region = self._region(number, len(source))
            _outcome(region.write(source, can_reference_source_data_indefinitely=True).commit)
            _settle(path)

    def read(self, number: int, target: Bytes) -> None:
        """Read the file into ``target``, (n,) with n > 0; a wrong size is an error (EIO)."""
        if _read_directly(self.path(number), target):
            return
        # TensorStore moves from one array to another; this one is the memory of `target`.
        memory = ts.array(target, context=self._context, copy=False)
        _outcome(memory.write(self._region(number, len(target))).commit)

    def remove(self, number: int) -> None:
        """Remove the file if it exists."""
        self.path(number).unlink(missing_ok=True)

    def _region(self, number: int, nbytes: int) -> ts.TensorStore:
        """The slot's part of the array of all slots that take as many pages as ``nbytes``."""
        chunk_bytes = padded_bytes(nbytes)
        spec = _spec(self._folder, chunk_bytes)
        opening = ts.open(spec, open=True, assume_metadata=True, context=self._context)
        start = number * chunk_bytes
        array: ts.TensorStore = _outcome(opening)
        return array[start : start + nbytes].translate_to[0]


def _context(threads: int) -> ts.Context:
    settings: dict[str, Any] = {
        "cache_pool": {"total_bytes_limit": 0},
        "file_io_concurrency": {"limit": threads},
        "data_copy_concurrency": {"limit": threads},
        # A file is written once, by one thread, and nobody wants it after a crash.
        "file_io_locking": {"mode": "none"},
        "file_io_sync": False,
    }
    try:
        return ts.Context(settings | {"file_io_mode": {"mode": "direct"}})
    except ValueError:
        # The versions for Python 3.10 read through the page cache.
        return ts.Context(settings)


def _spec(folder: Path, chunk_bytes: int) -> dict[str, Any]:
    grid = {"name": "regular", "configuration": {"chunk_shape": [chunk_bytes]}}
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder}/"},
        "metadata": {
            "shape": [_FARTHEST // chunk_bytes * chunk_bytes],
            "data_type": "uint8",
            "chunk_grid": grid,
            # Chunk 7 is the file "7".
            "chunk_key_encoding": {"name": "v2", "configuration": {"separator": "."}},
            "codecs": [{"name": "bytes"}],
            "fill_value": 0,
        },
        # A chunk of zeros is a chunk like any other, and one that is missing is not zeros.
        "store_data_equal_to_fill_value": True,
        "fill_missing_data_reads": False,
    }


def _outcome(future: Any) -> Any:
    """The result of a TensorStore future; errors become OSError, as those of the disk are."""
    try:
        return future.result()
    except ValueError as error:
        found = _OS_ERROR.search(str(error))
        missing = str(error).startswith("NOT_FOUND")
        number = int(found[1]) if found else errno.ENOENT if missing else errno.EIO
        raise OSError(number, str(error)) from error


def _write_directly(path: Path, source: Bytes) -> bool:
    """Write past the page cache; False, with nothing written, where that is not possible."""
    whole = len(source) - len(source) % _PAGE_BYTES
    direct = getattr(os, "O_DIRECT", None)
    if direct is None or not whole:
        return False
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | direct, 0o600)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        _write_all(file, source[:whole].data, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            path.unlink()
            return False
        raise
    finally:
        os.close(file)
    if whole < len(source):
        file = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        try:
            _write_all(file, memoryview(source[whole:].tobytes().ljust(_PAGE_BYTES, b"\0")), whole)
        finally:
            os.close(file)
    return True


def _read_directly(path: Path, target: Bytes) -> bool:
    """Read past the page cache and without a copy; False where that is not possible."""
    whole = len(target) - len(target) % _PAGE_BYTES
    direct = getattr(os, "O_DIRECT", None)
    if direct is None or not whole or target.ctypes.data % _PAGE_BYTES:
        return False
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC | direct)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    try:
        size = os.fstat(file).st_size
        if size != padded_bytes(len(target)):
            raise OSError(errno.EIO, f"the file has {size} bytes", str(path))
        _read_all(file, target[:whole].data, 0)
    except OSError as error:
        if error.errno == errno.EINVAL:
            return False
        raise
    finally:
        os.close(file)
    if whole < len(target):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            _read_all(file, target[whole:].data, whole)
        finally:
            os.close(file)
    return True


def _read_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        got = os.preadv(file, [data], offset)
        if not got:
            raise OSError(errno.EIO, "the file has ended early")
        data, offset = data[got:], offset + got


def _write_all(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _settle(path: Path) -> None:
    """Have the disk take a file, and the page cache forget it, before errors go unnoticed."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fdatasync(file)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)
