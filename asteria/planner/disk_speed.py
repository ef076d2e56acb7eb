"""How fast a disk writes and reads, past the page cache where the system allows that."""

from __future__ import annotations

import contextlib
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from asteria.errors import ConfigError

__all__ = ["DiskSpeed", "measure_disk"]

_PIECE_BYTES = 4 * 1024**2
_AT_A_TIME = 4
_ROUND = 16
"""Pieces, after which the clock is looked at."""


class DiskSpeed(NamedTuple):
    """What a disk sustains with a few large pieces at a time."""

    read_bytes_per_s: float
    write_bytes_per_s: float


def measure_disk(
    folder: Path,
    *,
    file_bytes: int = 256 * 1024**2,
    most_s: float = 5.0,
    clock: Callable[[], float] = time.perf_counter,
) -> DiskSpeed:
    """Write a file in ``folder`` and read it back, each for ``most_s`` seconds at most.

    The file has no name by the time it is written to, so that nothing is left behind however this
    ends. Raises ConfigError where the folder cannot be used or has no room.
    """
    try:
        with _nameless(folder) as file, ThreadPoolExecutor(_AT_A_TIME) as threads:
            # Pages of its own, as direct I/O wants them; of no pattern that a disk could compress.
            piece = mmap.mmap(-1, _PIECE_BYTES)
            piece.write(os.urandom(_PIECE_BYTES))
            targets = [mmap.mmap(-1, _PIECE_BYTES) for _ in range(_ROUND)]
            for target in targets:
                target.write(bytes(_PIECE_BYTES))  # or else new memory would be measured

            def write(offset: int) -> None:
                if os.pwrite(file, piece, offset) != _PIECE_BYTES:
                    raise OSError("the disk is full")

            def read(offset: int) -> None:
                target = targets[offset // _PIECE_BYTES % _ROUND]
                if _read_into(file, target, offset) != _PIECE_BYTES:
                    raise OSError("less came back than was written")

            offsets = list(range(0, max(file_bytes, _PIECE_BYTES), _PIECE_BYTES))
            begin = clock()
            written = _run(threads, write, offsets, begin + most_s, clock)
            os.fsync(file)
            writing_s = clock() - begin
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            begin = clock()
            came = _run(threads, read, offsets[:written], begin + most_s, clock)
            reading_s = clock() - begin
    except OSError as error:
        raise ConfigError(
            f"the speed of the disk was to be measured in {folder} with a file of {file_bytes} "
            f"bytes, found {error}: give a folder that can be written to and has room"
        ) from error
    return DiskSpeed(
        came * _PIECE_BYTES / max(reading_s, 1e-9), written * _PIECE_BYTES / max(writing_s, 1e-9)
    )


def _read_into(file: int, target: mmap.mmap, offset: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(file, [target], offset)
    return len(os.pread(file, len(target), offset))


def _run(
    threads: ThreadPoolExecutor,
    work: Callable[[int], None],
    offsets: list[int],
    until_s: float,
    clock: Callable[[], float],
) -> int:
    """How many pieces were done, a few at a time, until the time was up; one round at least."""
    done = 0
    while done < len(offsets) and (done == 0 or clock() < until_s):
        round_ = offsets[done : done + _ROUND]
        list(threads.map(work, round_))
        done += len(round_)
    return done


@contextlib.contextmanager
def _nameless(folder: Path) -> Iterator[int]:
    """A file to read and write, of direct I/O if the file system has that; it has no name."""
    made, name = tempfile.mkstemp(prefix="asteria-probe-", dir=folder)
    try:
        try:
            file = os.open(name, os.O_RDWR | getattr(os, "O_DIRECT", 0))
        except OSError:  # memory and some network file systems know only the page cache
            file = os.open(name, os.O_RDWR)
    finally:
        os.close(made)
        os.unlink(name)
    try:
        yield file
    finally:
        os.close(file)
